"""Progress of a run on a terminal, read from the files that the run writes anyway: `run.json`, codes and events.

So the view costs the run nothing, is the same for both executors, and can show a run of another process.

    segments ━━━━━━━━━━━━╸         3/5   0:21, about 0:14 left
    role     queue   done   s/segment   busy
    code         0      5        0.31     7 %
    refine       2      3        5.10    78 %
    ...
    segment   shot   colour   contrast
    2            2      1.4       -0.6

`queue`: segments that wait for the role or are being processed by it. `busy`: share of the time since the start that
the role worked.
"""

from __future__ import annotations

import json
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import safetensors
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipelines.store.run_folder import CODES_LOG_NAME, CODES_NAME, EVENTS_NAME, RunFolder, RunFolderError

ROLES = ("text", "code", "refine", "decode", "write")
SHOWN_SEGMENTS = 5
"""Number of segments whose drift is shown."""
REFRESHES_PER_SECOND = 2.0
WATCH_INTERVAL_S = 0.5


class Tail:
    """Reads the lines that were added to a log since the last time; an unfinished last line waits for the next time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield the new lines as JSON objects; if a shorter log replaced the old one, all of its lines."""
        try:
            size = self.path.stat().st_size
            if size < self._offset:
                self._offset = 0
            if size == self._offset:
                return
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            self._offset = 0
            return
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            try:
                values = json.loads(line)
            except ValueError:
                continue
            if isinstance(values, dict):
                yield values


