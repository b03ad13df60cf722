"""Suites on readings written by hand, on rendered truth, and against closed forms."""

from __future__ import annotations

import math
import tracemalloc
from dataclasses import fields, replace

import numpy as np
import pytest

from arlon.evaluation import cases as suite
from arlon.shapes import captions, world
from arlon.shapes.oracle import ObjectReading, Reading

LOOK = world.ObjectLook(colour="red", shape="square", size="large", motion="left", speed="slow")


def shot(look: world.ObjectLook = LOOK, background: str = "grey") -> world.Shot:
    return world.Shot(objects=(look,), background=background, seconds=5.0)


def reading(look: world.ObjectLook | None = LOOK, background: str = "grey", x: float = 0.5) -> Reading:
    """What the oracle would say of a clip that shows exactly this, at a place that does not change."""
    line = np.full(6, x)
    seen = (
        ()
        if look is None
        else (
            ObjectReading(
                colour=look.colour,
                shape=look.shape,
                size=look.size,
                motion=look.motion,
                speed=look.speed,
                colour_confidence=1.0,
                shape_confidence=1.0,
                presence=1.0,
                x=line,
                y=line,
                radius=np.full(6, 0.18),
            ),
        )
    )
    return Reading(background, 1.0, seen, 1.0)


def switch(after: world.ObjectLook) -> suite.Case:
    scene = world.Scene(shots=(shot(), shot(after)), start=((0.5, 0.5),), phase=(0.0,))
    return suite.Case(scene=scene, prompts=("one", "two"), seed=0)


def changed_fields(case: suite.Case) -> list[str]:
    before, after = (s.objects[0] for s in case.scene.shots)
    return [f.name for f in fields(before) if getattr(before, f.name) != getattr(after, f.name)]


@pytest.mark.parametrize("split", ["held_out", "train"])
def test_cases_have_pairs_of_their_split_only(split):
    cases = suite.sample_cases(40, seconds=[5.0], split=split, two_objects_prob=0.0)
    assert {world.is_held_out(case.scene.shots[0].objects[0]) for case in cases} == {split == "held_out"}


@pytest.mark.parametrize("split", ["held_out", "train"])
def test_a_switch_changes_exactly_one_attribute(split):
    cases = suite.sample_cases(40, seconds=[6.0, 4.0], split=split)
    assert [changed_fields(case) for case in cases] == [[case.changed] for case in cases]
    assert {case.changed for case in cases} == set(suite.CHANGES)


def test_a_longer_suite_begins_with_a_shorter_one():
    assert suite.sample_cases(9, seconds=[5.0], seed=3)[:4] == suite.sample_cases(4, seconds=[5.0], seed=3)
    assert suite.sample_cases(4, seconds=[5.0], seed=4) != suite.sample_cases(4, seconds=[5.0], seed=3)


def test_training_prompts_state_size_speed_and_background():
    for case in suite.sample_cases(60, seconds=[5.0], split="train", two_objects_prob=0.5):
        text, shot = case.prompts[0], case.scene.shots[0]
        for phrases, values in (
            (captions.SIZE_PHRASES, {look.size for look in shot.objects}),
            (captions.SPEED_PHRASES, {look.speed for look in shot.objects if look.motion != "still"}),
            (captions.BACKGROUND_PHRASES, {shot.background}),
        ):
            assert all(any(phrase in text for phrase in phrases[value]) for value in values), text


@pytest.mark.parametrize("seconds", [[6.375], [6.375, 4.25]])
def test_rendered_truth_scores_full_marks(seconds):
    for case in suite.sample_cases(6, seconds=seconds):
        shots = suite.render_case(case, height=64, width=64, fps=8.0)
        assert [len(frames) for frames in shots] == [51, 34][: len(seconds)]
        outcome = suite.judge(case, shots, fps=8.0)
        assert {value for value in outcome.scores.values() if not math.isnan(value)} == {1.0}, (case, outcome.scores)


def test_a_table_holds_the_scores_beside_chance_and_truth():
    cases = suite.sample_cases(3, seconds=[4.25])
    films = [suite.render_case(case, height=64, width=64, fps=8.0) for case in cases]
    empty = [np.full_like(shots[0], films[0][0][0, 0, 0]) for shots in films]
    table = suite.tabulate([suite.judge(case, [frames], fps=8.0) for case, frames in zip(cases, empty, strict=True)])
    assert (table["colour"].right.mean, table["colour"].truth, table["colour"].guess) == (0, 1, 1 / 8)
    assert table["colour"].shuffled == 0
    assert table["count"].right.count == 3


def test_prompt_scores_name_what_is_wrong():
    seen = reading(replace(LOOK, motion="right", size="small"), background="navy")
    scores = suite.score_prompt(seen, shot())
    assert {name for name, value in scores.items() if value == 0} == {"motion", "direction", "size", "background"}


def test_direction_and_speed_say_nothing_of_a_still_object():
    still = replace(LOOK, motion="still")
    scores = suite.score_prompt(reading(replace(still, speed=None)), shot(still))
    assert math.isnan(scores["direction"])
    assert math.isnan(scores["speed"])
    assert scores["motion"] == 1


