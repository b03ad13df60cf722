"""Making a film on disk: run an executor under the lock of the run, and put the finished film in its place.

`pipelines.runs.prepare` does all the checks before; `pipelines.runs.resume` continues a film.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from arlon.errors import UsageError
from arlon.files import make_folder, write_json
from arlon.film.container import finalise
from arlon.film.encode_media import encode_references
from arlon.film.messages import Committed, WriteResult
from arlon.film.plan import Plan
from arlon.film.take_media import take_media
from pipelines.deliver.hls import remove_stream
from pipelines.runs.prepare import Prepared
from pipelines.runs.run_record import run_record
from pipelines.store.lock import RunLock
from pipelines.store.run_folder import RunFolder

if TYPE_CHECKING:
    from arlon.film.make import WorkerSource
    from pipelines.executors.ray_graph import GraphConfig

Executor = Literal["local", "ray"]

Begin = Callable[[Prepared, str], Committed]
"""Makes a run folder ready for an executor, under the lock of the run, and returns what the folder holds already."""


@dataclass(frozen=True, kw_only=True)
class FilmProgress:
    """State of a film after a segment was stored."""

    done: int
    """Segments stored, including those of earlier runs."""
    total: int
    """Segments of the film."""
    result: WriteResult
    prompt: str
    """Prompt of the shot that the segment belongs to."""
    elapsed_s: float
    left_s: float
    """Estimate of the time left, from the pace of the segments so far."""


@dataclass(frozen=True, kw_only=True)
class FilmResult:
    """A finished film."""

    film: Path
    sidecar: Path | None
    """JSON file beside the film that says what it was made from; None if that was not to be stored."""
    run_dir: Path
    seed: int
    num_frames: int
    duration_s: float
    elapsed_s: float
    num_made: int
    """Segments made; the others were in the run folder."""
    first_segment_s: float
    """Seconds from the start until the first new segment could be played; 0 if none was made."""
    steps_s: dict[str, float]
    """Seconds in each step, summed over the segments made; with the ray executor steps overlap."""
    film_hash: str
    """SHA-256 of the film."""

    def to_plain(self) -> dict[str, Any]:
        """Convert to plain values for JSON."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}


def start_run(prepared: Prepared, executor: str) -> Committed:
    """Make the run folder ready for a new film, in place of whatever run was there."""
    prepared.paths.sweep()
    tensors = encode_references(prepared.job, prepared.references)
    remove_stream(prepared.paths.hls)
    RunFolder(prepared.paths.run_dir).start(run_record(prepared, executor), tensors)
    return Committed(media=take_media(prepared.plan, tensors))


def generate(
    prepared: Prepared,
    *,
    begin: Begin = start_run,
    executor: Executor = "local",
    address: str | None = None,
    graph: GraphConfig | None = None,
    worker: WorkerSource | None = None,
    on_progress: Callable[[FilmProgress], None] | None = None,
) -> FilmResult:
    """Make a film.

    If this is interrupted or fails, the codes and segments made so far stay in the run folder, from which
    `pipelines.runs.resume` continues, and the segments stay in the partial film. If there are none, nothing stays.

    Args:
        prepared: The film.
        begin: Makes the run folder ready. Default: for a new film.
        executor: `local`, or `ray` for the same film with its steps in parallel.
        address: Ray cluster to join.
        graph: Actors of each role of the ray executor.
        worker: Source of the workers of the local executor, such as `arlon.film.make.KeptWorkers`.
            Default: new workers.
        on_progress: Called after every segment made.

    Raises:
        UsageError: If the executor is unknown.
        RunLockedError: If another process works on the run.
        ValueError, OSError, RuntimeError: If the work fails.
    """
    started_s = time.perf_counter()
    if executor not in get_args(Executor):
        raise UsageError(f"unknown executor {executor!r}, choose 'local' or 'ray'")
    if executor == "ray" and importlib.util.find_spec("ray") is None:
        raise UsageError("the ray executor needs Ray: pip install 'arlon[ray]'")
    folder = RunFolder(prepared.paths.run_dir)
    make_folder(folder.path)
    with RunLock(folder.path):
        committed = begin(prepared, executor)
        folder.log("start", executor=executor, segments=len(committed.segments))
        tally = _Tally(prepared.plan, committed, started_s)
        segments = _execute(prepared, committed, executor, address, graph, worker)
        try:
            for result in segments:
                progress = tally.add(result)
                if on_progress is not None:
                    on_progress(progress)
        except BaseException as error:
            with suppress(OSError):  # an error while clearing up must not hide the one that matters
                segments.close()
                folder.log("stopped", reason=type(error).__name__, segments=tally.done)
                if not tally.done:
                    prepared.paths.partial.unlink(missing_ok=True)
                if not folder.holds_work():
                    folder.discard()
            raise
        return _finish(prepared, folder, tally)


