"""Changes of a run: another prompt or seed for a shot, more shots at the end, or a copy of the run.

A change first keeps the run as a version (`versions/0001`, a run folder of its own that shares the files of the run),
then writes the new `run.json`, and then continues as after a crash. So at every moment either the old run or the new
one can be resumed, and the old one stays in its version. Only what depends on the change is made again: codes from the
first changed code frame of a take on, and the segments that read such codes or continue a segment that is made again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from arlon.files import copy_file, link_or_copy, make_folder, publish, sync_folder, temporary_beside
from arlon.film.encode_media import encode_references
from arlon.film.media import check_references
from arlon.film.messages import Committed
from arlon.film.plan import Plan, make_plan
from arlon.film.prompt_schedule import code_schedule
from arlon.film.schedule import film_requests
from arlon.film.storyboard import ResolvedStoryboard, Shot, UsageError, random_seed, with_shot
from pipelines.deliver.paths import OutputPaths, check_output, output_paths
from pipelines.runs.prepare import assemble
from pipelines.runs.resume import Run, continue_run, misfit
from pipelines.runs.run_record import run_record
from pipelines.store.lock import RunLock
from pipelines.store.media import read_media
from pipelines.store.run_folder import (
    CODES_LOG_NAME,
    CODES_NAME,
    EVENTS_NAME,
    FRAGMENT_NAME,
    LATENTS_NAME,
    REFERENCES_NAME,
    SEGMENT_NAME,
    VERSIONS_NAME,
    RunFolder,
)

_LOG_NAMES = (CODES_LOG_NAME, EVENTS_NAME)
"""Files that grow in place and therefore cannot be shared."""


def with_shot_changed(run: Run, shot: int, *, prompt: str | None = None, seed: int | None = None) -> ResolvedStoryboard:
    """Change the prompt or the seed of a shot in the storyboard of a run; without either, the shot gets a random seed.

    Args:
        run: The run.
        shot: Number of the shot, from 1.
        prompt: New prompt of the shot.
        seed: New seed of the shot; -1 takes a random one.

    Raises:
        UsageError: If there is no such shot, or a value is wrong.
    """
    film = run.plan.storyboard
    if not 1 <= shot <= len(film.shots):
        raise UsageError(f"--shot must be between 1 and {len(film.shots)}, got {shot}")
    if seed == -1 or (seed is None and prompt is None):
        seed = random_seed()
    return with_shot(film, shot - 1, {"prompt": prompt, "seed": seed})


def with_shots_added(run: Run, shots: Sequence[Shot]) -> ResolvedStoryboard:
    """Add shots at the end of the storyboard of a run; the first one says how it follows."""
    film = run.plan.storyboard
    return replace(film, shots=(*film.shots, *shots))


def change_run(run: Run, storyboard: ResolvedStoryboard) -> Run:
    """Check a run under another storyboard. Nothing is written; `begin_change` does that.

    Raises:
        StoryboardError: If the storyboard does not fit the model, or a file that a new shot is given is not usable.
    """
    old = run.prepared
    plan = make_plan(storyboard, old.plan.geometry)
    references = check_references(plan, first_shot=len(old.plan.storyboard.shots))
    prepared = assemble(
        plan,
        old.record["model"],
        Path(old.job.model_path),
        settings=old.job.settings,
        paths=old.paths,
        model_source=old.model_source,
        metadata=bool(old.output.tags),
        hls=old.output.has_stream,
        arlon_version=old.record["arlon"],
    )
    return replace(run, prepared=replace(prepared, references=references))


def begin_change(old: Run, new: Run, executor: str) -> Committed:
    """Keep the old version of a run, and make its folder ready for the new one.

    Returns:
        What the new version can use of the old one.
    """
    folder = old.folder
    committed = continue_run(old)
    codes = dict(_unchanged_codes(old.plan, new.plan, committed.codes))
    version = folder.path / VERSIONS_NAME / f"{folder.num_versions() + 1:04d}"
    _copy(old, OutputPaths(film=version / "film.mp4", run_dir=version))
    if given := encode_references(new.prepared.job, new.prepared.references):
        known = folder.read_references() if folder.has_references() else {}
        shots = len(old.plan.storyboard.shots)  # a change that ended here may have given media to later shots
        folder.write_references({name: t for name, t in known.items() if int(name.split("/")[0]) < shots} | given)
    stale = sorted(committed.segments & _changed_segments(new, committed.segments, codes))
    # Codes that both versions share are right whichever run.json a crash leaves.
    folder.write_codes(codes)
    record = run_record(new.prepared, executor) | {"versions": old.record["versions"], "stale": stale}
    folder.write_run(record)
    folder.log("changed", version=version.name, stale=len(stale))
    return continue_run(replace(new, record=record))


def fork_run(run: Run, output: str | Path) -> Path:
    """Copy a run, finished or not, to continue it elsewhere. Files are shared if the file system has hard links.

    Args:
        run: The run.
        output: Path of a film (`.mp4`) or of a folder that does not exist yet; see `pipelines.deliver.paths`.

    Returns:
        The new run folder.

    Raises:
        UsageError: If something is in the way.
        RunLockedError: If a process works on the run.
        OSError: If the place cannot be written.
    """
    paths = output_paths(output, run.plan.storyboard)
    check_output(paths, overwrite=False)
    if paths.run_dir.exists():
        raise UsageError(f"'{paths.run_dir}' exists: choose another place for the copy")
    with RunLock(run.folder.path):
        continue_run(run)
        _copy(run, paths)
    return paths.run_dir


def _unchanged_codes(old: Plan, new: Plan, codes: Mapping[int, Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Yield the take and the first code frames (1, n, cH, cW) that are the same under both plans.

    A code frame depends on the prompts and seeds up to its own and on where they switch, and on nothing after it.
    """
    for take, stored in codes.items():
        schedules = (code_schedule(plan, plan.takes[take]).spans for plan in (old, new))
        count = 0
        for before, after in zip(*schedules, strict=False):
            if replace(before, num_code_frames=after.num_code_frames) != after:  # another prompt, seed or blend
                break
            count += min(before.num_code_frames, after.num_code_frames)
            if before.num_code_frames != after.num_code_frames:
                break
        if count:
            yield take, stored[:, :count]


