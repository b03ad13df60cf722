"""Storyboards: what one says in plain values, JSON or YAML is read back as the same film."""

from __future__ import annotations

import json
from typing import Any

import yaml
from hypothesis import given
from hypothesis import strategies as st

from arlon.film.storyboard import Storyboard, StoryboardError, parse_storyboard, with_overrides
from arlon.film.storyboard_values import MAX_DURATION_S, Duration, parse_duration
from arlon.film.strict_yaml import parse_json, parse_yaml
from tests.properties.films import durations, films, storyboards


@given(storyboards)
def test_plain_values_are_read_back(storyboard: Storyboard) -> None:
    plain = storyboard.to_plain()
    assert parse_storyboard(plain) == storyboard
    assert parse_storyboard(plain).to_plain() == plain


@given(storyboards)
def test_files_are_read_back(storyboard: Storyboard) -> None:
    plain = storyboard.to_plain()
    assert parse_storyboard(parse_json(json.dumps(plain))) == storyboard
    assert parse_storyboard(parse_yaml(yaml.safe_dump(plain, allow_unicode=True))) == storyboard


@given(storyboards, st.integers(0, 2**31), st.integers(1, 1000))
def test_overrides_replace_what_they_name_and_nothing_else(storyboard: Storyboard, seed: int, steps: int) -> None:
    changed = with_overrides(storyboard, {"seed": seed, "num_inference_steps": steps, "fps": None})
    assert changed.to_plain() == storyboard.to_plain() | {"seed": seed, "num_inference_steps": steps}


@given(durations)
def test_a_duration_is_read_back_and_has_a_frame_at_least(value: Any) -> None:
    duration = parse_duration(value)
    assert parse_duration(duration.to_plain()) == duration
    assert [duration.seconds, duration.frames, duration.segments].count(None) == 2
    if duration.segments is None:
        assert duration.num_frames(fps=1.0) >= 1


@given(st.floats(1e-3, MAX_DURATION_S), st.floats(1, 240))
def test_seconds_become_the_nearest_number_of_frames(seconds: float, fps: float) -> None:
    found = Duration(seconds=seconds).num_frames(fps)
    assert found == 1 or abs(found - seconds * fps) <= 0.5


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(anything | films.flatmap(lambda film: st.sampled_from(sorted(film)).flatmap(lambda key: spoilt(film, key))))
def test_any_values_make_a_film_or_one_error_that_lists_sentences(data: Any) -> None:
    problems: tuple[str, ...] = ()
    try:
        shots = parse_storyboard(data).shots
    except StoryboardError as error:
        shots, problems = (), error.problems
    assert bool(shots) != bool(problems)
    assert all(problem and "\n" not in problem for problem in problems)


def spoilt(film: dict[str, Any], key: str) -> st.SearchStrategy[dict[str, Any]]:
    """The film with anything at all under a key."""
    return anything.map(lambda value: {**film, key: value})
