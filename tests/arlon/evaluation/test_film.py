"""Figures of films that were rendered, so that what they must come to is known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from arlon.evaluation import cases as suite
from arlon.evaluation import metrics
from arlon.evaluation.film import FilmShot, Outline, _videos, measure_film
from arlon.evaluation.metric_table import FIGURES, GROUPS
from arlon.evaluation.vbench.networks import Backbone
from arlon.shapes import world

FPS = 8.0
RED_LEFT = "a large red square moves left slowly on a grey background"
BLUE_LEFT = "a large blue square moves left slowly on a grey background"


def look(**changes: str) -> world.ObjectLook:
    plain = world.ObjectLook(colour="red", shape="square", size="large", motion="left", speed="slow")
    return replace(plain, **changes)


def render(*looks: world.ObjectLook, seconds: float = 3.0) -> np.ndarray:
    shots = tuple(world.Shot(objects=(one,), background="grey", seconds=seconds) for one in looks)
    scene = world.Scene(shots=shots, start=((0.5, 0.5),), phase=(0.0,))
    return world.render_scene(scene, height=48, width=64, fps=FPS, num_frames=round(seconds * FPS * len(looks))).frames


def outline(*prompts: str, length: int = 24, cuts: tuple[int, ...] = (), **changes: object) -> Outline:
    shots = tuple(
        FilmShot(prompt=prompt, start_frame=i * length, num_frames=length, is_cut=i in cuts)
        for i, prompt in enumerate(prompts)
    )
    return Outline(shots=shots, **changes)


@pytest.fixture(scope="module")
def switch() -> np.ndarray:
    """A red square that turns blue."""
    return render(look(), look(colour="blue"))


def test_a_film_that_shows_what_was_asked_has_full_marks(switch):
    found = measure_film(switch, outline(RED_LEFT, BLUE_LEFT), fps=FPS)
    names = [name for name, figure in FIGURES.items() if figure.group in ("prompt", "switch")]
    values = {name: found["figures"][name] for name in names if not name.startswith("prompt_accuracy_")}
    for name in ("kept_colour", "prompt_both_colours", "prompt_both_objects"):  # what changes, and what is not asked
        assert values.pop(name) is None
    assert values == dict.fromkeys(values, 1.0)
    assert "kept_colour" in found["skipped"]
    assert [shot["read"]["objects"][0]["colour"] for shot in found["shots"]] == ["red", "blue"]


def test_what_is_wrong_shows_in_its_shot_and_nowhere_else(switch):
    found = measure_film(switch, outline(RED_LEFT, BLUE_LEFT.replace("blue", "green")), fps=FPS)
    figures, shots = found["figures"], found["shots"]
    assert [shot["scores"]["colour"] for shot in shots] == [1.0, 0.0]
    assert (figures["prompt_colour"], figures["prompt_shape"], figures["switch_appears"]) == (0.5, 1.0, 0.0)
    assert figures["prompt_accuracy"] == pytest.approx((1 + 6 / 7) / 2)  # 7 attributes are stated; direction is motion


def test_the_last_quarter_is_set_against_the_first():
    frames = render(look(), look(), look(), look(), seconds=2.0)
    prompts = (RED_LEFT, RED_LEFT, RED_LEFT, BLUE_LEFT)
    figures = measure_film(frames, outline(*prompts, length=16), fps=FPS)["figures"]
    quarters = [figures[f"prompt_accuracy_{name}"] for name in ("first", "second", "third", "last")]
    assert quarters == pytest.approx([1, 1, 1, 6 / 7])
    assert figures["prompt_accuracy_change"] == pytest.approx(-1 / 7)
    ends = ("first", "last", "change")
    assert [figures[f"prompt_colour_{end}"] for end in ends] == [1, 0, -1]
    assert [figures[f"prompt_shape_{end}"] for end in ends] == [1, 1, 0]


def test_identity_that_is_lost_at_a_join_is_seen():
    gone = np.concatenate([render(look()), render(look(shape="star", size="small", motion="right"))[:, :, ::-1]])
    kept = measure_film(gone, outline(RED_LEFT, RED_LEFT), fps=FPS)["figures"]
    assert (kept["kept_shape"], kept["kept_size"], kept["kept_colour"], kept["kept_background"]) == (0, 0, 1, 1)


TWO = "a large red square moves left slowly and a large {} circle stays still on a grey background"


def render_two(*seconds: world.ObjectLook) -> np.ndarray:
    """A red square above a still circle, which is green and then as given."""
    circle = look(shape="circle", colour="green", motion="still")
    shots = tuple(world.Shot(objects=(look(), one), background="grey", seconds=3.0) for one in (circle, *seconds))
    scene = world.Scene(shots=shots, start=((0.9, 0.25), (0.6, 0.75)), phase=(0.0, 0.0))
    return world.render_scene(scene, height=48, width=64, fps=FPS, num_frames=24 * len(shots)).frames


@pytest.mark.slow
def test_of_two_objects_each_is_held_against_what_is_asked_of_it():
    circle = look(shape="circle", colour="blue", motion="still")
    prompts = outline(TWO.format("green"), TWO.format("blue"))
    kept = {name: 1.0 for name in FIGURES if name.startswith("kept_")}

    def measure(second: world.ObjectLook) -> dict[str, float]:
        figures = measure_film(render_two(second), prompts, fps=FPS)["figures"]
        return {name: figures[name] for name in kept} | {"switch_appears": figures["switch_appears"]}

    assert measure(circle) == kept | {"switch_appears": 1.0}, "the red one is to stay red"
    moves = measure(replace(circle, motion="right"))
    assert moves == kept | {"switch_appears": 1.0, "kept_motion": 0.5}
    assert measure(replace(circle, colour="white"))["switch_appears"] == 0
    other_way = measure_film(render_two(circle), outline(TWO.format("green"), TWO.format("green")), fps=FPS)
    assert other_way["figures"]["kept_colour"] == 0.5


def test_both_objects_must_be_right():
    frames = render_two(look(shape="circle", colour="blue", motion="still"))
    shots = outline(TWO.format("green"), TWO.format("blue").replace("circle", "star"))
    found = measure_film(frames, shots, fps=FPS)
    assert (found["figures"]["prompt_both_colours"], found["figures"]["prompt_both_objects"]) == (1, 0.5)
    assert [shot["scores"]["both_objects"] for shot in found["shots"]] == [1, 0]
    assert found["figures"]["prompt_accuracy"] == pytest.approx((1 + 6.5 / 7) / 2), "both count as attributes do not"


def test_an_object_that_was_never_there_keeps_nothing():
    found = measure_film(render(look(), look()), outline(*[TWO.format("green")] * 2), fps=FPS)["figures"]
    assert [found[f"kept_{name}"] for name in ("colour", "shape", "motion", "place", "size")] == [0.5] * 5
    assert found["kept_background"] == 1


def test_nothing_is_asked_of_what_a_cut_keeps(switch):
    found = measure_film(switch, outline(RED_LEFT, BLUE_LEFT, cuts=(1,)), fps=FPS)
    assert found["joins"] == []
    assert "continue one another" in found["skipped"]["kept_shape"]
    assert found["figures"]["prompt_colour"] == 1


def test_an_object_that_grew_has_no_stated_size_until_a_cut():
    prompts = ["a large red square grows on a grey background", *[RED_LEFT] * 2]
    frames = np.concatenate([render(look(motion="grow")), render(look()), render(look())])
    shots = measure_film(frames, outline(*prompts, cuts=(2,)), fps=FPS)["shots"]
    assert [shot["scores"]["size"] for shot in shots] == [1.0, None, 1.0]


@pytest.mark.parametrize(("prompt", "reason"), [("", "not known"), ("a dog", "shapes world")])
def test_without_prompts_of_the_world_the_picture_is_still_measured(switch, prompt, reason):
    found = measure_film(switch, outline(prompt, length=48), fps=FPS)
    assert reason in found["skipped"]["prompt_accuracy"]
    assert found["figures"]["prompt_accuracy"] is None
    assert found["figures"]["temporal_flickering"] is not None


def test_flicker_and_drift_are_those_of_the_whole_video(switch):
    figures = measure_film(switch, outline("", length=48), fps=FPS)["figures"]
    video = metrics.torch.from_numpy(switch).permute(3, 0, 1, 2).float() / 127.5 - 1
    drift = metrics.film_drift(metrics.frame_statistics(video), window=7)  # 15 % of 48
    assert figures["temporal_flickering"] == pytest.approx(metrics.temporal_flickering(video))
    assert figures["drift_colour"] == pytest.approx(drift.colour)
    assert figures["drift_sharpness"] == pytest.approx(drift.sharpness)


def test_large_frames_are_worked_on_one_by_one():
    frames = np.zeros((5, 1024, 1026, 3), np.uint8) + np.arange(5, dtype=np.uint8)[:, None, None, None]

    def levels(frames: np.ndarray) -> list[list[int]]:
        return [((v[0, :, 0, 0] + 1) * 127.5).round().int().tolist() for v in _videos(frames, overlap=1)]

    assert levels(frames) == [[0, 1], [1, 2], [2, 3], [3, 4]]
    assert levels(frames[:, :8, :8]) == [[0, 1, 2, 3, 4]]


def test_seams_are_told_from_prompt_switches_and_cuts():
    levels = np.cumsum([1] * 40).astype(np.uint8)
    for frame, jump in ((10, 4), (20, 9), (30, 99)):  # a join in a shot, one at a prompt switch, a cut
        levels[frame:] += jump
    frames = np.broadcast_to(levels[:, None, None, None], (40, 16, 24, 3))
    shots = tuple(
        FilmShot(prompt="", start_frame=s, num_frames=n, is_cut=s == 30) for s, n in ((0, 20), (20, 10), (30, 10))
    )
    figures = measure_film(frames, Outline(shots=shots, segment_starts=(0, 10, 20, 30)), fps=FPS)["figures"]
    assert figures["seam_strength"] == pytest.approx(5)
    assert figures["seam_strength_switch"] == pytest.approx(10)


@pytest.mark.slow
def test_every_prompt_switch_has_its_own_seam(switch):
    frames = np.concatenate([switch, switch])
    shots = outline(RED_LEFT, BLUE_LEFT, RED_LEFT, BLUE_LEFT)
    starts = tuple(shot.start_frame for shot in shots.shots)
    found = measure_film(frames, replace(shots, segment_starts=starts), fps=FPS)
    steps = metrics.frame_differences(torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1)
    expected = [
        metrics.seam_ratio(steps, [join], leave_out=[x for x in starts[1:] if x != join]) for join in starts[1:]
    ]
    assert [join["seam_strength"] for join in found["joins"]] == pytest.approx(expected)
    assert all(join["seam_strength"] is None for join in measure_film(frames, shots, fps=FPS)["joins"])


def test_no_seam_is_dropped_where_nothing_else_moves():
    frames = np.zeros((30, 8, 8, 3), np.uint8)
    shots = outline("", length=30, segment_starts=(0, 10, 20))
    assert measure_film(frames, shots, fps=FPS)["figures"]["seam_strength"] == 1
    frames[10:] = 5
    assert measure_film(frames, shots, fps=FPS)["figures"]["seam_strength"] == pytest.approx(25)
    found = measure_film(frames[:2], outline("", length=2, segment_starts=(0, 1)), fps=FPS)
    assert "nothing to compare with" in found["skipped"]["seam_strength"]


def test_seams_need_known_segments(switch):
    found = measure_film(switch, outline(RED_LEFT, length=48), fps=FPS)
    assert "where its segments join" in found["skipped"]["seam_strength"]
    found = measure_film(switch, outline(RED_LEFT, length=48, segment_starts=(0,)), fps=FPS)
    assert found["skipped"]["seam_strength"] == "no segments of this film join there"


def test_speed_is_in_heights_a_second_and_a_new_shot_is_no_motion(switch):
    slow = measure_film(switch, outline("", ""), fps=FPS)["figures"]
    assert slow["flow_speed"] == pytest.approx(world.MOVE_SPEED["slow"], rel=0.6)
    assert slow["dynamic_degree_lk"] == 0
    still = np.concatenate(
        [render(look(motion="still"), seconds=1), render(look(motion="still", colour="white"), seconds=1)]
    )
    cut = measure_film(still, outline("", "", length=8, cuts=(1,)), fps=FPS)["figures"]
    assert cut["flow_speed"] < 1e-3


def test_a_film_of_one_frame_says_what_it_cannot_have():
    found = measure_film(render(look())[:1], outline(RED_LEFT, length=1), fps=FPS)
    assert found["skipped"]["temporal_flickering"] == "the film has one frame"
    assert "no two frames of one shot" in found["skipped"]["flow_speed"]
    assert found["figures"]["prompt_background"] == 1


def test_no_motion_is_asked_of_a_shot_too_short_to_show_any():
    for length, has_motion in ((1, False), (3, False), (8, True)):
        frames = render(look(), look(), seconds=length / FPS)
        figures = measure_film(frames, outline(RED_LEFT, RED_LEFT, length=length), fps=FPS)["figures"]
        motions = [figures[name] for name in ("prompt_motion", "prompt_direction", "kept_motion")]
        assert motions == ([1, 1, 1] if has_motion else [None, None, None])
        assert (figures["prompt_colour"], figures["prompt_accuracy"], figures["kept_shape"]) == (1, 1, 1)


def test_networks_that_are_not_given_are_never_replaced(switch):
    class Constant(Backbone):
        description = "constant"

        def score(self, frames: np.ndarray, *, fps: float) -> float:
            return 0.25

    found = measure_film(switch, outline("", length=48), fps=FPS, backbones={"subject_consistency": Constant()})
    learned = [name for name, figure in FIGURES.items() if figure.group == "vbench" and figure.backbone]
    assert {name: found["figures"][name] for name in learned} == dict.fromkeys(learned) | {"subject_consistency": 0.25}
    assert "--backbone background_consistency=" in found["skipped"]["background_consistency"]
    assert "RAFT" in found["skipped"]["dynamic_degree"]
    assert "MUSIQ, SPAQ: give --backbone imaging_quality=" in found["skipped"]["imaging_quality"]
    assert "AMT-S, whose architecture" in found["skipped"]["motion_smoothness"]


def test_every_figure_has_a_value_or_a_reason(switch):
    found = measure_film(switch, outline(RED_LEFT, BLUE_LEFT, segment_starts=(0, 24)), fps=FPS)
    assert set(found["figures"]) == set(FIGURES)
    assert {name for name, value in found["figures"].items() if value is None} == set(found["skipped"])
    assert {figure.group for figure in FIGURES.values()} == set(GROUPS)
    assert {f"prompt_{name}" for name in suite.PROMPT_ATTRIBUTES} < set(FIGURES)
    ends = {f"prompt_{name}_{end}" for name in suite.PROMPT_ATTRIBUTES for end in ("first", "last", "change")}
    assert ends == {name for name, figure in FIGURES.items() if figure.group == "quarters"}
    assert not any(isinstance(v, float) and math.isnan(v) for shot in found["shots"] for v in shot["scores"].values())


def test_shots_outside_the_film_are_refused(switch):
    with pytest.raises(ValueError, match="shot 2 is frames 24-47, but the film has 40"):
        measure_film(switch[:40], outline("", ""), fps=FPS)
    with pytest.raises(ValueError, match="uint8"):
        measure_film(switch.astype(float), outline("", ""), fps=FPS)
