"""What a film was made from, told by the film alone or by its run folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from arlon.film.container import read_film_record
from pipelines.store.run_folder import RunFolder

_RUN_ONLY = ("plan", "film", "stale")


def inspect_film(path: str | Path) -> dict[str, Any]:
    """The record of a film: storyboard with seeds, model, settings, timeline; of a run, also its timings and versions.

    Args:
        path: A film, finished or not, or a run folder.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If the film says nothing about itself, or the run folder is damaged.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        return read_film_record(path)
    folder = RunFolder(path)
    record = {name: value for name, value in folder.read_run().items() if name not in _RUN_ONLY}
    timings = sum_timings(folder.events())
    return record | {"timings_s": timings, "kept_versions": folder.num_versions()}


def sum_timings(events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of each role over all segments that were ever made in a run."""
    total: Counter[str] = Counter()
    for event in events:
        if event.get("event") == "step":
            total[event["role"]] += event["seconds"]
    return {role: round(seconds, 3) for role, seconds in total.items()}


def shot_rows(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row for every shot: where it is, its seed, its prompt.

    Raises:
        ValueError: If the record lacks what a film of this program has: anyone may write into a film.
    """
    try:
        return _shot_rows(record)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(f"the record is damaged or was changed: {type(error).__name__} {error}") from error


def _shot_rows(record: Mapping[str, Any]) -> list[dict[str, str]]:
    board, timeline = record["storyboard"], record["timeline"]
    rows = []
    for number, (shot, span) in enumerate(zip(board["shots"], timeline["shots"], strict=True), start=1):
        rows.append(
            {
                "shot": str(number),
                "join": "start" if number == 1 else str(span["transition"]),
                "start": f"{span['start_frame'] / timeline['fps']:.2f} s",
                "length": f"{span['num_frames'] / timeline['fps']:.2f} s",
                "seed": str(shot.get("seed", board["seed"])),
                "prompt": str(shot["prompt"]),
            }
        )
    return rows
