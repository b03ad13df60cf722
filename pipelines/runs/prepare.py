"""Checks before a film is made on disk: the model, the storyboard, the settings, and where the film goes.

Nothing is written. `pipelines.runs.generate` does the work; `pipelines.deliver.paths` says what goes where.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from arlon.errors import UsageError
from arlon.film.media import Reference, check_references
from arlon.film.messages import Job
from arlon.film.plan import Plan
from arlon.film.prepare import make_settings, plan_film
from arlon.film.record import film_record, film_tags
from arlon.film.settings import Settings
from arlon.film.storyboard import Storyboard
from pipelines.deliver.paths import FilmOutput, OutputPaths, check_output, output_paths


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A film that can be made, because it has passed every check."""

    job: Job
    paths: OutputPaths
    """Where the film goes, as the user wrote it."""
    output: FilmOutput
    record: dict[str, Any]
    """Record that is stored in the film and beside it."""
    model_source: str
    """The model as it was asked for: a name, a hub id, or the full path of a folder."""
    references: tuple[Reference, ...] = ()
    """Files that the film is given and that are not in its run folder yet."""

    @property
    def plan(self) -> Plan:
        """The plan of the film."""
        return self.job.plan


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
    """Check everything that can be checked before a film is made.

    Args:
        storyboard: The film.
        model: Name or path of the model. Default: the one that the storyboard names, or `shapes`.
        output: Path of the film (`.mp4`) or of a folder. Default: a new folder under `outputs`.
        overwrite: Whether a film or a run that is already there may be replaced.
        settings: Values of `Settings` that differ from the model's.
        metadata: Whether to store the record in the film and beside it.
        hls: Whether to make an HLS stream beside the film while it grows; see `pipelines.deliver.hls`.

    Raises:
        UsageError: If something asked for is not possible.
        OSError: If the output cannot be written.
        CheckpointError: If the model is damaged.
    """
    planned = plan_film(storyboard, model)
    checked = make_settings(planned.plan.geometry, settings or {})
    paths = output_paths(output, planned.plan.storyboard)
    check_output(paths, overwrite=overwrite)
    references = check_references(planned.plan)
    if hls and paths.hls.exists() and not paths.hls.is_dir():
        raise UsageError(f"'{paths.hls}' is in the way of the stream: it is not a folder")
    prepared = assemble(
        planned.plan,
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
    """Put a film together from parts that are known to be right, such as those of an earlier run.

    Args:
        plan: Plan of the film.
        identity: Name and content hash of the model.
        model_path: Folder of the model.
        settings: How the film is computed.
        paths: Where the film goes.
        model_source: The model as it was asked for.
        metadata: Whether to store the record in the film and beside it.
        hls: Whether to make a stream beside the film.
        arlon_version: Version that the film names as its maker. Default: the one that runs.
    """
    record = film_record(plan, identity, settings, arlon_version=arlon_version)
    tags = film_tags(record, plan.storyboard.shots[0].prompt) if metadata else {}
    model_path = model_path.resolve()  # Ray's processes have another working folder
    return Prepared(
        job=Job(plan=plan, settings=settings, model_path=str(model_path), model_hash=identity["hash"]),
        paths=paths,
        output=FilmOutput(paths=paths.resolved(), tags=tags, has_stream=hls),
        record=record,
        model_source=model_source,
    )
