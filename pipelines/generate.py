"""From a storyboard to a film on disk: check everything, run, and put the film in its place.

`prepare` does all the checks and no work; `generate` does the work. See `pipelines/output.py` for where things go.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pipelines.model import GenerationDefaults, ModelGeometry, open_model, read_geometry
from pipelines.output import OutputPaths, check_output, output_paths
from pipelines.plan import Plan, make_plan, resolve_storyboard
from pipelines.requests import Job, Settings, WriteResult
from pipelines.run_folder import RunFolder, hash_bytes, write_json
from pipelines.storyboard import Storyboard, UsageError, random_seed
from pipelines.version import version

Executor = Literal["local", "ray"]
DEFAULT_MODEL = "shapes"
RECORD_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A film that can be made: every check is passed."""

    job: Job
    paths: OutputPaths
    record: dict[str, Any]
    """What is stored in the film and beside it."""
    model_source: str
    """The model as it was asked for."""

    @property
    def plan(self) -> Plan:
        """The plan of the film."""
        return self.job.plan


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a film stands after a segment."""

    done: int
    """Segments stored."""
    total: int
    result: WriteResult
    prompt: str
    elapsed_s: float
    left_s: float
    """Estimate of the time left, from the pace of the segments so far."""


@dataclass(frozen=True, kw_only=True)
class FilmResult:
    """A finished film."""

    film: Path
    sidecar: Path
    run_dir: Path
    seed: int
    num_frames: int
    duration_s: float
    elapsed_s: float
    first_segment_s: float
    """From the start until the first segment could be played."""
    steps_s: dict[str, float]
    """Seconds in each step, summed over segments; with the ray executor steps overlap."""
    film_hash: str
    """SHA-256 of the film."""

    def to_plain(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}


def open_for_film(storyboard: Storyboard, model: str | None = None) -> tuple[Plan, Mapping[str, str], Path]:
    """Open the model of a storyboard and plan the film.

    Args:
        storyboard: The film; what it leaves open is taken from the model.
        model: Name or path of the model; None: the storyboard's, or `shapes`.

    Returns:
        The plan, name and content hash of the model, and its folder.

    Raises:
        UsageError: If there is no such model, or the storyboard does not fit it.
        ValueError: If the model is damaged.
    """
    from arlon.diffusion import samplers

    source = _model_source(storyboard, model)
    try:
        folder, identity = open_model(source)
    except FileNotFoundError as error:
        raise UsageError(str(error)) from error
    geometry: ModelGeometry = read_geometry(folder)
    resolved = resolve_storyboard(storyboard, geometry.defaults, random_seed())
    resolved = replace(resolved, model=identity["name"])
    try:
        samplers.get_solver(resolved.solver or "")
    except ValueError as error:
        raise UsageError(str(error)) from error
    return make_plan(resolved, geometry), identity, folder.path


def prepare(
    storyboard: Storyboard,
    *,
    model: str | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Prepared:
    """Check everything that can be checked before the work.

    Args:
        storyboard: The film.
        model: Name or path of the model; None: the storyboard's, or `shapes`.
        output: A film (`.mp4`) or a folder; see the module.
        overwrite: Replace a film, or a run, that is already there.
        settings: Values of `Settings`, where they differ from the model's.

    Raises:
        UsageError: If something asked for is not possible.
        OSError: If the output cannot be written.
        ValueError: If the model is damaged.
    """
    plan, identity, folder = open_for_film(storyboard, model)
    checked = make_settings(plan.geometry.defaults, settings or {})
    paths = output_paths(output, plan.storyboard)
    check_output(paths, overwrite=overwrite)
    record = film_record(plan, identity, checked)
    job = Job(
        plan=plan,
        settings=checked,
        model_path=str(folder.resolve()),
        model_hash=identity["hash"],
        run_dir=str(paths.run_dir.resolve()),
        partial_path=str(paths.partial.resolve()),
        tag=json.dumps(record, ensure_ascii=False, separators=(",", ":")),
    )
    return Prepared(job=job, paths=paths, record=record, model_source=_model_source(storyboard, model))


def _model_source(storyboard: Storyboard, model: str | None) -> str:
    return model if model is not None else storyboard.model or DEFAULT_MODEL


def make_settings(defaults: GenerationDefaults, values: Mapping[str, Any]) -> Settings:
    """Settings from the model's defaults and given values; None in `values` means: not given.

    Raises:
        UsageError: If a value is unknown or out of range.
    """
    from arlon.config import config_from_dict

    names = ("ar_temperature", "ar_top_p", "ar_guidance_scale")
    base: dict[str, Any] = {name: getattr(defaults, name) for name in names}
    base |= {"num_threads": available_cores()}
    base |= {name: value for name, value in values.items() if value is not None}
    try:
        settings = config_from_dict(Settings, base)
        check_device(settings.device)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return settings


def check_device(device: str) -> None:
    """Refuse a device that PyTorch does not know or this machine does not have.

    Raises:
        ValueError: If so.
    """
    import torch

    try:
        torch.zeros(1, device=device).cpu()  # back, too: the meta device computes nothing
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"cannot compute on device {device!r}, try 'cpu': {reason[:120]}") from error


def available_cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def film_record(plan: Plan, identity: Mapping[str, str], settings: Settings) -> dict[str, Any]:
    """What a film was made from, in plain values and without any path: enough to make it again."""
    timeline = {name: value for name, value in plan.to_plain().items() if name not in ("takes", "segments")}
    return {
        "format": RECORD_FORMAT,
        "arlon": version(),
        "storyboard": plan.storyboard.to_plain(),
        "model": dict(identity),
        "settings": asdict(settings),
        "timeline": timeline,
    }


def generate(
    prepared: Prepared,
    *,
    executor: Executor = "local",
    address: str | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> FilmResult:
    """Make a film.

    If it is interrupted or fails, the segments made so far stay in the run folder and in the partial film; if there
    are none, nothing stays.

    Args:
        prepared: From `prepare`.
        executor: `local`, or `ray` for the same film with its steps in parallel.
        address: Ray cluster to join.
        on_progress: Called after every segment.

    Raises:
        UsageError: If the executor is unknown.
        ValueError, OSError, RuntimeError: If the work fails.
    """
    started_s = time.perf_counter()
    if executor == "ray" and importlib.util.find_spec("ray") is None:
        raise UsageError("the ray executor needs Ray: pip install 'arlon[ray]'")
    segments = _run(prepared.job, executor, address)
    folder = RunFolder(prepared.paths.run_dir)
    folder.start(_run_record(prepared, executor))
    results: list[WriteResult] = []
    ends_s: list[float] = []
    try:
        for result in segments:
            results.append(result)
            ends_s.append(time.perf_counter() - started_s)
            if on_progress is not None:
                on_progress(_progress(prepared.plan, results, ends_s))
    except BaseException as error:
        segments.close()
        if results:
            folder.log("stopped", reason=type(error).__name__, segments=len(results))
        else:
            prepared.paths.partial.unlink(missing_ok=True)
            folder.discard()
        raise
    return _finish(prepared, folder, results, ends_s, started_s)


def _run(job: Job, executor: str, address: str | None) -> Generator[WriteResult, None, None]:
    if executor == "local":
        from pipelines.local import run_local

        return run_local(job)
    if executor == "ray":
        from pipelines.graph import run_graph

        return run_graph(job, address=address)
    raise UsageError(f"unknown executor {executor!r}, choose 'local' or 'ray'")


def _run_record(prepared: Prepared, executor: str) -> dict[str, Any]:
    names = ("av", "numpy", "safetensors", "torch")
    versions = {name: importlib.metadata.version(name) for name in names}
    record = prepared.record | {"versions": versions, "executor": executor, "film": prepared.paths.film.name}
    record["model"] = record["model"] | {"source": prepared.model_source}
    return record | {"plan": prepared.plan.to_plain()}


def _progress(plan: Plan, results: list[WriteResult], ends_s: list[float]) -> Progress:
    """Time left: frames to come at the pace since the first segment, whose time holds the start-up too."""
    done = sum(result.segment.num_frames for result in results)
    first = results[0].segment.num_frames
    if len(results) > 1:
        pace_s = (ends_s[-1] - ends_s[0]) / (done - first)
    else:
        pace_s = sum(v for k, v in results[0].elapsed_s.items() if k != "code") / done
    segment = results[-1].segment
    return Progress(
        done=len(results),
        total=len(plan.segments),
        result=results[-1],
        prompt=plan.storyboard.shots[segment.shot].prompt,
        elapsed_s=ends_s[-1],
        left_s=pace_s * (plan.num_frames - done),
    )


def _finish(
    prepared: Prepared,
    folder: RunFolder,
    results: list[WriteResult],
    ends_s: list[float],
    started_s: float,
) -> FilmResult:
    """Put the sidecar and then the film in their places."""
    paths, plan = prepared.paths, prepared.plan
    if (num_frames := sum(result.segment.num_frames for result in results)) != plan.num_frames:
        raise RuntimeError(f"the film has {num_frames} frames, but {plan.num_frames} were planned")
    write_json(paths.sidecar, prepared.record)
    with paths.partial.open("rb") as file:
        os.fsync(file.fileno())
        film_hash = hash_bytes(file.read())
    paths.partial.replace(paths.film)
    steps = results[0].elapsed_s
    elapsed_s = time.perf_counter() - started_s
    folder.log("film", name=paths.film.name, sha256=film_hash, elapsed_s=round(elapsed_s, 3))
    assert plan.storyboard.seed is not None
    return FilmResult(
        film=paths.film,
        sidecar=paths.sidecar,
        run_dir=paths.run_dir,
        seed=plan.storyboard.seed,
        num_frames=plan.num_frames,
        duration_s=plan.duration_s,
        elapsed_s=elapsed_s,
        first_segment_s=ends_s[0],
        steps_s={step: sum(result.elapsed_s[step] for result in results) for step in steps},
        film_hash=film_hash,
    )
