"""Exceptions of Arlon: what derives from what, and how messages are worded."""

from __future__ import annotations

import pytest

from arlon import errors
from arlon.errors import ArlonError, StoryboardError, did_you_mean, indent_lines, one_line, shorten_list


@pytest.mark.parametrize("name", ["UsageError", "StoryboardError", "ConfigError", "CheckpointError", "VideoError"])
def test_bad_input_is_an_error_of_arlon_and_a_value_error(name: str) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, ArlonError)
    assert issubclass(kind, ValueError)


def test_old_places_name_the_same_classes() -> None:
    from arlon.checkpoint import CheckpointError
    from arlon.config import ConfigError
    from arlon.data.video_io import VideoError
    from arlon.film.storyboard import UsageError

    assert CheckpointError is errors.CheckpointError
    assert ConfigError is errors.ConfigError
    assert VideoError is errors.VideoError
    assert UsageError is errors.UsageError


def test_one_line_is_the_first_or_the_name_of_the_class() -> None:
    assert one_line(ValueError("\n first \nsecond")) == "first"
    assert one_line(RuntimeError()) == "RuntimeError"
    assert one_line(ValueError("abcdef"), 3) == "abc"


def test_lists_are_shortened_past_the_limit_only() -> None:
    assert shorten_list(list("abcd")) == "a, b, c, d"
    assert shorten_list(list("abcdefg"), 2, "; ") == "a; b and 5 more"
    assert shorten_list([]) == ""
    assert indent_lines(list("abc"), 2) == "  a\n  b\n  ... and 1 more"


def test_advice_is_the_nearest_name_or_all_of_them() -> None:
    assert did_you_mean("sed", ["seed", "fps"]) == "did you mean 'seed'?"
    assert did_you_mean("zzz", ["seed", "fps"]) == "choose from 'seed', 'fps'"


def test_storyboard_error_lists_its_problems() -> None:
    assert str(StoryboardError(["a is bad"], "film.yaml")) == "film.yaml: a is bad"
    many = StoryboardError([f"problem {i}" for i in range(25)])
    assert many.problems[-1] == "problem 24"
    assert str(many).splitlines()[-1] == "  ... and 5 more"
