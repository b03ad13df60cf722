"""State of a run, read from its folder alone, even while another process works on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pipelines.deliver.paths import paths_of_run
from pipelines.runs.resume import find_run
from pipelines.store.lock import holder_of

State = Literal["running", "interrupted", "complete"]


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """State of a run."""

    state: State
    holder: str | None
    """Process that works on it; None if there is none."""
    num_segments: int
    num_committed: int
    num_code_frames: int
    """Code frames of the whole film."""
    num_codes_written: int
    now: str | None
    """What is being made; None if no process works on the run."""
    left_s: float | None
    """Estimate of the seconds left at the pace since the last start; None if it is not known yet."""
    drift: dict[str, float] | None
    """Drift of the segment that was committed last from the first of its shot; see `arlon.film.appearance`."""
    film: str
    """Path of the film, or of the growing one."""

    def to_plain(self) -> dict[str, Any]:
        """Convert to plain values for JSON."""
        return asdict(self)


def read_status(run_dir: str | Path) -> RunStatus:
    """Read the state of a run.

    Args:
        run_dir: The run folder, or the film beside it.

    Raises:
        UsageError: If there is no such run.
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
    events: list[Mapping[str, Any]] = []
    for event in folder.events():
        # Only what happened since a process last began to work on the run tells its pace.
        if event.get("event") == "start":
            events.clear()
        events.append(event)
    holder = holder_of(folder.path)
    paths = paths_of_run(folder.path, record["film"])
    is_published = bool(events) and events[-1]["event"] == "film" and paths.film.exists()
    state: State = "running" if holder else "complete" if is_published else "interrupted"
    segments = [s for s in plan["segments"] if s["index"] not in committed]
    times = [event["time"] for event in events if event["event"] == "commit"]
    left_s = None
    if len(times) > 1:
        left_s = round(len(segments) * (times[-1] - times[0]) / (len(times) - 1), 1)
    return RunStatus(
        state=state,
        holder=holder,
        num_segments=len(plan["segments"]),
        num_committed=len(committed),
        num_code_frames=num_code_frames,
        num_codes_written=sum(num_codes.values()),
        now=_now(segments, num_codes) if holder else None,
        left_s=left_s if holder else None,
        drift=next((event["drift"] for event in reversed(events) if event["event"] == "commit"), None),
        film=str(paths.film if is_published else paths.partial),
    )


def _now(segments: list[dict[str, Any]], num_codes: Mapping[int, int]) -> str:
    """Say what is being made.

    Args:
        segments: Segments of the plan that are not committed.
        num_codes: Code frames that are stored, by take.
    """
    if not segments:
        return "putting the film together"
    first = segments[0]
    lacks_codes = num_codes.get(first["take"], 0) < first["num_code_frames"]
    what = "writing the codes of" if lacks_codes else "making"
    return f"{what} segment {first['index']}, of shot {first['shot'] + 1}"
