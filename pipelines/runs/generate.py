"""From a storyboard to a film on disk: check everything, run, and put the film in its place.

`prepare` does all the checks and no work; `generate` does the work. See `pipelines.deliver.paths` for where things go,
and `pipelines.runs.resume` for going on with a film.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from arlon.files import make_folder, sweep, write_json
from arlon.film.container import finalise
from arlon.film.encode_media import encode_references
from arlon.film.media import Reference, check_references
from arlon.film.messages import Committed, Job, WriteResult
from arlon.film.plan import Plan
from arlon.film.prepare import make_settings, plan_film
from arlon.film.record import film_record, film_tags
from arlon.film.settings import Settings
from arlon.film.storyboard import Storyboard, UsageError
from arlon.film.take_media import take_media
from pipelines.deliver.hls import remove_stream
from pipelines.deliver.paths import FilmOutput, OutputPaths, check_output, output_paths
from pipelines.store.lock import RunLock
from pipelines.store.run_folder import RunFolder

if TYPE_CHECKING:
    from pipelines.executors.local import WorkerSource
    from pipelines.executors.ray_graph import GraphConfig

Executor = Literal["local", "ray"]
FILM_LIBRARIES = (
    *("av", "numpy", "safetensors", "torch"),
    "diffusers",  # per-frame VAE
    "vector-quantize-pytorch",  # codes
    *("beautifulsoup4", "ftfy", "tokenizers", "transformers"),  # text and its features
)
"""Distributions whose code the bits of a film depend on; resuming a run tells if one has changed."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A film that can be made: every check is passed."""

    job: Job
    paths: OutputPaths
    """Where the film goes, as it was asked for."""
    output: FilmOutput
    record: dict[str, Any]
    """What is stored in the film and beside it."""
    model_source: str
    """The model as it was asked for; a folder by its full path."""
    references: tuple[Reference, ...] = ()
    """Files that it is given and that are not in its run folder yet."""

    @property
    def plan(self) -> Plan:
        """The plan of the film."""
        return self.job.plan


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a film stands after a segment."""

    done: int
    """Segments stored, those of earlier runs included."""
    total: int
    result: WriteResult
    prompt: str
    elapsed_s: float
    left_s: float
    """Estimate of the time left, from the pace of the segments so far."""


Begin = Callable[[Prepared, str], Committed]
"""What makes a run folder ready for an executor, under the lock of the run, and tells what it holds already."""


@dataclass(frozen=True, kw_only=True)
class FilmResult:
    """A finished film."""

    film: Path
    sidecar: Path | None
    """What it was made from; None if that was not to be stored."""
    run_dir: Path
    seed: int
    num_frames: int
    duration_s: float
    elapsed_s: float
    num_made: int
    """Segments made; the others were in the run folder."""
    first_segment_s: float
    """From the start until the first segment made could be played; 0 if none was made."""
    steps_s: dict[str, float]
    """Seconds in each step, summed over segments made; with the ray executor steps overlap."""
    film_hash: str
    """SHA-256 of the film."""

    def to_plain(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}


def prepare(
    storyboard: Storyboard,
    *,
    model: str | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    settings: Mapping[str, Any] | None = None,
    metadata: bool = True,
    hls: bool = False,
) -> Prepared:
    """Check everything that can be checked before the work.

    Args:
        storyboard: The film.
        model: Name or path of the model; None: the storyboard's, or `shapes`.
        output: A film (`.mp4`) or a folder; see the module.
        overwrite: Replace a film, or a run, that is already there.
        settings: Values of `Settings`, where they differ from the model's.
        metadata: Store in the film and beside it what it was made from.
        hls: Make an HLS stream beside the film while it grows; see `pipelines.deliver.hls`.

    Raises:
        UsageError: If something asked for is not possible.
        OSError: If the output cannot be written.
        ValueError: If the model is damaged.
    """
    planned = plan_film(storyboard, model)
    plan = planned.plan
    checked = make_settings(plan.geometry, settings or {})
    paths = output_paths(output, plan.storyboard)
    check_output(paths, overwrite=overwrite)
    references = check_references(plan)
    if hls and paths.hls.exists() and not paths.hls.is_dir():
        raise UsageError(f"'{paths.hls}' is in the way of the stream: it is not a folder")
    prepared = assemble(
        plan,
        planned.identity,
        planned.model.path,
        settings=checked,
        paths=paths,
        model_source=planned.source,
        metadata=metadata,
        hls=hls,
    )
    return replace(prepared, references=references)


def assemble(
    plan: Plan,
    identity: Mapping[str, str],
    model_path: Path,
    *,
    settings: Settings,
    paths: OutputPaths,
    model_source: str,
    metadata: bool = True,
    hls: bool = False,
    arlon_version: str | None = None,
) -> Prepared:
    """A film that can be made, from parts that were checked.

    Args:
        plan: Of the film.
        identity: Name and content hash of the model.
        model_path: Its folder.
        settings: How it is computed.
        paths: Where it goes.
        model_source: The model as it was asked for.
        metadata: Store the record in the film and beside it.
        hls: Make a stream beside the film.
        arlon_version: That the film names; None: this one.
    """
    record = film_record(plan, identity, settings, arlon_version=arlon_version)
    job = Job(
        plan=plan,
        settings=settings,
        model_path=str(model_path.resolve()),
        model_hash=identity["hash"],
    )
    output = FilmOutput(
        paths=paths.resolved(),
        tags=film_tags(record, plan.storyboard.shots[0].prompt) if metadata else {},
        has_stream=hls,
    )
    return Prepared(job=job, paths=paths, output=output, record=record, model_source=model_source)


def start_run(prepared: Prepared, executor: str) -> Committed:
    """Make the run folder ready for a new film."""
    sweep_film(prepared.paths)
    tensors = encode_references(prepared.job, prepared.references)
    remove_stream(prepared.paths.hls)
    RunFolder(prepared.paths.run_dir).start(run_record(prepared, executor), tensors)
    return Committed(media=take_media(prepared.plan, tensors))


def sweep_film(paths: OutputPaths) -> None:
    """Remove what a crash left of a film and its sidecar while they were written."""
    sweep([paths.film.parent], (paths.film.name, paths.sidecar.name))


def generate(
    prepared: Prepared,
    *,
    begin: Begin = start_run,
    executor: Executor = "local",
    address: str | None = None,
    graph: GraphConfig | None = None,
    worker: WorkerSource | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> FilmResult:
    """Make a film.

    If it is interrupted or fails, the codes and segments made so far stay in the run folder, from which
    `pipelines.runs.resume` goes on, and the segments in the partial film; if there is nothing, nothing stays.

    Args:
        prepared: From `prepare`.
        begin: Makes the run folder ready; a new film unless told otherwise.
        executor: `local`, or `ray` for the same film with its steps in parallel.
        address: Ray cluster to join.
        graph: Actors of each role of the ray executor.
        worker: Source of the workers of `local`, such as `pipelines.executors.local.KeptWorkers`; None: new ones.
        on_progress: Called after every segment made.

    Raises:
        UsageError: If the executor is unknown.
        RunLockedError: If another process works on the run.
        ValueError, OSError, RuntimeError: If the work fails.
    """
    started_s = time.perf_counter()
    _check_executor(executor)
    folder = RunFolder(prepared.paths.run_dir)
    make_folder(folder.path)
    with RunLock(folder.path):
        committed = begin(prepared, executor)
        folder.log("start", executor=executor, segments=len(committed.segments))
        tally = _Tally(prepared.plan, committed, started_s)
        segments = _run(prepared, committed, executor, address, graph, worker)
        try:
            for result in segments:
                progress = tally.add(result)
                if on_progress is not None:
                    on_progress(progress)
        except BaseException as error:
            with suppress(OSError):  # what failed is told, not that nothing can be cleared away
                segments.close()
                folder.log("stopped", reason=type(error).__name__, segments=tally.done)
                if not tally.done:
                    prepared.paths.partial.unlink(missing_ok=True)
                if not folder.holds_work():
                    folder.discard()
            raise
        return _finish(prepared, folder, tally)


def _check_executor(executor: str) -> None:
    if executor not in get_args(Executor):
        raise UsageError(f"unknown executor {executor!r}, choose 'local' or 'ray'")
    if executor == "ray" and importlib.util.find_spec("ray") is None:
        raise UsageError("the ray executor needs Ray: pip install 'arlon[ray]'")


def _run(
    prepared: Prepared,
    committed: Committed,
    executor: str,
    address: str | None,
    graph: GraphConfig | None,
    worker: WorkerSource | None,
) -> Generator[WriteResult, None, None]:
    if executor == "local":
        from pipelines.executors.local import new_worker, run_local

        return run_local(prepared.job, prepared.output, committed, worker=worker or new_worker)
    from pipelines.executors.ray_graph import run_graph

    return run_graph(prepared.job, prepared.output, committed, address=address, config=graph)


def run_record(prepared: Prepared, executor: str) -> dict[str, Any]:
    """What `run.json` says: the film's record, and where and with what it is made."""
    record = prepared.record | {"versions": library_versions(), "executor": executor}
    record |= {"film": prepared.paths.film_from_run_dir, "metadata": bool(prepared.output.tags)}
    record |= {"hls": True} if prepared.output.has_stream else {}
    record["model"] = record["model"] | {"source": prepared.model_source}
    return record | {"plan": prepared.plan.to_plain()}


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide the bits of a film."""
    return {name: importlib.metadata.version(name) for name in FILM_LIBRARIES}


class _Tally:
    """Running sums over the segments made; a long film needs no list of them."""

    def __init__(self, plan: Plan, committed: Committed, started_s: float) -> None:
        self.plan, self.started_s = plan, started_s
        self.done, self.num_made = len(committed.segments), 0
        self.left_frames = plan.num_frames - sum(plan.segments[index].num_frames for index in committed.segments)
        self.first_segment_s = 0.0
        self.steps_s: dict[str, float] = {}
        self._frames_since_first = 0

    def add(self, result: WriteResult) -> Progress:
        """Count a segment.

        Time left: frames to come at the pace since the first segment, whose time holds the start-up too.
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
        return Progress(
            done=self.done,
            total=len(self.plan.segments),
            result=result,
            prompt=prompts[segment.shot].prompt,
            elapsed_s=elapsed_s,
            left_s=pace_s * self.left_frames,
        )


def _finish(prepared: Prepared, folder: RunFolder, tally: _Tally) -> FilmResult:
    """Put the sidecar and then the film in their places."""
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
