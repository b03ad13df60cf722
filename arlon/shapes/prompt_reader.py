"""Parser of prompts of the shapes world: objects and background that a prompt asks for.

The grammar is that of `arlon.shapes.captions`, every phrasing of it. A prompt with a single word more is not understood
at all: a partly understood prompt would give a misleading score, so it gives none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from arlon.shapes import captions, world

_TEMPLATES = (*captions.TEMPLATES, *captions.HELD_OUT_TEMPLATES, "and")
_FILLERS = {part.strip() for template in _TEMPLATES for part in re.split(r"\{\w+\}|,", template)} - {""}
"""Words of captions other than objects and background."""


@dataclass(frozen=True, kw_only=True)
class AskedObject:
    """An object as a prompt describes it; None for what the prompt leaves open."""

    colour: str
    shape: str
    size: str | None = None
    motion: str | None = None
    speed: str | None = None


@dataclass(frozen=True, kw_only=True)
class AskedShot:
    """Contents that a prompt asks for; `background` is None if the prompt leaves it open."""

    objects: tuple[AskedObject, ...]
    background: str | None = None


def read_prompt(prompt: str) -> AskedShot | None:
    """Read a prompt.

    Args:
        prompt: Text; case and white space do not matter.

    Returns:
        What it asks for; None if any part of it is not of the grammar, or it names no object.
    """
    text = " ".join(prompt.lower().rstrip(". ").split())
    objects = [_to_object(match) for match in _object_pattern().finditer(text)]
    rest = _object_pattern().sub(" ", text)
    backgrounds = {_background_of()[match[0]] for match in _background_pattern().finditer(rest)}
    rest = _background_pattern().sub(" ", rest)
    rest = re.sub(rf"\b(?:{'|'.join(_FILLERS)})\b|,", " ", rest)
    if not objects or rest.strip() or len(backgrounds) > 1:
        return None
    return AskedShot(objects=tuple(objects), background=next(iter(backgrounds), None))


def _to_object(match: re.Match[str]) -> AskedObject:
    said = match.groupdict()
    named = {name: _values()[name].get(said[name]) for name in ("size", "motion", "speed")}
    return AskedObject(colour=said["colour"], shape=said["shape"], **named)


@lru_cache(maxsize=1)
def _values() -> Mapping[str, Mapping[str | None, str]]:
    """Phrase to value, for each attribute that has phrases."""
    tables = {
        "size": (captions.SIZE_PHRASES,),
        "motion": (captions.MOTION_PHRASES, captions.HELD_OUT_MOTION_PHRASES),
        "speed": (captions.SPEED_PHRASES, captions.HELD_OUT_SPEED_PHRASES),
    }
    return {name: _by_phrase(*phrases) for name, phrases in tables.items()}


@lru_cache(maxsize=1)
def _background_of() -> Mapping[str | None, str]:
    return _by_phrase(captions.BACKGROUND_PHRASES, captions.HELD_OUT_BACKGROUND_PHRASES)


def _by_phrase(*tables: captions.Phrases) -> dict[str | None, str]:
    return {phrase: value for table in tables for value, phrases in table.items() for phrase in phrases}


@lru_cache(maxsize=1)
def _object_pattern() -> re.Pattern[str]:
    values = _values()
    return re.compile(
        rf"\b(?:an?|the) (?:(?P<size>{_any(values['size'])}) )?"
        rf"(?P<colour>{_any(world.COLOURS)}) (?P<shape>{_any(world.SHAPES)})\b"
        rf"(?: (?P<motion>{_any(values['motion'])})\b)?(?: (?P<speed>{_any(values['speed'])})\b)?"
    )


@lru_cache(maxsize=1)
def _background_pattern() -> re.Pattern[str]:
    return re.compile(rf"\b(?:{_any(_background_of())})\b")


def _any(phrases: Iterable[str | None]) -> str:
    """Any of some phrases, the longest that fits."""
    return "|".join(re.escape(phrase) for phrase in sorted(filter(None, phrases), key=len, reverse=True))
