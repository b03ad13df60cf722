import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from arlon.shapes import oracle, tracking, world
from arlon.shapes.matching import FOLD, shape_likeness
from benchmarks import oracle_validation as validation


def look(**changes: str) -> world.ObjectLook:
    first = world.ObjectLook(colour="red", shape="circle", size="large", motion="right", speed="slow")
    return replace(first, **changes)


def scene(*looks: world.ObjectLook, background: str = "grey", start=((0.5, 0.5), (0.5, 0.1))) -> world.Scene:
    shot = world.Shot(objects=looks, background=background, seconds=6.375)
    return world.Scene(shots=(shot,), start=start[: len(looks)], phase=(0.3,) * len(looks))


def wrong_attributes(spec: world.Scene, frames: np.ndarray) -> list[str]:
    result = oracle.score_clip(frames, spec.shots[0]).objects[0]
    return [name for name in oracle.ATTRIBUTES if getattr(result, name) is False]


PAIRS = [(s, m) for s in world.SHAPES for m in world.MOTIONS if world.is_possible(look(shape=s, motion=m))]


@pytest.mark.slow
def test_every_shape_in_every_motion_is_read():
    wrong = []
    for number, (shape, motion) in enumerate(PAIRS):
        size, speed = ("small", "large")[number % 2], world.SPEEDS[number // 2 % 2]
        colour = list(world.COLOURS)[number % 8]
        one = world.ObjectLook(colour=colour, shape=shape, size=size, motion=motion, speed=speed)
        spec = scene(one, background=world.BACKGROUNDS[number % 6])
        wrong += [(one, name) for name in wrong_attributes(spec, world.render_scene(spec, num_frames=51).frames)]
    assert not wrong


@pytest.mark.parametrize("colour", world.COLOURS)
@pytest.mark.parametrize("background", world.BACKGROUNDS)
def test_every_colour_is_read_on_every_background(colour, background):
    spec = scene(look(colour=colour, shape="star", size="small"), background=background)
    reading = oracle.read_clip(world.render_scene(spec, num_frames=17).frames)
    assert reading.background == background
    assert [o.colour for o in reading.objects] == [colour]


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("clean", 0.99),
        pytest.param("blur 1 px + noise 0.05", 0.97, marks=pytest.mark.slow),
        pytest.param("ringing + noise 0.03", 0.97, marks=pytest.mark.slow),
        pytest.param("bent 1 px", 0.97, marks=pytest.mark.slow),
    ],
)
def test_random_scenes_are_read_despite_degradation(name, least):
    rng, tally = np.random.default_rng(5), validation.Tally()
    for _ in range(24):
        shot, frames = validation.sample_clip(rng, 51)
        tally.add(shot, oracle.read_clip(validation.degrade(name, frames, rng)))
    for attribute in ("background", "count", "colour", "shape", "size", "motion"):
        assert tally.accuracy(attribute) >= 100 * least, (attribute, tally.failed)


def test_tracks_follow_the_truth_within_a_tenth_of_a_pixel_across_the_edge():
    spec = scene(look(speed="fast"))
    rendered = world.render_scene(spec, num_frames=51)
    seen = oracle.read_clip(rendered.frames).objects[0]
    assert np.ptp(seen.x) > 1  # it has left the frame and come back
    assert np.abs(tracking.wrap(seen.x - rendered.x[:, 0], 1.0)).max() < 0.1 / 64
    assert np.abs(seen.y - rendered.y[:, 0]).max() < 0.1 / 64
    np.testing.assert_allclose(seen.radius, rendered.radius[:, 0], rtol=0.02)


@pytest.mark.parametrize("shape", ["square", "triangle", "star"])
def test_harmonic_moments_do_not_see_blur_scale_or_angle(shape):
    y, x = (np.mgrid[:120, :120] + 0.5 - 60) / 60
    sizes = []
    for radius, angle, sigma in ((0.3, 0.0, 0.0), (0.3, 0.5, 4.0), (0.45, 1.0, 2.0)):
        turned = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
        cover = np.clip(0.5 - 60 * world.signed_distance(shape, *turned, np.float64(radius)), 0, 1)
        cover = validation.ndimage.gaussian_filter(cover, sigma)
        z = ((x + 1j * y) * 60).ravel()
        sizes.append(np.abs(tracking.harmonic_moments(cover.ravel(), z, np.zeros(z.size, int), 1)[0]))
    order = FOLD[shape] - 3
    np.testing.assert_allclose([s[order] for s in sizes], sizes[0][order], rtol=0.02)
    # A square of side 1: 2 int x^4 dx - 6 (int x^2 dx)^2 = 1/40 - 1/24.
    if shape == "square":
        assert sizes[0][order] == pytest.approx(1 / 60, rel=0.01)
    assert all(s[order] > 5 * np.delete(s, order).max() for s in sizes)


