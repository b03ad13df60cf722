import re
from dataclasses import replace

import numpy as np
import pytest

from arlon.data.datasets import ShapesTakes, ShapesTakesConfig
from arlon.shapes import world
from arlon.shapes.captions import caption


def one_object(seconds=(3.0,), **look) -> world.Scene:
    base = dict(colour="red", shape="circle", size="large", motion="still", speed="slow") | look
    shots = tuple(world.Shot(objects=(world.ObjectLook(**base),), background="black", seconds=s) for s in seconds)
    return world.Scene(shots=shots, start=((0.5, 0.5),), phase=(0.3,))


def test_rendering_is_seeded() -> None:
    scenes = [world.sample_scene(np.random.default_rng(5), seconds=(2, 3)) for _ in range(2)]
    assert scenes[0] == scenes[1]
    np.testing.assert_array_equal(*(world.render_scene(scene).frames for scene in scenes))


@pytest.mark.parametrize("shape", world.ALL_SHAPES)
def test_shapes_have_about_the_area_of_their_disc(shape: str) -> None:
    frame = world.render_scene(one_object(shape=shape), height=128, width=128, num_frames=1).frames[0]
    covered = (frame[..., 0].astype(float) - 10) / (222 - 10)
    disc = np.pi * (world.SIZES["large"] * 128) ** 2
    assert covered.sum() == pytest.approx(disc, rel=0.25)


def test_edges_are_antialiased_without_moving_the_centre() -> None:
    frame = world.render_scene(one_object(), height=65, width=97, num_frames=1).frames[0].astype(float)
    weight = frame[..., 0] - frame[..., 0].min()
    ys, xs = np.mgrid[0:65, 0:97] + 0.5
    assert (weight * xs).sum() / weight.sum() / 65 == pytest.approx(0.5, abs=0.01)
    assert (weight * ys).sum() / weight.sum() / 65 == pytest.approx(0.5, abs=0.01)
    assert 0 < np.mean((weight > 20) & (weight < 190)) < 0.1


@pytest.mark.parametrize(("motion", "sign"), [("left", (-1, 0)), ("right", (1, 0)), ("up", (0, -1)), ("down", (0, 1))])
def test_directions_are_those_of_the_screen(motion: str, sign: tuple[int, int]) -> None:
    truth = world.render_scene(one_object(motion=motion), num_frames=9)
    step = (truth.x[8, 0] - truth.x[0, 0], truth.y[8, 0] - truth.y[0, 0])
    assert step == pytest.approx(tuple(s * world.MOVE_SPEED["slow"] for s in sign))


def test_state_carries_over_a_prompt_switch() -> None:
    scene = one_object(seconds=(2.0, 2.0), motion="right", speed="fast")
    truth = world.render_scene(scene, fps=8)
    step = np.diff(truth.x[:, 0]) % 1.0
    np.testing.assert_allclose(step, step[0], atol=1e-6)
    assert list(np.bincount(truth.shot)) == [16, 16]


def test_frame_rate_and_size_do_not_change_the_motion() -> None:
    scene = world.sample_scene(np.random.default_rng(3), seconds=(2, 2))
    slow, fast = world.render_scene(scene, fps=4), world.render_scene(scene, fps=8, height=96, width=96)
    np.testing.assert_allclose(slow.x, fast.x[::2], atol=1e-6)
    np.testing.assert_allclose(slow.y, fast.y[::2], atol=1e-6)


def test_training_never_sees_held_out_pairs_or_phrasings() -> None:
    rng = np.random.default_rng(0)
    held_out_words = re.compile(r"heads|glides|climbs|drops|keeps|remains|against|rapidly|slow motion|we see|seen")
    for _ in range(300):
        scene = world.sample_scene(rng, seconds=(2, 4))
        for shot in scene.shots:
            assert not any(world.is_held_out(look) for look in shot.objects)
            assert not held_out_words.search(caption(shot, rng))


@pytest.mark.slow
def test_more_colours_are_drawn_with_every_shape_and_leave_held_out_pairs_out() -> None:
    plain = ShapesTakesConfig(num_takes=400, num_frames=17)
    wide = ShapesTakes(replace(plain, more_colours=True))
    pairs, texts = set(), []
    for index in range(400):
        texts += wide.take(index).spans[0].captions
    for text in texts:
        pairs |= {(c, s) for c in world.PALETTE for s in world.SHAPES if f"{c} {s}" in text}
    assert pairs.isdisjoint(world.HELD_OUT_COLOUR_SHAPE)
    assert pairs >= {(colour, shape) for colour in world.MORE_COLOURS for shape in world.SHAPES}
    assert "more_colours" not in ShapesTakes(plain).identity, "sets made before there were more are found again"
    assert wide.identity["more_colours"] is True
    colours = np.array(list(world.PALETTE.values()), float)
    apart = np.linalg.norm(colours[:, None] - colours, axis=-1) + 1e3 * np.eye(len(colours))
    assert apart.min() > 50


def test_more_shapes_are_drawn_in_every_colour_and_leave_held_out_pairs_out() -> None:
    plain = ShapesTakesConfig(num_takes=500, num_frames=17)
    wide = ShapesTakes(replace(plain, more_shapes=True))
    texts = [text for index in range(500) for text in wide.take(index).spans[0].captions]
    pairs = {(c, s) for c in world.COLOURS for s in world.ALL_SHAPES if any(f"{c} {s}" in text for text in texts)}
    assert pairs.isdisjoint(world.HELD_OUT_COLOUR_SHAPE)
    assert pairs >= {(colour, shape) for colour in world.COLOURS for shape in world.MORE_SHAPES}
    assert not any("ring" in re.findall(r"\w+", text) and "spins" in text for text in texts if " and " not in text)
    assert "more_shapes" not in ShapesTakes(plain).identity
    assert wide.identity["more_shapes"] is True


def test_held_out_scenes_always_have_a_held_out_pair_and_say_it() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        shot = world.sample_scene(rng, seconds=(2,), split="held_out", two_objects_prob=0.0).shots[0]
        assert world.is_held_out(shot.objects[0])
        text = caption(shot, rng, "held_out")
        assert shot.objects[0].colour in text
        assert shot.objects[0].shape in text


def test_a_switch_changes_exactly_one_object() -> None:
    rng = np.random.default_rng(2)
    changed = []
    for _ in range(200):
        before, after = world.sample_scene(rng, seconds=(2, 4)).shots
        changed.append(sum(a != b for a, b in zip(before.objects, after.objects, strict=True)))
        assert all(a.shape == b.shape and a.size == b.size for a, b in zip(before.objects, after.objects, strict=True))
    assert max(changed) == 1
    assert np.mean(changed) > 0.95


def test_unknown_background_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown background 'beach', .*'black'"):
        world.render_background("beach", 8, 8)