def test_chance_is_the_share_of_other_prompts_that_agree():
    looks = [
        replace(LOOK, colour=c, motion=m)
        for c, m in zip(("red", "red", "blue", "blue"), ("left", "up", "left", "still"), strict=True)
    ]
    found = suite.shuffled_scores([reading(look) for look in looks], [shot(look) for look in looks])
    assert found["colour"] == pytest.approx(1 / 3)  # each clip has the colour of one of three other prompts
    assert found["direction"] == pytest.approx(2 / 6)  # of six ordered pairs of moving ones, two agree
    assert found["background"] == 1


def test_a_switch_that_works_has_full_marks():
    case = switch(replace(LOOK, colour="blue"))
    scores = suite.score_switch(reading(), reading(case.scene.shots[1].objects[0]), case)
    assert scores["appears"] == scores["appears colour"] == 1
    assert math.isnan(scores["appears motion"])
    assert math.isnan(scores["kept colour"])
    assert {scores[f"{kind} {name}"] for kind in ("told", "kept") for name in ("shape", "background", "motion")} == {1}


def test_what_the_first_shot_got_wrong_can_be_kept_but_is_not_as_told():
    case = switch(replace(LOOK, colour="blue"))
    wrong = replace(LOOK, shape="star")
    scores = suite.score_switch(reading(wrong), reading(replace(wrong, colour="blue")), case)
    assert (scores["told shape"], scores["kept shape"]) == (0, 1)


def test_an_object_that_jumps_is_not_kept_in_place():
    case = switch(replace(LOOK, motion="up"))
    scores = suite.score_switch(reading(x=0.2), reading(case.scene.shots[1].objects[0], x=0.6), case)
    assert (scores["join place"], scores["kept colour"], scores["appears motion"]) == (0, 1, 1)


@pytest.mark.parametrize(("before", "after"), [(None, LOOK), (LOOK, None), (None, None)])
def test_nothing_is_kept_where_nothing_is_seen(before, after):
    scores = suite.score_switch(reading(before), reading(after), switch(replace(LOOK, colour="blue")))
    assert (scores["kept shape"], scores["kept motion"], scores["join place"]) == (0, 0, 0)


def test_the_bootstrap_agrees_with_the_normal_interval():
    values = np.repeat([0.0, 1.0], [120, 280])
    low, high = suite.bootstrap_interval(values)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 400)
    assert (low, high) == (pytest.approx(0.7 - half, abs=0.004), pytest.approx(0.7 + half, abs=0.004))


def test_the_interval_of_a_large_suite_needs_little_memory():
    values = np.random.default_rng(1).random(5000)
    drawn = np.random.default_rng(0).integers(5000, size=(1000, 5000))
    expected = np.quantile(values[drawn].mean(axis=1), [0.025, 0.975])
    del drawn
    tracemalloc.start()
    interval = suite.bootstrap_interval(values, num_resamples=1000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert interval == tuple(expected)
    assert peak < 40e6, "all draws at once are 80 MB"


def test_a_summary_leaves_out_what_says_nothing():
    share = suite.summarise([{"a": 1.0, "b": math.nan}, {"a": math.nan, "b": math.nan}])
    assert (share["a"].mean, share["a"].count) == (1.0, 1)
    assert share["b"].count == 0
    assert math.isnan(share["b"].low)


def test_impossible_suites_are_refused():
    with pytest.raises(ValueError, match="at least one shot"):
        suite.sample_cases(1, seconds=[])
    with pytest.raises(ValueError, match="one object"):
        suite.sample_cases(1, seconds=[5.0, 4.0], two_objects_prob=0.5)
    with pytest.raises(ValueError, match="two"):
        suite.score_switch(reading(), reading(), suite.sample_cases(1, seconds=[5.0])[0])
    with pytest.raises(ValueError, match="one reading a shot"):
        suite.shuffled_scores([reading()], [])
    with pytest.raises(ValueError, match="frames of 2 shots"):
        suite.judge(suite.sample_cases(1, seconds=[5.0])[0], [np.zeros(1), np.zeros(1)], fps=8.0)
    with pytest.raises(ValueError, match="level"):
        suite.bootstrap_interval(np.ones(3), level=95)
    with pytest.raises(ValueError, match="no cases"):
        suite.summarise([])


def test_both_objects_must_be_right_and_one_alone_is_not_asked():
    green = replace(LOOK, colour="green", shape="circle")
    asked = replace(shot(), objects=(LOOK, green))

    def seen(*looks):
        return replace(reading(), objects=tuple(o for look in looks for o in reading(look).objects))

    def both(*looks):
        return tuple(suite.score_both(seen(*looks), asked).values())

    assert both(LOOK, green) == (1.0, 1.0)
    assert both(green, LOOK) == (1.0, 1.0)
    assert both(LOOK, replace(green, shape="star")) == (1.0, 0.0)
    assert both(LOOK, replace(green, colour="blue")) == (0.0, 0.0)
    assert both(LOOK) == (0.0, 0.0)
    assert all(math.isnan(value) for value in suite.score_both(reading(), shot()).values())
