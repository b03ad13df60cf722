from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from arlon.film.storyboard import (
    StoryboardError,
    load_storyboard,
    parse_storyboard,
    storyboard_from_prompts,
    with_overrides,
    with_shot,
)
from arlon.film.storyboard_values import Duration, parse_duration

FILM = {
    "seed": 7,
    "fps": 12,
    "height": 64,
    "width": 96,
    "model": "shapes",
    "negative_prompt": "blurry",
    "guidance_scale": 3.5,
    "num_inference_steps": 9,
    "solver": "euler",
    "shots": [
        {"prompt": "a red circle", "duration": 4.5, "notes": "opening"},
        {"prompt": "a green circle", "duration": "36f", "transition": "cut", "seed": 3, "guidance_scale": 1},
    ],
}


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_every_key_is_read_and_written_back(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"film{suffix}"
    path.write_text(json.dumps(FILM) if suffix == ".json" else yaml.safe_dump(FILM))
    film = load_storyboard(path)
    assert (film.seed, film.fps, film.height, film.width, film.solver) == (7, 12.0, 64, 96, "euler")
    first, second = film.shots
    assert (first.prompt, first.duration, first.transition) == (
        "a red circle",
        Duration(seconds=4.5),
        "continue",
    )
    assert (second.duration, second.transition, second.seed, second.guidance_scale) == (
        Duration(frames=36),
        "cut",
        3,
        1.0,
    )
    assert parse_storyboard(film.to_plain()) == film


def test_text_file_has_a_prompt_a_line_and_cuts_at_empty_lines(tmp_path: Path) -> None:
    path = tmp_path / "film.txt"
    path.write_text("# a comment\na red circle\na green circle\n\n\n  a blue star \n")
    shots = load_storyboard(path, default_duration=Duration(frames=9)).shots
    assert [(shot.prompt, shot.transition) for shot in shots] == [
        ("a red circle", "continue"),
        ("a green circle", "continue"),
        ("a blue star", "cut"),
    ]
    assert {shot.duration for shot in shots} == {Duration(frames=9)}


def test_lines_of_a_text_file_may_say_how_long(tmp_path: Path) -> None:
    path = tmp_path / "film.txt"
    path.write_text("4.5 | a red circle\n36f| a | b\na or | b\n\n2 s |a star\n")
    shots = load_storyboard(path, default_duration=Duration(frames=9)).shots
    assert [(shot.prompt, shot.duration) for shot in shots] == [
        ("a red circle", Duration(seconds=4.5)),
        ("a | b", Duration(frames=36)),
        ("a or | b", Duration(frames=9)),
        ("a star", Duration(seconds=2.0)),
    ]
    assert shots[3].transition == "cut"
    path.write_text("5 minutes | a red circle\n")
    with pytest.raises(StoryboardError, match=r"shots\[0\].duration must be seconds"):
        load_storyboard(path)


def test_values_of_one_shot_can_be_replaced() -> None:
    film = parse_storyboard(FILM)
    changed = with_shot(film, 1, {"prompt": "a blue circle", "seed": None})
    assert changed.shots == (film.shots[0], replace(film.shots[1], prompt="a blue circle"))
    with pytest.raises(StoryboardError, match="shot 2: seed must be between 0 and"):
        with_shot(film, 1, {"seed": -5})


def test_a_shot_may_be_just_its_prompt_and_white_space_is_folded() -> None:
    film = parse_storyboard({"shots": ["  a red\n  circle\t"]})
    assert film.shots[0].prompt == "a red circle"


@pytest.mark.parametrize(
    ("value", "frames"), [(4.5, 36), ("4.5", 36), ("4.5s", 36), ("36f", 36), ("36 frames", 36), (0.01, 1)]
)
def test_durations_in_seconds_and_frames(value: Any, frames: int) -> None:
    assert parse_duration(value).num_frames(8) == frames


@pytest.mark.parametrize(
    "value", [0, -1, "0f", float("nan"), float("inf"), 3601, "1e9", "", "soon", "1.5f", True, None, [], "--"]
)
def test_impossible_durations_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"must be .*, got"):
        parse_duration(value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sed": 3}, "sed: unknown key; did you mean 'seed'?"),
        ({"shots": []}, "at least one shot"),
        ({"shots": "a red circle"}, "at least one shot"),
        ({"shots": [3]}, r"shots\[0\] must be a mapping with the key 'prompt', got an int"),
        ({"shots": [{"duration": 3}]}, r"shots\[0\].prompt is missing"),
        ({"shots": [{"prompt": " "}]}, r"shots\[0\].prompt is empty"),
        ({"shots": [{"prompt": None}]}, r"shots\[0\].prompt is empty"),
        ({"shots": [{"prompt": "x" * 2001}]}, "at most 2000 characters, got 2001"),
        ({"shots": [{"prompt": "a\x1b[2Jb"}]}, r"control character U\+001B"),
        ({"shots": [{"prompt": 5}]}, "must be text, got 5"),
        ({"shots": [{"prompt": "a", "transition": "fade"}]}, "must be 'continue' or 'cut', got 'fade'"),
        ({"shots": [{"prompt": "a", "image": 5}]}, r"shots\[0\].image must be the path of a file, got 5"),
        ({"shots": [{"prompt": "a", "video": " "}]}, r"shots\[0\].video must be the path of a file"),
        ({"use_codes": "no"}, "use_codes must be true or false, got 'no'"),
        ({"shots": [{"prompt": "a", "promt": "b"}]}, r"shots\[0\].promt: unknown key; did you mean 'prompt'"),
        ({"shots": ["a"] * 10_001}, "at most 10000 shots"),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ({"seed": -2}, "seed must be between -1 and"),
        ({"fps": float("nan")}, "fps must be a number"),
        ({"height": True}, "height must be a whole number, got True"),
        ({"num_inference_steps": 0}, "num_inference_steps must be between 1 and 1000, got 0"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(StoryboardError, match=message):
        parse_storyboard({"shots": ["a"]} | change)


def test_all_problems_are_listed_one_a_line() -> None:
    with pytest.raises(StoryboardError) as caught:
        parse_storyboard({"sed": 1, "height": "tall", "shots": [{"prompt": ""}, {"prompt": "a", "duration": 0}]})
    assert len(caught.value.problems) == 4
    assert len(str(caught.value).splitlines()) == 5


def test_long_lists_and_long_values_are_cut_short() -> None:
    with pytest.raises(StoryboardError) as caught:
        parse_storyboard({"fps": "x" * 9999, "\x1b[31mred": 1, "shots": [{"promt": "a"}] * 99})
    assert len(caught.value.problems) == 200
    assert len(str(caught.value).splitlines()) == 22
    assert "... and 180 more" in str(caught.value)
    assert len(str(caught.value)) < 3000
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", "shots: [a: b: c]", r"a\.yaml': not YAML: line 1"),
        ("a.json", '{"shots": [', r"a\.json': not JSON: line 1"),
        ("a.yaml", "seed: 1\nshots: [a]\nseed: 2", r"not YAML: line 3: the key 'seed' stands twice"),
        ("a.json", '{"seed": 1, "seed": 2, "shots": ["a"]}', r"not JSON: the key 'seed' stands twice"),
        ("a.yaml", "seed: 2024-13-45\nshots: [a]", r"a\.yaml': not YAML: month must be in"),
        ("a.json", '{"seed": ' + "9" * 5000 + "}", r"a\.json': not JSON: Exceeds the limit"),
        ("a.json", "[" * 100_000, r"a\.json': not JSON: maximum recursion"),
        ("a.yaml", "", "must be a mapping"),
        ("a.yaml", "- a\n- b", "must be a mapping"),
        ("a.txt", "\n# nothing\n", "at least one shot"),
    ],
)
def test_unreadable_files_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(StoryboardError, match=message):
        load_storyboard(tmp_path / name)


