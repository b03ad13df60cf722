"""Prompts read back, against the grammar that writes them."""

from __future__ import annotations

import numpy as np
import pytest

from arlon.evaluation import cases as suite
from arlon.shapes import captions, world
from arlon.shapes.prompt_reader import AskedObject, AskedShot, read_prompt


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_every_caption_is_read_as_what_it_describes(split):
    rng = np.random.default_rng(0)
    stated = dict.fromkeys(("size", "speed", "background"), 0)
    for _ in range(400):
        shot = world.sample_scene(rng, seconds=[5.0], split=split, two_objects_prob=0.5).shots[0]
        text = captions.caption(shot, rng, split)
        asked = read_prompt(text)
        assert asked is not None, text
        assert asked.background in (None, shot.background), text
        for look, found in zip(shot.objects, asked.objects, strict=True):
            assert (found.colour, found.shape, found.motion) == (look.colour, look.shape, look.motion), text
            assert found.size in (None, look.size), text
            assert found.speed in (None, look.speed), text
            stated["size"] += found.size is not None
            stated["speed"] += found.speed is not None
        stated["background"] += asked.background is not None
    assert min(stated.values()) > 200  # nothing that is stated may be missed, and most of it is stated


def test_prompts_that_state_everything_are_read_in_full():
    for case in suite.sample_cases(60, seconds=[5.0], split="train", two_objects_prob=0.5):
        shot = case.scene.shots[0]
        asked = read_prompt(case.prompts[0])
        assert asked is not None
        assert asked.background == shot.background
        for look, found in zip(shot.objects, asked.objects, strict=True):
            assert found.size == look.size
            assert found.speed == (None if look.motion == "still" else look.speed)


def test_what_is_not_said_stays_open():
    expected = AskedShot(objects=(AskedObject(colour="blue", shape="square"),))
    assert read_prompt("A  Blue square.") == expected


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a dog runs over a beach",
        "a red circle does not move left",
        "a red circle moves left and explodes",
        "a pink circle moves left",
        "on sand",
        "a red circle on sand in the sky",
    ],
)
def test_a_prompt_that_says_more_is_not_understood_at_all(prompt):
    assert read_prompt(prompt) is None
