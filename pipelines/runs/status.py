"""Where a run stands, seen from outside: from its folder alone, while another process works on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pipelines.deliver.paths import paths_of_run
from pipelines.runs.resume import find_run
from pipelines.store.lock import holder_of

State = Literal["running", "interrupted", "complete"]


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """Where a run stands."""

    state: State
    holder: str | None
    """Who works on it."""
    num_segments: int
    num_committed: int
    num_code_frames: int
    """Code frames of the whole film."""
    num_codes_written: int
    now: str | None
    """What is made at this moment."""
    left_s: float | None
    """Estimate of the time left at the pace since the last start; None: not known yet."""
    drift: dict[str, float] | None
    """Of the segment that was committed last, from the first of its shot; see `arlon.film.appearance`."""
    film: str
    """Where the film is, or is going to be."""

    def to_plain(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def read_status(run_dir: str | Path) -> RunStatus:
    """Where a run stands.

    Raises:
        UsageError: If this is no run folder.
        RunFolderError: If it is damaged.
    """
    folder = find_run(run_dir)
    record = folder.read_run()
    plan, committed = record["plan"], set(folder.committed_indices())
    try:
        num_codes = {take: codes.shape[1] for take, codes in folder.read_codes().items()}
    except FileNotFoundError:
        num_codes = {}
    num_code_frames = sum(take["num_code_frames"] for take in plan["takes"])
    events = list(_since_start(folder.events()))
    holder = holder_of(folder.path)
    paths = paths_of_run(folder.path, record["film"])
    is_published = bool(events) and events[-1]["event"] == "film" and paths.film.exists()
    state: State = "running" if holder else "complete" if is_published else "interrupted"
    segments = [s for s in plan["segments"] if s["index"] not in committed]
    return RunStatus(
        state=state,
        holder=holder,
        num_segments=len(plan["segments"]),
        num_committed=len(committed),
        num_code_frames=num_code_frames,
        num_codes_written=sum(num_codes.values()),
        now=_now(segments, num_codes) if holder else None,
        left_s=_left_s(events, len(segments)) if holder else None,
        drift=next((event["drift"] for event in reversed(events) if event["event"] == "commit"), None),
        film=str(paths.film if is_published else paths.partial),
    )


def _since_start(events: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The events since a process last began to work on the run."""
    last: list[Mapping[str, Any]] = []
    for event in events:
        last = [event] if event.get("event") == "start" else [*last, event]
    return last


def _now(segments: list[dict[str, Any]], num_codes: Mapping[int, int]) -> str:
    """What is made, given the segments that are not committed and the code frames there are, by take."""
    if not segments:
        return "putting the film together"
    first = segments[0]
    lacks_codes = num_codes.get(first["take"], 0) < first["num_code_frames"]
    what = "writing the codes of" if lacks_codes else "making"
    return f"{what} segment {first['index']}, of shot {first['shot'] + 1}"


def _left_s(events: list[Mapping[str, Any]], num_left: int) -> float | None:
    times = [event["time"] for event in events if event["event"] == "commit"]
    return round(num_left * (times[-1] - times[0]) / (len(times) - 1), 1) if len(times) > 1 else None