def test_missing_and_binary_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00\x80")
    for path in (tmp_path / "none.yaml", tmp_path, tmp_path / "b.yaml"):
        with pytest.raises(StoryboardError, match="cannot be read"):
            load_storyboard(path)


def test_options_win_over_the_file_and_minus_one_means_random() -> None:
    film = parse_storyboard(FILM)
    changed = with_overrides(film, {"seed": -1, "fps": 24.0, "height": None})
    assert (changed.seed, changed.fps, changed.height) == (None, 24.0, 64)
    with pytest.raises(StoryboardError, match="width must be between"):
        with_overrides(film, {"width": 0})


def test_prompts_alone_make_a_storyboard() -> None:
    film = storyboard_from_prompts(["a", "b"], duration=Duration(frames=5), transition="cut")
    assert [(shot.prompt, shot.transition, shot.duration.frames) for shot in film.shots] == [
        ("a", "cut", 5),
        ("b", "cut", 5),
    ]
    with pytest.raises(StoryboardError, match="at least one shot"):
        storyboard_from_prompts([])


def test_the_demo_storyboard_has_the_shots_it_promises() -> None:
    film = load_storyboard(Path(__file__).parents[2] / "configs" / "shapes" / "demo.yaml")
    assert [shot.transition for shot in film.shots[1:]].count("cut") == 1
    assert [shot.transition for shot in film.shots[1:]].count("continue") == 2
    assert sum(shot.duration.num_frames(8) for shot in film.shots) >= 20 * 8


