"""What a film was made from, read from the film alone or from its run folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arlon.film.container import read_film_record
from pipelines.store.run_folder import RunFolder

_RUN_ONLY = ("plan", "film", "stale")


def inspect_film(path: str | Path) -> dict[str, Any]:
    """Read the record of a film: storyboard with seeds, model, settings, timeline.

    Args:
        path: A film, finished or not, or a run folder, whose record has the timings and kept versions too.

    Raises:
        FileNotFoundError: If there is no film or run.
        VideoError: If the film has no record.
        RunFolderError: If the run folder is damaged.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        return read_film_record(path)
    folder = RunFolder(path)
    record = {name: value for name, value in folder.read_run().items() if name not in _RUN_ONLY}
    spent_s: Counter[str] = Counter()
    for event in folder.events():
        if event.get("event") == "step":
            spent_s[event["role"]] += event["seconds"]
    timings = {role: round(seconds, 3) for role, seconds in spent_s.items()}
    return record | {"timings_s": timings, "kept_versions": folder.num_versions()}


def shot_rows(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """Rows to print, one for each shot: where it is, its seed, its prompt.

    Raises:
        ValueError: If the record lacks what a film of this program has, since any program may write into a film.
    """
    try:
        board, timeline = record["storyboard"], record["timeline"]
        shots = enumerate(zip(board["shots"], timeline["shots"], strict=True), start=1)
        return [
            {
                "shot": str(number),
                "join": "start" if number == 1 else str(span["transition"]),
                "start": f"{span['start_frame'] / timeline['fps']:.2f} s",
                "length": f"{span['num_frames'] / timeline['fps']:.2f} s",
                "seed": str(shot.get("seed", board["seed"])),
                "prompt": str(shot["prompt"]),
            }
            for number, (shot, span) in shots
        ]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(f"the record is damaged or was changed: {type(error).__name__} {error}") from error
