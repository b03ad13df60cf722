"""Resuming a film: what its run folder holds, and whether that is what the plan would make now.

A segment is kept if its record names what the plan would make it from: the same prompt, seed and settings, the same
codes, and the same frames carried over. The last two are compared by hash.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from arlon.errors import StoryboardError, UsageError
from arlon.files import hash_plain, hash_tensor
from arlon.film.geometry import open_model, read_geometry
from arlon.film.messages import Committed, SegmentInputs
from arlon.film.plan import Plan, Segment, make_plan
from arlon.film.schedule import film_requests
from arlon.film.settings import Settings
from arlon.film.storyboard import ResolvedStoryboard, parse_storyboard
from arlon.film.take_media import TakeMedia
from pipelines.deliver.paths import paths_of_run
from pipelines.runs.prepare import Prepared, assemble
from pipelines.store.media import read_media
from pipelines.store.run_folder import RUN_NAME, RunFolder, RunFolderError


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as its folder describes it, ready to be continued."""

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
        """Indices of segments that belong to an earlier version and have to be made again."""
        return frozenset(self.record.get("stale", ()))


def open_run(run_dir: str | Path, *, model: str | None = None) -> Run:
    """Read a run and check that it can be continued on this machine. Nothing is written.

    Args:
        run_dir: The run folder, or the film beside it.
        model: Name or path of the model. Default: the one that the run names.

    Raises:
        UsageError: If there is no such run, or the model is not the one the run was started with.
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
    try:
        storyboard = ResolvedStoryboard.of(parse_storyboard(record["storyboard"]))
    except StoryboardError as error:
        raise RunFolderError(f"'{folder.path / RUN_NAME}' holds no storyboard: {error}") from error
    plan = make_plan(storyboard, read_geometry(model_folder))
    if hash_plain(plan.to_plain()) != hash_plain(record["plan"]):
        raise RunFolderError(f"'{folder.path / RUN_NAME}' holds a plan that this version would make differently")
    prepared = assemble(
        plan,
        {name: record["model"][name] for name in ("name", "hash")},
        model_folder.path,
        settings=Settings.from_plain(record["settings"]),
        paths=paths_of_run(folder.path, record["film"]),
        model_source=record["model"]["source"],
        metadata=record["metadata"],
        hls=record.get("hls", False),
        arlon_version=record["arlon"],
    )
    return Run(folder=folder, record=record, prepared=prepared)


def find_run(run_dir: str | Path) -> RunFolder:
    """Find a run folder by its path, or by the path of the film beside it.

    Raises:
        UsageError: If there is no run.
    """
    path = Path(run_dir).expanduser()
    for candidate in (path, path.with_suffix(".run")) if path.name else (path,):
        if RunFolder(candidate).has_run():
            return RunFolder(candidate)
    raise UsageError(f"'{run_dir}' is not a run folder: it holds no {RUN_NAME}")


def continue_run(run: Run) -> Committed:
    """Make the run folder ready to be continued: remove what a crash left and what is stale.

    Returns:
        What is left.

    Raises:
        RunFolderError: If something is damaged or was changed by hand.
        RuntimeError: If another process changed the run after it was opened, when it was not locked yet.
    """
    found, opened = ({**record, "format": None} for record in (run.folder.read_run(), run.record))
    if hash_plain(found) != hash_plain(opened):
        raise RuntimeError(f"'{run.folder.path}' was changed by another process just now: try again")
    run.folder.sweep()
    run.prepared.paths.sweep()
    codes, media = read_fitting_codes(run), read_media(run.folder, run.plan)
    return Committed(codes=codes, segments=fitting_segments(run, codes, media), media=media)


def read_fitting_codes(run: Run) -> dict[int, Tensor]:
    """Read the stored codes, by take; none if there are none yet.

    Raises:
        RunFolderError: If they are damaged, or more than the plan has.
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
    """Find the committed segments that are what the plan would make, and remove those that have to be made again.

    Removed are stale segments that do not fit, and segments whose codes, or whose segment before, are missing.

    Args:
        run: The run.
        codes: Its stored codes, by take.
        media: Encoded media of its shots, by shot.

    Raises:
        RunFolderError: If a segment does not fit and the run does not say why.
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
        if (
            known is None
            or known.shape[1] < segment.num_code_frames
            or (segment.overlap and segment.index - 1 not in fitting)
        ):
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
    """Say why a committed segment is not what the plan would make; None if it is.

    Args:
        folder: The run folder. If the segment carries frames over, the segment before must be committed.
        segment: The segment.
        inputs: What the plan makes the segment from.
        codes: Codes of the take, (1, n, cH, cW), as many as the segment needs or more.

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
    carried = None
    if segment.overlap:
        carried = hash_tensor(folder.read_latent(segment.index - 1)[:, :, -segment.overlap :].contiguous())
    if record.inputs["overlap"] != carried:
        return "it continues other frames than the segment before it has"
    return None
