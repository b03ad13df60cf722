"""Loop prompts, JSON tails and score suffixes against figures of the released code."""

import json
from pathlib import Path

import pytest

from arlon.text.cleaning import clean_caption
from arlon.text.prompts import CAMERA_MOTIONS, PromptScript, add_scores, parse_prompt

GOLDEN = json.loads((Path(__file__).parents[2] / "data" / "inference_helpers.json").read_text())["prompts"]


@pytest.mark.parametrize("case", GOLDEN["score"], ids=lambda case: case["out"])
def test_scores_equal_the_released_code(case: dict):
    got = add_scores(case["prompt"], aesthetic=case["aes"], motion=case["flow"], camera=case["camera"])
    assert got == case["out"]


def test_scores_survive_cleaning_and_are_not_said_twice():
    scored = add_scores("A Cat", aesthetic=6.5, motion=5, camera="zoom in")
    assert clean_caption(scored) == "a cat aesthetic score: 6.5. motion score: 5.0. camera motion: zoom in."
    assert add_scores("a cat. Motion Score: 3.0.", motion=5) == "a cat. Motion Score: 3.0."
    assert [clean_caption(add_scores("a", camera=name))[17:-1] for name in CAMERA_MOTIONS] == list(CAMERA_MOTIONS)


def test_unknown_camera_motion_is_refused():
    with pytest.raises(ValueError, match=r"'pan lfet'.*'pan left'"):
        add_scores("a cat", camera="pan lfet")


def test_loop_prompts_equal_the_released_code():
    script = parse_prompt(GOLDEN["merge"])
    texts, starts = GOLDEN["split"]
    assert script == PromptScript(texts=tuple(zip(starts, texts, strict=True)))
    spaced = parse_prompt("|0|a beautiful day|1| a sunny day |3|a rainy day")
    for loop, (expected, plain) in GOLDEN["loop"]:
        assert spaced.at(loop) == expected.strip()  # the released split strips, its extraction does not
        assert parse_prompt(plain).at(loop) == plain


def test_plain_prompts_hold_throughout():
    texts, starts = GOLDEN["split_plain"]
    script = parse_prompt(texts[0])
    assert starts is None
    assert script == PromptScript(texts=((0, texts[0]),))
    assert script.at(0) == script.at(9) == texts[0]
    assert parse_prompt("either | or").at(3) == "either | or"


def test_json_tails_equal_the_released_code():
    (texts, paths, strategies), plain = GOLDEN["json"]
    script = parse_prompt(f'{texts[0]}{{"reference_path": "{paths[0]}", "mask_strategy": "{strategies[0]}"}}')
    assert script.at(0) == texts[0]
    assert script.reference_paths == tuple(paths[0].split(";"))
    assert script.mask_strategy == strategies[0]
    assert parse_prompt(plain[0][0]) == PromptScript(texts=((0, plain[0][0]),))


def test_segments_and_a_tail_go_together():
    script = parse_prompt('|0| dawn |12| noon {"reference_path": "a.png; b c.mp4;"}')
    assert script.texts == ((0, "dawn"), (12, "noon"))
    assert (script.at(11), script.at(12)) == ("dawn", "noon")
    assert script.reference_paths == ("a.png", "b c.mp4")
    assert script.mask_strategy == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("|1|late", r"must start with \|0\| and rise, got \[1\]"),
        ("|0|a|2|b|2|c", r"must start with \|0\| and rise, got \[0, 2, 2\]"),
        ("a {set} of things", "must be one JSON object with reference_path and mask_strategy, got '{set} of things'"),
        ('a{"mask_strategy": "0"} b', "must be one JSON object"),
        ('a{"mask": "0"}', "unknown key 'mask' after the prompt, choose from 'reference_path', 'mask_strategy'"),
        ('a{"mask_strategy": 0}', "mask_strategy after the prompt must be text, got 0"),
    ],
)
def test_bad_prompts_are_refused(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        parse_prompt(text)


def test_segments_before_the_first_are_refused():
    with pytest.raises(ValueError, match="segments count from 0, got -1"):
        parse_prompt("a").at(-1)
