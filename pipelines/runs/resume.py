"""Going on with a film: what of it is in its run folder, whether that fits, and the rest.

A segment is kept if its record says that it was made from what the plan would make it from now: the same prompt, seed
and settings, the same codes and the same frames carried over. The last two are compared by hash.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from arlon.files import hash_plain, hash_tensor
from arlon.film.geometry import open_model, read_geometry
from arlon.film.messages import Committed, SegmentInputs
from arlon.film.plan import Plan, Segment, make_plan
from arlon.film.schedule import film_requests
from arlon.film.settings import Settings
from arlon.film.storyboard import ResolvedStoryboard, StoryboardError, UsageError, parse_storyboard
from arlon.film.take_media import TakeMedia
from pipelines.deliver.paths import paths_of_run
from pipelines.runs.generate import Prepared, assemble, library_versions, sweep_film
from pipelines.store.media import read_media
from pipelines.store.run_folder import RUN_NAME, RunFolder, RunFolderError


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as its folder tells it, ready to go on."""

    folder: RunFolder
    record: Mapping[str, Any]
    """Content of `run.json`."""
    prepared: Prepared

    @property
    def plan(self) -> Plan:
        """The plan of the film."""
        return self.prepared.plan

    @property
    def stale(self) -> frozenset[int]:
        """Segments of an earlier version that are to be made again."""
        return frozenset(self.record.get("stale", ()))

    @property
    def changed_libraries(self) -> list[str]:
        """Libraries that are not those the run was started with: what is made now may differ in its last bits."""
        then, now = self.record.get("versions", {}), library_versions()
        return [f"{name} {then[name]} -> {now[name]}" for name in now if then.get(name, now[name]) != now[name]]


def open_run(run_dir: str | Path, *, model: str | None = None) -> Run:
    """Read a run and check that it can go on here. Nothing is written.

    Args:
        run_dir: The run folder.
        model: Name or path of the model, where it has moved; None: as the run names it.

    Raises:
        UsageError: If this is no run folder, or the model is not the one the run was started with.
        RunFolderError: If `run.json` is damaged or was changed.
    """
    folder = find_run(run_dir)
    record = folder.read_run()
    source = model or record["model"]["source"]
    try:
        model_folder, identity = open_model(source)
    except FileNotFoundError as error:
        raise UsageError(f"the model of '{run_dir}' is not there, give it with --model: {error}") from error
    if identity["hash"] != record["model"]["hash"]:
        raise UsageError(
            f"'{run_dir}' was made with another model: expected '{record['model']['name']}' with hash "
            f"{record['model']['hash'][:12]}, got {identity['hash'][:12]} from '{source}'; say which with --model"
        )
    plan = make_plan(read_storyboard(record, folder), read_geometry(model_folder))
    if hash_plain(plan.to_plain()) != hash_plain(record["plan"]):
        raise RunFolderError(f"'{folder.path / RUN_NAME}' holds a plan that this version would make otherwise")
    prepared = assemble(
        plan,
        {name: record["model"][name] for name in ("name", "hash")},
        model_folder.path,
        settings=read_settings(record),
        paths=paths_of_run(folder.path, record["film"]),
        model_source=record["model"]["source"],
        metadata=record["metadata"],
        hls=record.get("hls", False),
        arlon_version=record["arlon"],
    )
    return Run(folder=folder, record=record, prepared=prepared)


def find_run(run_dir: str | Path) -> RunFolder:
    """The run folder of a path; a film stands for the run beside it.

    Raises:
        UsageError: If there is none.
    """
    path = Path(run_dir).expanduser()
    for candidate in (path, path.with_suffix(".run")) if path.name else (path,):
        if RunFolder(candidate).has_run():
            return RunFolder(candidate)
    raise UsageError(f"'{run_dir}' is not a run folder: it holds no {RUN_NAME}")


def read_storyboard(record: Mapping[str, Any], folder: RunFolder) -> ResolvedStoryboard:
    """The resolved storyboard of a run.

    Raises:
        RunFolderError: If it is not one.
    """
    try:
        return ResolvedStoryboard.of(parse_storyboard(record["storyboard"]))
    except StoryboardError as error:
        raise RunFolderError(f"'{folder.path / RUN_NAME}' holds no storyboard: {error}") from error


