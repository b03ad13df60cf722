"""The prompt grammar of Open-Sora v1.2: loop prompts, references in a JSON tail, score suffixes.

    |0|a calm sea|2|a storm{"reference_path": "sea.png;storm.mp4", "mask_strategy": "0;2,1,-5,0,5"}

A loop of the original is a segment here. At inference a text goes through `parse_prompt`, then each of its texts
through `add_scores`, then through `arlon.text.cleaning` (an encoder that needs it cleans by itself). Prompts without
segment marks and without `{"` are plain text.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import pairwise

from arlon.errors import did_you_mean

CAMERA_MOTIONS = ("pan left", "pan right", "tilt up", "tilt down", "zoom in", "zoom out", "static")
"""Camera motions the training captions of the released model name; few clips have one."""
_TAIL_KEYS = ("reference_path", "mask_strategy")
_SEGMENT_MARK = re.compile(r"\|\s*(\d+)\s*\|")
_TAIL_START = re.compile(r"\{\s*\"")


@dataclass(frozen=True, kw_only=True)
class PromptScript:
    """A parsed prompt: its texts, segment after segment, and the files it refers to."""

    texts: tuple[tuple[int, str], ...]
    """Pairs (first segment, text), the first from segment 0 on, each until the next."""
    reference_paths: tuple[str, ...] = ()
    """Files or addresses of reference images and videos, in the order the mask strategy counts them."""
    mask_strategy: str = ""
    """Places of the references; see `arlon.diffusion.references.parse_mask_strategy`."""

    def at(self, segment: int) -> str:
        """The text of a segment; the last one holds to the end."""
        if segment < 0:
            raise ValueError(f"segments count from 0, got {segment}")
        return next(text for first, text in reversed(self.texts) if first <= segment)


def is_script(text: str) -> bool:
    """Whether a text uses the grammar: it starts with a segment mark, or holds the beginning of a JSON object."""
    return bool(_SEGMENT_MARK.match(text.lstrip()) or _TAIL_START.search(text))


def parse_prompt(text: str) -> PromptScript:
    """Read a prompt: plain, or with texts by segment and a JSON tail.

    Args:
        text: The prompt. The first `{` starts the tail, an object with `reference_path` (files, separated by `;`)
            and `mask_strategy`. A text that starts with `|0|` names the segment from which each part holds.

    Raises:
        ValueError: If the tail is not such an object, or the segments do not start at 0 and rise.
    """
    head, brace, tail = text.partition("{")
    values = _parse_tail(brace + tail) if brace else {}
    paths = tuple(path.strip() for path in values.get("reference_path", "").split(";"))
    return PromptScript(
        texts=_parse_segments(head),
        reference_paths=tuple(path for path in paths if path),
        mask_strategy=values.get("mask_strategy", ""),
    )


def _parse_tail(tail: str) -> dict[str, str]:
    try:
        values = json.loads(tail)
    except ValueError:
        raise ValueError(
            f"'{{' starts the references of a prompt, which must be one JSON object with {' and '.join(_TAIL_KEYS)}, "
            f"got {tail!r}"
        ) from None
    for key, value in values.items():
        if key not in _TAIL_KEYS:
            raise ValueError(f"unknown key {key!r} after the prompt, {did_you_mean(str(key), _TAIL_KEYS)}")
        if not isinstance(value, str):
            raise ValueError(f"{key} after the prompt must be text, got {value!r}")
    return values


def _parse_segments(text: str) -> tuple[tuple[int, str], ...]:
    if not _SEGMENT_MARK.match(text.lstrip()):
        return ((0, text),)
    # Splitting at marks with one group gives: before the first mark, number, text, number, text ...
    _, *parts = _SEGMENT_MARK.split(text)
    segments = [int(number) for number in parts[::2]]
    if segments[0] != 0 or not all(a < b for a, b in pairwise(segments)):
        raise ValueError(f"the segments of a prompt must start with |0| and rise, got {segments} in {text!r}")
    return tuple(zip(segments, (part.strip() for part in parts[1::2]), strict=True))


def add_scores(
    prompt: str, *, aesthetic: float | None = None, motion: float | None = None, camera: str | None = None
) -> str:
    """Say the quality that is wanted in the words of the training captions, unless the prompt says it already.

    Args:
        prompt: One text.
        aesthetic: Aesthetic score, about 4 to 7; released samples use 6.5.
        motion: Motion score; about 5 is calm.
        camera: One of `CAMERA_MOTIONS`.

    Returns:
        The prompt, with such as ` aesthetic score: 6.5. motion score: 5.0. camera motion: pan left.` after it.

    Raises:
        ValueError: If the camera motion is unknown.
    """
    if camera is not None and camera not in CAMERA_MOTIONS:
        raise ValueError(f"unknown camera motion {camera!r}, {did_you_mean(camera, CAMERA_MOTIONS)}")
    wanted = {
        "aesthetic score:": None if aesthetic is None else f"{aesthetic:.1f}",
        "motion score:": None if motion is None else f"{motion:.1f}",
        "camera motion:": camera,
    }
    said = prompt.lower()
    new = (f" {tag} {value}." for tag, value in wanted.items() if value is not None and tag not in said)
    return prompt + "".join(new)
