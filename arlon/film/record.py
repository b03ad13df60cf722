"""The record of a film: everything it was made from, as plain values that travel inside the film.

A record names no path of the machine that made it, and is enough to make the film again. It is stored as JSON under the
tag `comment`: of the tags that a program may choose, this is the one that other programs keep when they copy a film
into another container.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from arlon.film.plan import Plan
from arlon.film.settings import Settings
from arlon.version import version

RECORD_FORMAT = 1
RECORD_TAG = "comment"


def film_record(
    plan: Plan, identity: Mapping[str, str], settings: Settings, *, arlon_version: str | None = None
) -> dict[str, Any]:
    """Describe what a film is made from.

    Args:
        plan: Plan of the film.
        identity: Name and content hash of the model.
        settings: How the film is computed.
        arlon_version: Version to name as its maker. Default: the one that runs.
    """
    # The timeline repeats what players and `arlon inspect` need; takes and segments follow from the storyboard.
    timeline = {name: value for name, value in plan.to_plain().items() if name not in ("takes", "segments")}
    timeline["segment_starts"] = [segment.start_frame for segment in plan.segments]
    return {
        "format": RECORD_FORMAT,
        "arlon": version() if arlon_version is None else arlon_version,
        "storyboard": plan.storyboard.to_plain(),
        "model": dict(identity),
        "settings": settings.to_plain(),
        "timeline": timeline,
    }


def film_tags(record: Mapping[str, Any], title: str) -> dict[str, str]:
    """Tags of a film that carry its record; `title` is what players show."""
    return {"title": title, RECORD_TAG: json.dumps(record, ensure_ascii=False, separators=(",", ":"))}


def parse_record(text: str) -> dict[str, Any] | None:
    """Read the record in a text; None if the text is something else, as the comment of any other video is."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) and "storyboard" in values else None
