"""What the options of the command line say about a film: a storyboard, and settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from arlon.data.aspect import NUM_FRAMES
from arlon.errors import did_you_mean
from arlon.film.settings import Settings
from arlon.film.storyboard import (
    Storyboard,
    StoryboardError,
    UsageError,
    load_storyboard,
    storyboard_from_prompts,
    with_overrides,
    with_shot,
)
from arlon.film.storyboard_values import parse_duration
from arlon.film.strict_yaml import parse_yaml, shown


@dataclass(frozen=True, kw_only=True)
class FilmOptions:
    """The options that say what film is meant."""

    prompts: list[str]
    storyboard: Path | None
    seed: int | None
    duration: str | None
    transition: str
    values: dict[str, Any]
    """Film-level values and settings given one by one; None: not given."""
    assignments: list[str]
    """`key=value` of --set."""
    image: Path | None = None
    """Of the first shot."""
    end_image: Path | None = None
    """Of the last shot."""
    video: Path | None = None
    """Of the first shot."""


def shot_length(duration: str | None, num_frames: str | None) -> str | None:
    """Length of shots that give none, from the two options that say it.

    Raises:
        UsageError: If both do, or --num-frames is no number of frames.
    """
    if num_frames is None:
        return duration
    if duration is not None:
        raise UsageError("give either --duration or --num-frames, not both")
    named = {name: frames for name, frames in NUM_FRAMES.items() if name.endswith("x")}
    if num_frames not in named and not num_frames.isdecimal():
        raise UsageError(f"--num-frames must be a whole number or one of {', '.join(named)}, got '{num_frames}'")
    return f"{named.get(num_frames, num_frames)}f"


def read_film_options(options: FilmOptions) -> tuple[Storyboard, dict[str, Any]]:
    """The storyboard that the options describe, and the settings among them.

    Raises:
        UsageError: If they are contradictory or wrong.
    """
    if options.storyboard and options.prompts:
        raise UsageError("give either --storyboard or --prompt, not both")
    if not options.storyboard and not options.prompts:
        raise UsageError("no prompt: give --prompt 'a red circle moves left', or --storyboard film.yaml")
    try:
        duration = None if options.duration is None else parse_duration(options.duration)
    except ValueError as error:
        raise StoryboardError([f"--duration {error}"], "options") from error
    if options.storyboard:
        film = load_storyboard(options.storyboard, default_duration=duration)
    else:
        film = storyboard_from_prompts(options.prompts, duration=duration, transition=options.transition)
    film_values, settings = sorted_values(options)
    return _with_references(with_overrides(film, film_values), options), settings


def _with_references(film: Storyboard, options: FilmOptions) -> Storyboard:
    """The film with the files that options give to its ends."""
    given = {0: {"image": options.image, "video": options.video}}
    given.setdefault(len(film.shots) - 1, {})["end_image"] = options.end_image
    for index, paths in given.items():
        film = with_shot(film, index, {kind: None if path is None else str(path) for kind, path in paths.items()})
    return film


def sorted_values(options: FilmOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values given one by one and by --set, as (film-level values, settings).

    Raises:
        UsageError: If a key is unknown.
    """
    given = {name: value for name, value in options.values.items() if value is not None}
    film, settings = read_assignments(options.assignments, given)
    return (film if options.seed is None else film | {"seed": options.seed}), settings


def read_assignments(
    assignments: Sequence[str], given: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`key=value` of --set on top of values given otherwise, as (film-level values, settings).

    Raises:
        UsageError: If a key is unknown.
    """
    film_keys = {field.name for field in fields(Storyboard)} - {"shots", "model"}
    setting_keys = {field.name for field in fields(Settings)}
    given = dict(given or {})
    for text in assignments:
        key, value = _assignment(text)
        if key not in film_keys | setting_keys:
            raise UsageError(f"--set {key}: unknown key; {did_you_mean(key, sorted(film_keys | setting_keys))}")
        if value is None:
            raise UsageError(f"--set {key}: no value given; leave it out to take the model's own")
        given[key] = value
    film = {name: value for name, value in given.items() if name in film_keys}
    return film, {name: value for name, value in given.items() if name in setting_keys}


def _assignment(text: str) -> tuple[str, Any]:
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise UsageError(f"--set needs KEY=VALUE, got {shown(text)}")
    try:
        return key.strip(), parse_yaml(value)
    except ValueError as error:
        raise UsageError(f"--set {key.strip()}: cannot read the value {shown(value)}") from error