def read_settings(record: Mapping[str, Any]) -> Settings:
    """The settings of a run."""
    return Settings.from_plain(record["settings"])


def continue_run(run: Run) -> Committed:
    """Make the run folder ready to go on: sweep what a crash left, drop what is stale, and tell what is there.

    Raises:
        RunFolderError: If something was changed by hand or damaged.
        RuntimeError: If the run was changed since it was opened; it was not locked then.
    """
    if _content(run.folder.read_run()) != _content(run.record):
        raise RuntimeError(f"'{run.folder.path}' was changed by another process just now: try again")
    run.folder.sweep()
    sweep_film(run.prepared.paths)
    codes, media = read_fitting_codes(run), read_media(run.folder, run.plan)
    return Committed(codes=codes, segments=fitting_segments(run, codes, media), media=media)


def _content(record: Mapping[str, Any]) -> str:
    return hash_plain({name: value for name, value in record.items() if name != "format"})


def read_fitting_codes(run: Run) -> dict[int, Tensor]:
    """The codes that are stored, by take.

    Raises:
        RunFolderError: If they are more than the plan has, or damaged.
    """
    try:
        codes = run.folder.read_codes()
    except FileNotFoundError:
        return {}
    takes = run.plan.takes
    for take, stored in codes.items():
        if take >= len(takes) or stored.shape[1] > takes[take].num_code_frames:
            raise RunFolderError(f"'{run.folder.path}' holds codes of another film: take {take} is not as planned")
    return codes


def fitting_segments(run: Run, codes: Mapping[int, Tensor], media: Mapping[int, TakeMedia]) -> frozenset[int]:
    """Committed segments that fit the plan.

    Stale ones that do not are removed, and so are those whose codes or segment before are missing: they are made again
    with these.

    Args:
        run: The run.
        codes: Its stored codes, by take.
        media: What its shots are given, by shot.

    Raises:
        RunFolderError: If another one does not fit.
    """
    folder, fitting = run.folder, set[int]()
    there = set(folder.committed_indices())
    if there and max(there) >= len(run.plan.segments):
        where = folder.segment_dir(max(there))
        raise RunFolderError(f"'{where}' does not fit this run, which has {len(run.plan.segments)} segments: delete it")
    for request in film_requests(run.prepared.job, media):
        segment = request.segment
        if segment.index not in there:
            continue
        known = codes.get(segment.take)
        has_codes = known is not None and known.shape[1] >= segment.num_code_frames
        if not has_codes or (segment.overlap and segment.index - 1 not in fitting):
            folder.remove_segment(segment.index)
        elif (problem := misfit(folder, segment, request.write.inputs, known)) is None:
            fitting.add(segment.index)
        elif segment.index in run.stale:
            folder.remove_segment(segment.index)
        else:
            where = folder.segment_dir(segment.index)
            raise RunFolderError(f"'{where}' does not fit this run: {problem}; delete it to have it made again")
    return frozenset(fitting)


def misfit(folder: RunFolder, segment: Segment, inputs: SegmentInputs, codes: Tensor) -> str | None:
    """Why a committed segment is not what the plan would make; None: it is.

    Args:
        folder: The run folder; the segment before is committed if this one carries frames over.
        segment: The segment.
        inputs: What the plan makes it from.
        codes: Codes of its take, (1, n, cH, cW), as many as it needs or more.

    Raises:
        RunFolderError: If the segment is damaged.
    """
    record = folder.read_segment(segment.index)
    if record.index != segment.index:
        return f"it is segment {record.index} of its film"
    if different := [name for name, value in inputs.to_plain().items() if record.inputs.get(name) != value]:
        return f"it was made with other values of {', '.join(different)}"
    window = codes[:, segment.start_code_frame : segment.num_code_frames]
    if record.inputs["codes"] != hash_tensor(window):
        return "it was made from other codes"
    if record.inputs["overlap"] != carried_hash(folder, segment):
        return "it goes on from other frames than the segment before it has"
    return None


def carried_hash(folder: RunFolder, segment: Segment) -> str | None:
    """SHA-256 of the latent frames that a segment carries over, None if it carries none."""
    if not segment.overlap:
        return None
    return hash_tensor(folder.read_latent(segment.index - 1)[:, :, -segment.overlap :].contiguous())