@pytest.mark.parametrize("shape", world.SHAPES)
@pytest.mark.parametrize("sigma", [0.0, 3.0, 6.0])
def test_likeness_finds_a_shape_at_any_angle_scale_and_blur(shape, sigma):
    y, x = (np.mgrid[:120, :120] + 0.5 - 60) / 60
    z = ((x + 1j * y) * 60).ravel()
    for radius, angle in ((0.25, 0.0), (0.3, 0.5), (0.4, 1.1)):
        turned = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
        cover = np.clip(0.5 - 60 * world.signed_distance(shape, *turned, np.float64(radius)), 0, 1)
        cover = validation.ndimage.gaussian_filter(cover, sigma)
        same_disc = np.full(2, np.sqrt(cover.sum() / np.pi))
        likeness = shape_likeness(cover.ravel(), z, np.zeros(z.size, int), same_disc)
        assert world.SHAPES[likeness[0].argmax()] == shape
        assert likeness[0].max() > 0.95
        assert not likeness[1].any()  # a group without pixels


def test_every_frame_of_a_large_picture_counts():
    size, num_frames = 160, 17
    frames = world.render_scene(scene(look(shape="star")), height=size, width=size, num_frames=num_frames).frames
    background = world.render_background("grey", size, size).astype(np.float32)
    (track,) = tracking.find_tracks(frames.astype(np.float32), background)
    assert len(track.pixels.frame) > 2 * tracking.MAX_PIXELS
    likeness = track.likeness(np.arange(num_frames))
    assert {world.SHAPES[best] for best in likeness.argmax(axis=1)} == {"star"}
    assert likeness.max(axis=1).min() > 0.95


def test_uint8_frames_and_video_in_minus_one_to_one_are_read_alike():
    frames = world.render_scene(scene(look(), look(colour="blue", shape="star")), num_frames=17).frames
    video = torch.from_numpy(frames).permute(3, 0, 1, 2) / 127.5 - 1
    a, b = oracle.read_clip(frames), oracle.read_clip(video)
    assert [o.colour for o in a.objects] == [o.colour for o in b.objects]
    np.testing.assert_allclose(a.objects[0].x, b.objects[0].x, atol=1e-4)


@pytest.mark.parametrize("num_frames", [1, 2, 3])
def test_what_a_picture_shows_is_read(num_frames):
    look = world.ObjectLook(colour="red", shape="square", size="large", motion="still", speed="slow")
    shot = world.Shot(objects=(look,), background="grey", seconds=1.0)
    spec = world.Scene(shots=(shot,), start=((0.5, 0.5),), phase=(0.0,))
    (seen,) = oracle.read_clip(world.render_scene(spec, num_frames=num_frames).frames).objects
    assert (seen.colour, seen.shape, seen.size, seen.motion) == ("red", "square", "large", None)


def test_wrong_expectations_fail_one_attribute_each():
    spec = scene(look(shape="square"))
    frames = world.render_scene(spec, num_frames=51).frames
    assert wrong_attributes(spec, frames) == []
    for name, value in (
        ("colour", "blue"),
        ("shape", "star"),
        ("size", "small"),
        ("motion", "left"),
        ("speed", "fast"),
    ):
        assert wrong_attributes(scene(replace(look(shape="square"), **{name: value})), frames) == [name]
    assert not oracle.score_clip(frames, scene(look(shape="square"), background="sky").shots[0]).background


def test_two_objects_are_scored_in_the_order_they_are_expected():
    one, two = look(motion="right"), look(colour="blue", shape="star", size="small", motion="left")
    spec = scene(one, two, start=((0.3, 0.25), (0.6, 0.75)))
    frames = world.render_scene(spec, num_frames=51).frames
    for order in ((one, two), (two, one)):
        score = oracle.score_clip(frames, order)
        assert score.count
        assert [score.share(name) for name in oracle.ATTRIBUTES] == [1.0] * 5
    score = oracle.score_clip(frames, (two, replace(one, colour="green")))
    assert [o.colour for o in score.objects] == [True, False]


