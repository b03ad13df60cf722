"""Readers of storyboard values: what each key may hold.

A reader takes a value from YAML, JSON or an option and returns it as a storyboard stores it, or raises a ValueError
whose message continues the name of the key: "must be between 1 and 240, got 500".
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from arlon.errors import did_you_mean
from arlon.film.strict_yaml import MAX_SHOWN, shown
from arlon.text.prompts import add_scores, is_script

Transition = Literal["continue", "cut"]
Reader = Callable[[Any], Any]

MAX_DURATION_S = 3600.0
MAX_DURATION_SEGMENTS = 20_000
MAX_PROMPT_LENGTH = 2000
MAX_BLEND = 64
"""Most code frames over which one prompt passes into the next."""
MAX_SEED = 2**63 - 1
MAX_SIZE = 8192
MAX_FPS = 240.0
MAX_SCORE = 100.0
_UNITS = {"f": "frames", "frames": "frames", "segment": "segments", "segments": "segments"}
"""Units of a duration by their spelling; anything else is seconds."""


@dataclass(frozen=True, kw_only=True)
class Duration:
    """A length of time, in seconds, frames or segments: exactly one of them is set."""

    seconds: float | None = None
    frames: int | None = None
    segments: int | None = None

    def num_frames(self, fps: float) -> int:
        """Nearest number of frames at `fps`, at least 1; a length in segments has none without the grid of a model."""
        return self.frames if self.frames is not None else max(1, round((self.seconds or 0.0) * fps))

    def to_plain(self) -> float | str:
        """Value as written in a storyboard file: 4.5, "36f" or "2 segments"."""
        if self.segments is not None:
            return f"{self.segments} segments"
        return f"{self.frames}f" if self.frames is not None else float(self.seconds or 0.0)


def parse_duration(value: Any) -> Duration:
    """Read a duration: a number or "4.5" or "4.5s" in seconds, "36f" in frames, "2 segments".

    Raises:
        ValueError: If the value is not a duration, not positive, or longer than an hour.
    """
    match = re.fullmatch(r"\s*([^\s]+?)\s*(s|f|frames|segments?)?\s*", str(value).lower())
    try:
        if isinstance(value, bool) or match is None:
            raise ValueError
        number = float(match[1])
        unit = _UNITS.get(match[2], "seconds")
        if unit != "seconds" and not number.is_integer():
            raise ValueError
    except (ValueError, OverflowError):
        raise ValueError(
            f'must be seconds such as 4.5, frames such as "36f", or "2 segments", got {shown(value)}'
        ) from None
    if not number > 0:
        raise ValueError(f"must be more than 0, got {shown(value)}")
    if unit == "segments":
        if number > MAX_DURATION_SEGMENTS:
            raise ValueError(f"must be at most {MAX_DURATION_SEGMENTS} segments, got {shown(value)}")
        return Duration(segments=int(number))
    if number > (MAX_DURATION_S * MAX_FPS if unit == "frames" else MAX_DURATION_S):
        raise ValueError(f"must be at most one hour ({MAX_DURATION_S:.0f} s), got {shown(value)}")
    return Duration(frames=int(number)) if unit == "frames" else Duration(seconds=number)


def _number(low: float, high: float) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"must be a number, got {shown(value)}")
        if not low <= value <= high:
            raise ValueError(f"must be between {low:g} and {high:g}, got {shown(value)}")
        return float(value)

    return read


def _whole(low: int, high: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"must be a whole number, got {shown(value)}")
        if not low <= value <= high:
            raise ValueError(f"must be between {low} and {high}, got {shown(value)}")
        return value

    return read


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, got {shown(value)}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be text, got {shown(value)}")
    text = " ".join(value.split())
    if len(text) > MAX_PROMPT_LENGTH:
        raise ValueError(f"must have at most {MAX_PROMPT_LENGTH} characters, got {len(text)}")
    strange = next((char for char in text if unicodedata.category(char) in ("Cc", "Cs")), None)
    if strange is not None:
        raise ValueError(f"holds the control character U+{ord(strange):04X}: remove it")
    return text


def _prompt(value: Any) -> str:
    text = _text(value)
    if not text:
        raise ValueError("is empty: say what the shot shows")
    return text


def _shot_prompt(value: Any) -> str:
    text = _prompt(value)
    if is_script(text):
        raise ValueError(
            "holds segment marks or references of Open-Sora: give every text a shot of its own with `duration: 2 "
            "segments`, files in `references` and their places in `mask_strategy`"
        )
    return text


def _file_names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"must be a list of files, got {shown(value)}")
    return tuple(_file_name(name) for name in value)


def _mask_strategy(value: Any) -> str:
    from arlon.diffusion.references import parse_mask_strategy

    text = _text(str(value) if isinstance(value, int) and not isinstance(value, bool) else value)
    parse_mask_strategy(text)
    return text


def _camera_motion(value: Any) -> str:
    text = _prompt(value)
    add_scores("", camera=text)
    return text


def _file_name(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ValueError(f"must be the path of a file, got {shown(value)}")
    if re.match(r"\s*[a-z][a-z0-9+.-]+://", value, re.IGNORECASE):
        raise ValueError(f"must be the path of a file, got {shown(value)}: download it first")
    return value


def _aspect(value: Any) -> str:
    from arlon.data.aspect import aspect_ratio

    aspect_ratio(_prompt(value))
    return _prompt(value)


def _resolution(value: Any) -> str:
    from arlon.data.aspect import PIXEL_BUDGETS

    name = str(value) if isinstance(value, int) and not isinstance(value, bool) else _prompt(value)
    if name not in PIXEL_BUDGETS:
        raise ValueError(f"must be one of {', '.join(PIXEL_BUDGETS)}, got {shown(name)}")
    return name


def _transition(value: Any) -> str:
    if value not in get_args(Transition):
        raise ValueError(f"must be 'continue' or 'cut', got {shown(value)}")
    return value


def _film_seed(value: Any) -> int | None:
    seed = _whole(-1, MAX_SEED)(value)
    return None if seed == -1 else seed


SHOT_READERS: dict[str, Reader] = {
    "prompt": _shot_prompt,
    "duration": parse_duration,
    "transition": _transition,
    "blend": _whole(0, MAX_BLEND),
    "seed": _whole(0, MAX_SEED),
    "guidance_scale": _number(0.0, 100.0),
    "image": _file_name,
    "end_image": _file_name,
    "video": _file_name,
    "references": _file_names,
    "mask_strategy": _mask_strategy,
    "camera_motion": _camera_motion,
    "notes": _text,
}
FILM_READERS: dict[str, Reader] = {
    "seed": _film_seed,
    "fps": _number(1.0, MAX_FPS),
    "height": _whole(2, MAX_SIZE),
    "width": _whole(2, MAX_SIZE),
    "model": _prompt,
    "negative_prompt": _text,
    "guidance_scale": _number(0.0, 100.0),
    "num_inference_steps": _whole(1, 1000),
    "solver": _prompt,
    "aspect": _aspect,
    "resolution": _resolution,
    "use_codes": _flag,
    "segment": _whole(1, MAX_DURATION_SEGMENTS),
    "overlap": _whole(1, MAX_DURATION_SEGMENTS),
    "aesthetic_score": _number(0.0, MAX_SCORE),
    "motion_score": _number(0.0, MAX_SCORE),
    "camera_motion": _camera_motion,
}


def read_values(
    data: Mapping[Any, Any],
    readers: Mapping[str, Reader],
    problems: list[str],
    *,
    prefix: str = "",
    also: Collection[str] = (),
) -> dict[str, Any]:
    """Read the known keys of a mapping, and collect what is wrong with it.

    Args:
        data: Values from YAML or JSON; None counts as not given.
        readers: Readers by the keys they read.
        problems: List to which one sentence for each problem is appended.
        prefix: Text before the names of keys in problems.
        also: Keys that are known, but read elsewhere.

    Returns:
        The values that could be read.
    """
    known = {*readers, *also}
    values = {}
    for key, value in data.items():
        if key not in known:
            name = key if str(key).isprintable() and len(str(key)) <= MAX_SHOWN else shown(key)
            problems.append(f"{prefix}{name}: unknown key; {did_you_mean(str(key), sorted(known))}")
        elif key in readers and value is not None:
            try:
                values[key] = readers[key](value)
            except ValueError as error:
                problems.append(f"{prefix}{key} {error}")
        elif key in readers and key in ("prompt", "duration"):
            problems.append(f"{prefix}{key} is empty")
    return values