def _execute(
    prepared: Prepared,
    committed: Committed,
    executor: Executor,
    address: str | None,
    graph: GraphConfig | None,
    worker: WorkerSource | None,
) -> Generator[WriteResult, None, None]:
    # Both load networks and their libraries; the one that is not used need not be installed.
    if executor == "local":
        from arlon.film.make import new_worker
        from pipelines.executors.local import run_local

        return run_local(prepared.job, prepared.output, committed, worker=worker or new_worker)
    from pipelines.executors.ray_graph import run_graph

    return run_graph(prepared.job, prepared.output, committed, address=address, config=graph)


class _Tally:
    """Running sums over the segments made, so that a long film needs no list of them."""

    def __init__(self, plan: Plan, committed: Committed, started_s: float) -> None:
        self.plan, self.started_s = plan, started_s
        self.done, self.num_made = len(committed.segments), 0
        self.left_frames = plan.num_frames - sum(plan.segments[index].num_frames for index in committed.segments)
        self.first_segment_s = 0.0
        self.steps_s: dict[str, float] = {}
        self._frames_since_first = 0

    def add(self, result: WriteResult) -> FilmProgress:
        """Count a segment.

        The time left is estimated for the frames to come at the pace since the first segment, because the time of the
        first segment includes the start-up.
        """
        elapsed_s = time.perf_counter() - self.started_s
        segment, prompts = result.segment, self.plan.storyboard.shots
        for step, seconds in result.elapsed_s.items():
            self.steps_s[step] = self.steps_s.get(step, 0.0) + seconds
        self.done += 1
        self.num_made += 1
        self.left_frames -= segment.num_frames
        if self.num_made == 1:
            self.first_segment_s = elapsed_s
            pace_s = sum(result.elapsed_s.values()) / segment.num_frames
        else:
            self._frames_since_first += segment.num_frames
            pace_s = (elapsed_s - self.first_segment_s) / self._frames_since_first
        return FilmProgress(
            done=self.done,
            total=len(self.plan.segments),
            result=result,
            prompt=prompts[segment.shot].prompt,
            elapsed_s=elapsed_s,
            left_s=pace_s * self.left_frames,
        )


def _finish(prepared: Prepared, folder: RunFolder, tally: _Tally) -> FilmResult:
    """Put the sidecar and then the film in their places: a film in place has everything beside it."""
    paths, plan = prepared.paths, prepared.plan
    if prepared.output.tags:
        write_json(paths.sidecar, prepared.record)
    film_hash = finalise(paths.partial, paths.film, num_frames=plan.num_frames)
    elapsed_s = time.perf_counter() - tally.started_s
    folder.log("film", name=paths.film.name, sha256=film_hash, elapsed_s=round(elapsed_s, 3))
    return FilmResult(
        film=paths.film,
        sidecar=paths.sidecar if prepared.output.tags else None,
        run_dir=paths.run_dir,
        seed=plan.storyboard.seed,
        num_frames=plan.num_frames,
        duration_s=plan.duration_s,
        elapsed_s=elapsed_s,
        num_made=tally.num_made,
        first_segment_s=tally.first_segment_s,
        steps_s=tally.steps_s,
        film_hash=film_hash,
    )