def test_an_empty_background_has_no_objects_and_scores_nothing():
    frames = np.broadcast_to(world.render_background("grass", 64, 64), (8, 64, 64, 3)).astype(np.uint8)
    noisy = validation.degrade("noise 0.04", frames, np.random.default_rng(0))
    assert oracle.read_clip(noisy).objects == ()
    score = oracle.score_clip(noisy, [look(), look(colour="blue")])
    assert not score.count
    assert score.share("colour") == score.share("motion") == 0


def test_pure_noise_is_read_without_an_error():
    noise = np.random.default_rng(0).integers(0, 256, (9, 48, 64, 3), dtype=np.uint8)
    assert isinstance(oracle.read_clip(noise), oracle.Reading)
    assert isinstance(oracle.read_clip(noise[:1]), oracle.Reading)


def test_identity_survives_a_motion_change_and_a_colour_change_is_seen():
    first = world.Shot(objects=(look(shape="star"),), background="navy", seconds=34 / 8)
    turned = replace(first, objects=(look(shape="star", motion="up"),))
    painted = replace(first, objects=(look(shape="star", colour="cyan"),))
    for second, colour_kept, motion_kept in ((turned, True, False), (painted, False, True)):
        spec = world.Scene(shots=(first, second), start=((0.5, 0.5),), phase=(0.0,))
        frames = world.render_scene(spec, num_frames=68).frames
        kept = oracle.identity_kept(oracle.read_clip(frames[:34]), oracle.read_clip(frames[34:]))
        assert kept.background
        expected = {"place": True, "colour": colour_kept, "shape": True, "size": True, "motion": motion_kept}
        assert kept.objects == (oracle.ObjectKept(**expected),)
    elsewhere = world.render_scene(scene(look(shape="star"), start=((0.1, 0.9),)), num_frames=34).frames
    kept = oracle.identity_kept(oracle.read_clip(frames[:34]), oracle.read_clip(elsewhere))
    assert not kept.objects[0].place
    assert not kept.background


def test_a_path_is_followed_where_an_object_is_at_the_same_time():
    def read(*looks, start=((0.2, 0.3), (0.7, 0.7)), **size):
        made = scene(*looks, start=start)
        return oracle.read_clip(world.render_scene(made, num_frames=34, **size).frames)

    given = read(look(motion="right"))
    assert oracle.path_followed(given, read(look(motion="right", colour="blue", shape="star"))) == 1
    assert oracle.path_followed(given, read(look(motion="right"), start=((0.2, 0.6),))) == 0
    assert 0 < oracle.path_followed(given, read(look(motion="still"))) < 0.5  # leaves it, and may come round again
    two = read(look(motion="right"), look(motion="still", colour="blue"))
    assert oracle.path_followed(given, two) == 1
    assert oracle.path_followed(two, given) == 0.5
    at_left = read(look(motion="still"), start=((0.04, 0.5),), height=64, width=96)
    for x, share in ((1.46, 1), (1.04, 0), (0.2, 0)):  # an edge is where the other one is, 1.5 heights away
        assert (
            oracle.path_followed(at_left, read(look(motion="still"), start=((x, 0.5),), height=64, width=96)) == share
        )
    blank = replace(given, objects=())
    assert oracle.path_followed(given, blank) == 0
    assert math.isnan(oracle.path_followed(blank, given))
    with pytest.raises(ValueError, match="width / height"):
        oracle.path_followed(given, replace(given, aspect=2.0))


def test_reading_a_clip_takes_less_than_a_quarter_of_a_second():
    frames = world.render_scene(scene(look(), look(colour="blue", shape="star")), num_frames=51).frames
    times = []
    for _ in range(4):
        began = time.process_time()
        oracle.read_clip(frames)
        times.append(time.process_time() - began)
    assert min(times) < 0.25


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: oracle.read_clip(np.zeros((4, 8, 8), np.uint8)), r"got \(4, 8, 8\)"),
        (lambda: oracle.read_clip(np.zeros((4, 8, 8, 3))), "float in"),
        (lambda: oracle.read_clip(np.zeros((0, 8, 8, 3), np.uint8)), "expected frames"),
        (lambda: oracle.read_clip(np.zeros((1, 8, 8, 3), np.uint8), fps=0), "fps must be positive"),
        (lambda: oracle.score_clip(np.zeros((1, 8, 8, 3), np.uint8), []), "nothing is expected"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