def test_a_prompt_in_the_grammar_of_open_sora_is_several_shots() -> None:
    tail = '{"reference_path": "sea.png; storm.mp4", "mask_strategy": "0;2,1,-5,0,5,0.3"}'
    film = storyboard_from_prompts([f"|0| a calm sea |2| a storm |3| a wreck{tail}", "the end"], transition="cut")
    assert [(shot.prompt, shot.transition, shot.duration.to_plain()) for shot in film.shots] == [
        ("a calm sea", "cut", "2 segments"),
        ("a storm", "continue", "1 segments"),
        ("a wreck", "continue", 5.0),
        ("the end", "cut", 5.0),
    ]
    assert film.shots[0].references == ("sea.png", "storm.mp4")
    assert film.shots[0].mask_strategy == "0;2,1,-5,0,5,0.3"
    assert parse_storyboard(film.to_plain()) == film
    plain = storyboard_from_prompts(["a | b", "a {curly} thing"])
    assert [shot.prompt for shot in plain.shots] == ["a | b", "a {curly} thing"]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("|1|a", "must start with |0| and rise"),
        ('a{"mask_strategy": ', "one JSON object"),
        ('a{"mask_strategy": "0"}', "mask_strategy places references"),
        ('a{"reference_path": "x.png", "mask_strategy": "0,0,0,0,0"}', "mask strategy group '0,0,0,0,0'"),
        ("|0||2|b", "is empty"),
        ('a{"reference_path": "https://a.b/c.png"}', "download it first"),
    ],
)
def test_a_prompt_that_uses_the_grammar_wrongly_is_refused(prompt: str, message: str) -> None:
    with pytest.raises(StoryboardError) as caught:
        storyboard_from_prompts([prompt])
    assert message in str(caught.value)


@pytest.mark.parametrize("prompt", ["|0|a|2|b", 'a{"reference_path": "x.png"}'])
def test_a_shot_says_with_keys_what_the_grammar_says_with_marks(prompt: str) -> None:
    with pytest.raises(StoryboardError, match="give every text a shot of its own"):
        parse_storyboard({"shots": [{"prompt": prompt}]})


def test_scores_and_camera_motions_are_checked() -> None:
    film = parse_storyboard({"aesthetic_score": 6.5, "shots": [{"prompt": "a", "camera_motion": "pan left"}]})
    assert (film.aesthetic_score, film.shots[0].camera_motion) == (6.5, "pan left")
    with pytest.raises(StoryboardError, match=r"'pan lft'.*'pan left'"):
        parse_storyboard({"camera_motion": "pan lft", "shots": ["a"]})