class RunView:
    """State of a run, brought up to date by `poll`.

    Args:
        run_dir: The run folder; it may still be empty.
    """

    def __init__(self, run_dir: Path) -> None:
        self.folder = RunFolder(run_dir)
        self.segments: list[dict[str, Any]] = []
        self._events = Tail(run_dir / EVENTS_NAME)
        self._codes = Tail(run_dir / CODES_LOG_NAME)
        self._num_codes: dict[int, int] = {}
        self._codes_stamp: tuple[int, int] | None = None
        self._begin(0.0, 0)

    def _begin(self, started_s: float, committed: int) -> None:
        self.started_s, self.num_before = started_s, committed
        self.done: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self.queue: dict[str, int] = {}
        self.commit_times: deque[float] = deque(maxlen=2)
        self.first_commit_s: float | None = None
        self.num_commits = 0
        self.last: deque[dict[str, Any]] = deque(maxlen=SHOWN_SEGMENTS)
        self.has_ended = False

    def poll(self) -> list[dict[str, Any]]:
        """Read what is new on disk, and return the commits among it."""
        commits = []
        for event in self._events.lines():
            if event.get("event") == "start" or not self.segments:
                self._read_plan()
            self._take(event)
            if event.get("event") == "commit":
                commits.append(event)
        self._count_codes()
        return commits

    def _read_plan(self) -> None:
        try:
            self.segments = self.folder.read_run()["plan"]["segments"]
        except (FileNotFoundError, RunFolderError):
            self.segments = []

    def _take(self, event: Mapping[str, Any]) -> None:
        kind = event.get("event")
        if kind == "start":
            self._begin(event["time"], event.get("segments", 0))
        elif kind == "step":
            self.done[event["role"]] += 1
            self.seconds[event["role"]] += event["seconds"]
        elif kind == "queue":
            self.queue = {role: event.get(role, 0) for role in ROLES}
        elif kind == "commit":
            self.num_commits += 1
            self.first_commit_s = self.first_commit_s or event["time"]
            self.commit_times.append(event["time"])
            self.last.append(dict(event))
        elif kind in ("film", "stopped"):
            self.has_ended = True

    def _count_codes(self) -> None:
        path = self.folder.path / CODES_NAME
        try:
            stat = path.stat()
        except FileNotFoundError:
            stat = None
        if stat is not None and self._codes_stamp != (stat.st_ino, stat.st_mtime_ns):
            self._codes_stamp = stat.st_ino, stat.st_mtime_ns
            with safetensors.safe_open(path, "pt") as file:
                names = file.keys()
                self._num_codes = {int(name[len("take_") :]): file.get_slice(name).get_shape()[1] for name in names}
        for line in self._codes.lines():
            self._num_codes[line["take"]] = line["start"] + len(line["codes"])

    @property
    def num_done(self) -> int:
        """Number of segments that are committed."""
        return self.num_before + self.num_commits

    @property
    def num_with_codes(self) -> int:
        """Number of segments whose codes are stored."""
        return sum(self._num_codes.get(s["take"], 0) >= s["num_code_frames"] for s in self.segments)

    def left_s(self) -> float | None:
        """Estimate the seconds left from the pace since the first commit; None if it is not known yet."""
        if self.num_commits < 2 or self.first_commit_s is None:
            return None
        pace_s = (self.commit_times[-1] - self.first_commit_s) / (self.num_commits - 1)
        return pace_s * (len(self.segments) - self.num_done)

    def depths(self) -> dict[str, int]:
        """Count the segments that wait for each role or are being processed by it."""
        later = {role: self.queue.get(role, 0) for role in ("decode", "write")}
        with_codes = max(self.num_with_codes, self.num_done)
        refine = max(0, with_codes - self.num_done - sum(later.values()))
        return {"text": 0, "code": len(self.segments) - with_codes, "refine": refine, **later}

    def render(self, now_s: float | None = None) -> Group:
        """Draw the view for a rich console; damaged files never stop the run that it shows."""
        now_s = time.time() if now_s is None else now_s
        try:
            self.poll()
            passed_s = max(0.0, now_s - self.started_s) if self.started_s else 0.0
            return Group(self._header(passed_s), self._roles(passed_s), *([self._drift()] if self.last else []))
        except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
            return Group(Text(f"the run cannot be read at this moment: {error}"))

    def _header(self, passed_s: float) -> Table:
        total, left_s = len(self.segments), self.left_s()
        left = "" if left_s is None or self.num_done >= total else f", about {_clock(left_s)} left"
        header = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=max(1, total), completed=self.num_done, width=30)
        header.add_row("segments", bar, Text(f"{self.num_done}/{total}  {_clock(passed_s)}{left}"))
        return header

    def _roles(self, passed_s: float) -> Table:
        table, depths = Table(box=None, pad_edge=False), self.depths()
        for column in ("role", "queue", "done", "s/segment", "busy"):
            table.add_column(column, justify="left" if column == "role" else "right")
        for role in ROLES:
            count, seconds = self.done[role], self.seconds[role]
            pace = f"{seconds / count:.2f}" if count else "-"
            busy = f"{100 * seconds / passed_s:.0f} %" if count and passed_s else "-"
            table.add_row(role, str(depths[role]), str(count) if role != "text" else "-", pace, busy)
        return table

    def _drift(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for column in ("segment", "shot", "colour", "contrast"):
            table.add_column(column, justify="right")
        for event in self.last:
            shot = self.segments[event["segment"]]["shot"] + 1 if event["segment"] < len(self.segments) else "?"
            drift = event["drift"]
            table.add_row(str(event["segment"] + 1), str(shot), f"{drift['colour']:.1f}", f"{drift['contrast']:+.1f}")
        return table


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def commit_line(view: RunView, event: Mapping[str, Any]) -> str:
    """One line about a commit, for output that is not a terminal."""
    drift = event["drift"]
    return (
        f"segment {event['segment'] + 1}/{len(view.segments)}  "
        f"colour {drift['colour']:.1f}  contrast {drift['contrast']:+.1f}"
    )


@contextmanager
def live_view(run_dir: Path, console: Console | None = None) -> Iterator[RunView]:
    """Show the progress of a run on a terminal while the `with` block runs; the cursor is restored however it ends."""
    view = RunView(run_dir)
    view.poll()  # earlier commits are not new
    view._begin(0.0, 0)
    console = console or Console(stderr=True)
    with Live(
        get_renderable=view.render,
        console=console,
        refresh_per_second=REFRESHES_PER_SECOND,
        redirect_stdout=False,
        redirect_stderr=False,
    ):
        yield view


def watch(
    run_dir: Path, console: Console, *, is_running: Callable[[], bool], sleep: Callable[[float], object] = time.sleep
) -> None:
    """Show the progress of a run until the process that works on it ends.

    Args:
        run_dir: The run folder.
        console: Where to show it: a changing view on a terminal, else one line for each segment.
        is_running: Returns whether a process works on the run.
        sleep: Waits for a number of seconds.
    """
    view = RunView(run_dir)
    view.poll()
    live = Live(get_renderable=view.render, console=console, refresh_per_second=REFRESHES_PER_SECOND)
    with live if console.is_terminal else nullcontext():
        goes_on = True
        while goes_on:
            goes_on = is_running()
            if not console.is_terminal:
                for event in view.poll():
                    console.print(commit_line(view, event), markup=False, highlight=False)
            if goes_on:
                sleep(WATCH_INTERVAL_S)