def _changed_segments(new: Run, committed: frozenset[int], codes: Mapping[int, Tensor]) -> set[int]:
    """Find the committed segments that have to be made again.

    Args:
        new: The run under its new storyboard.
        committed: Indices of the committed segments.
        codes: Codes that stay, by take.
    """
    changed: set[int] = set()
    for request in film_requests(new.prepared.job, read_media(new.folder, new.plan)):
        segment = request.segment
        if segment.index not in committed:
            continue
        known = codes.get(segment.take)
        if (
            (segment.overlap and segment.index - 1 in changed)
            or known is None
            or known.shape[1] < segment.num_code_frames
            or misfit(new.folder, segment, request.write.inputs, known) is not None
        ):
            changed.add(segment.index)
    return changed


def _copy(run: Run, paths: OutputPaths) -> None:
    """Copy the run folder in one step; resuming the copy puts its film together from its segments."""
    make_folder(paths.run_dir.parent)
    temporary = temporary_beside(paths.run_dir)
    source, target = run.folder, RunFolder(temporary)
    make_folder(temporary)
    for name in (CODES_NAME, REFERENCES_NAME, *_LOG_NAMES):
        if (source.path / name).exists():
            copy = copy_file if name in _LOG_NAMES else link_or_copy
            copy(source.path / name, temporary / name)
    for index in source.committed_indices():
        make_folder(target.segment_dir(index))
        for name in (LATENTS_NAME, FRAGMENT_NAME, SEGMENT_NAME):
            link_or_copy(source.segment_dir(index) / name, target.segment_dir(index) / name)
        sync_folder(target.segment_dir(index))
    target.write_run({**run.record, "film": paths.film_from_run_dir})
    publish(temporary, paths.run_dir)
