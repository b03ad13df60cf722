"""Batches: many films, one on each line of a file, made one after another in this process.

A line of `films.jsonl` is a list of prompts, or an object:

    ["a red circle moves left", "a green circle moves left"]
    {"name": "circle", "prompts": ["a red circle moves left"], "duration": 4, "seed": 7}
    {"storyboard": "boards/two.yaml", "num_inference_steps": 8}
    {"shots": [{"prompt": "a blue square", "duration": "51f"}], "fps": 8}

`storyboard` names a file; `shots` is a storyboard written out. Paths start at the folder of `films.jsonl`. Other keys
are film-level keys of a storyboard and settings. A film without a name is named after its line and its first prompt.

Film NAME is made in OUTPUT_DIR/NAME just as `arlon generate --output OUTPUT_DIR/NAME` makes it. So every command on
runs works there, and a second run of the batch continues where the first ended.

A film that cannot be made becomes a row of the result and never ends the batch.
"""

from __future__ import annotations

import re
import time
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from arlon.errors import ArlonError, UsageError, did_you_mean
from arlon.files import hash_plain
from arlon.film.make import KeptWorkers, WorkerSource, new_worker
from arlon.film.prepare import make_settings, plan_film
from arlon.film.settings import Settings
from arlon.film.storyboard import (
    Storyboard,
    anchored,
    load_storyboard,
    parse_storyboard,
    storyboard_from_prompts,
    with_overrides,
)
from arlon.film.storyboard_values import FILM_READERS, parse_duration
from arlon.film.strict_yaml import parse_json, read_text, shown
from pipelines.deliver.paths import output_paths, slug
from pipelines.runs.generate import Begin, generate, start_run
from pipelines.runs.prepare import Prepared, prepare
from pipelines.runs.resume import Run, continue_run, open_run
from pipelines.runs.status import read_status
from pipelines.store.lock import RunLockedError
from pipelines.store.run_folder import RunFolder

MAX_NAME_LENGTH = 100
"""Bytes of the name of a film."""
SOURCES = ("prompts", "storyboard", "shots")
"""Keys of a line that say what is shown; a line has one of them."""
_FILM_KEYS = FILM_READERS.keys() - {"model"}
_SETTING_KEYS = frozenset(field.name for field in fields(Settings))
_KEYS = frozenset({"name", "duration", "transition", *SOURCES}) | _FILM_KEYS | _SETTING_KEYS

State = Literal["done", "skipped", "failed"]


@dataclass(frozen=True, kw_only=True)
class FilmTask:
    """One film of a batch, as its line describes it."""

    line: int
    """Number of the line, from 1."""
    name: str
    storyboard: Storyboard
    settings: Mapping[str, Any]
    """Values of `Settings` that differ from the model's."""


@dataclass(frozen=True, kw_only=True)
class FilmOutcome:
    """What became of one film of a batch."""

    line: int
    """Number of the line, from 1."""
    name: str
    state: State
    """`skipped` if the film was complete before."""
    film: str | None = None
    """Path of the film; None if it failed."""
    num_made: int = 0
    """Segments made in the last attempt."""
    num_attempts: int = 0
    elapsed_s: float = 0.0
    error: str | None = None
    """Why the film failed."""
    may_retry: bool = False
    """Whether another attempt may succeed, because the machine failed and not the film."""

    @classmethod
    def failed(cls, task: FilmTask, error: Exception, elapsed_s: float) -> FilmOutcome:
        """Outcome of a film whose making ended with an error."""
        text = str(error) or type(error).__name__
        machine_failed = isinstance(error, OSError | RuntimeError | MemoryError)
        if not machine_failed and not isinstance(error, ArlonError | ValueError):
            text = f"unexpected {type(error).__name__}: {error}"
        return cls(
            line=task.line,
            name=task.name,
            state="failed",
            error=text,
            elapsed_s=elapsed_s,
            may_retry=machine_failed and not isinstance(error, RunLockedError),
        )

    def to_plain(self) -> dict[str, Any]:
        """Convert to plain values for JSON."""
        return {name: value for name, value in asdict(self).items() if name != "may_retry"}


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """Options that all films of a batch have in common."""

    output_dir: str
    model: str | None = None
    """Name or path of the model. Default: the one that the storyboard names, or `shapes`."""
    num_retries: int = 2
    """Further attempts at a film after a failure of the machine."""
    hls: bool = False
    """Whether each film that is started gets an HLS stream beside it; see `pipelines.deliver.hls`."""

    def __post_init__(self) -> None:
        if "://" in self.output_dir:
            raise UsageError(f"the output folder must be a path, mount remote storage first: got {self.output_dir!r}")
        if self.num_retries < 0:
            raise UsageError(f"the number of retries must be 0 or more, got {self.num_retries}")


def read_batch(
    path: str | Path, *, film_values: Mapping[str, Any] | None = None, settings: Mapping[str, Any] | None = None
) -> list[FilmTask | FilmOutcome]:
    """Read the films of a batch.

    Args:
        path: The file.
        film_values: Film-level values of a storyboard that override those of every line.
        settings: Values of `Settings` that override those of every line.

    Returns:
        A task for each line, or the outcome that says why the line is not a film. Empty lines are left out.

    Raises:
        UsageError: If the file cannot be read or has no lines.
    """
    path = Path(path)
    try:
        lines = read_text(path).split("\n")
    except ValueError as error:
        raise UsageError(f"batch '{path}' cannot be read: {error}") from error
    films: list[FilmTask | FilmOutcome] = []
    line_of: dict[str, int] = {}
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        name = f"line {number}"
        try:
            task = _read_line(number, text, path.parent, film_values or {}, settings or {})
            name = task.name
            # Names that differ only in case or in Unicode form are one folder on some file systems.
            folder = unicodedata.normalize("NFC", name).casefold()
            if folder in line_of:
                raise UsageError(f"the name {shown(name)} is that of line {line_of[folder]}: choose another")
            line_of[folder] = number
            films.append(task)
        except ValueError as error:
            films.append(FilmOutcome(line=number, name=name, state="failed", error=str(error)))
    if not films:
        raise UsageError(f'batch \'{path}\' is empty: write one film a line, such as {{"prompts": ["a red circle"]}}')
    return films


def _read_line(
    number: int, text: str, folder: Path, film_values: Mapping[str, Any], settings: Mapping[str, Any]
) -> FilmTask:
    """Read one line of a batch, whose paths start at `folder`.

    Raises:
        ValueError: If the line is not a film.
    """
    values = parse_json(text)
    if isinstance(values, list):
        values = {"prompts": values}
    if not isinstance(values, dict):
        raise UsageError(f"must be a list of prompts or an object, got {shown(values)}")
    if unknown := sorted(set(values) - _KEYS):
        raise UsageError(f"unknown key {shown(unknown[0])}; {did_you_mean(unknown[0], sorted(_KEYS))}")
    storyboard = _read_storyboard(values, folder)
    own = {name: value for name, value in values.items() if value is not None}
    film = {name: value for name, value in own.items() if name in _FILM_KEYS}
    name = own["name"] if "name" in own else f"{number:04d}-{slug(storyboard.shots[0].prompt)}"
    _check_name(name)
    return FilmTask(
        line=number,
        name=name,
        storyboard=with_overrides(storyboard, film | dict(film_values)),
        settings={name: value for name, value in own.items() if name in _SETTING_KEYS} | dict(settings),
    )


def _read_storyboard(values: Mapping[str, Any], folder: Path) -> Storyboard:
    """Read the shots of a line.

    Raises:
        UsageError: If they are not given in exactly one way, or are wrong.
    """
    given = [name for name in SOURCES if name in values]
    if len(given) != 1:
        raise UsageError(f"give one of {', '.join(SOURCES)}, got {' and '.join(given) or 'none'}")
    if "transition" in values and given != ["prompts"]:
        raise UsageError("transition goes with prompts; in a storyboard every shot has its own")
    duration = None
    if "duration" in values:
        if not isinstance(values["duration"], int | float | str):
            raise UsageError(f"duration must be seconds or frames, got {shown(values['duration'])}")
        try:
            duration = parse_duration(values["duration"])
        except ValueError as error:
            raise UsageError(f"duration {error}") from error
    source = values[given[0]]
    if given == ["storyboard"]:
        if not isinstance(source, str) or not source:
            raise UsageError(f"storyboard must be the name of a file, got {shown(source)}")
        return load_storyboard(folder / source, default_duration=duration)
    if given == ["prompts"]:
        source = [source] if isinstance(source, str) else source
        if not isinstance(source, list) or not all(isinstance(prompt, str) for prompt in source):
            raise UsageError(f"prompts must be a list of texts, got {shown(source)}")
        # `parse_storyboard`, which this calls, refuses a transition that there is not.
        join = values.get("transition", "continue")
        return anchored(storyboard_from_prompts(source, duration=duration, transition=join), folder)
    return anchored(parse_storyboard({"shots": source}, default_duration=duration), folder)


def _check_name(name: Any) -> None:
    """Refuse a name that is not that of a folder inside the output folder.

    Raises:
        UsageError: If it is not.
    """
    is_plain = (
        isinstance(name, str) and re.fullmatch(r"\w[\w .+-]*", name) is not None and not name.endswith((" ", "."))
    )
    if not is_plain or len(name.encode()) > MAX_NAME_LENGTH:
        raise UsageError(
            f"the name must be letters, digits, spaces and any of . _ + -, begin with a letter or digit, not end with "
            f"a dot or space, and have at most {MAX_NAME_LENGTH} bytes: got {shown(name)}"
        )
    if Path(name).suffix.lower() == ".mp4":
        raise UsageError(f"the name is that of a folder: leave .mp4 out of {shown(name)}")


def attempt_film(task: FilmTask, options: BatchOptions, worker: WorkerSource = new_worker) -> FilmOutcome:
    """Make, resume or skip one film. Errors are returned in the outcome, not raised.

    Args:
        task: The film.
        options: Options of the batch.
        worker: Source of the workers; see `arlon.film.make.KeptWorkers`.
    """
    started_s = time.perf_counter()
    try:
        prepared, begin = _prepare_film(task, options)
        if begin is None:
            return FilmOutcome(line=task.line, name=task.name, state="skipped", film=str(prepared.paths.film))
        made = generate(prepared, begin=begin, worker=worker)
    except Exception as error:  # whatever is wrong with one film, the others are made
        return FilmOutcome.failed(task, error, time.perf_counter() - started_s)
    return FilmOutcome(
        line=task.line,
        name=task.name,
        state="done",
        film=str(made.film),
        num_made=made.num_made,
        elapsed_s=time.perf_counter() - started_s,
    )


def _prepare_film(task: FilmTask, options: BatchOptions) -> tuple[Prepared, Begin | None]:
    """Check a film, and choose how it begins; None if it is complete.

    Raises:
        UsageError: If the film cannot be made, or its folder holds another one.
    """
    output = Path(options.output_dir) / task.name
    run_dir = output_paths(output, task.storyboard).run_dir
    if not RunFolder(run_dir).has_run():
        prepared = prepare(task.storyboard, model=options.model, output=output, settings=task.settings, hls=options.hls)
        return prepared, start_run
    run = open_run(run_dir)
    if difference := _difference(run, task, options):
        raise UsageError(f"'{run_dir}' holds a film with {difference}: give this one another name, or delete that one")
    is_complete = read_status(run_dir).state == "complete"
    return run.prepared, None if is_complete else lambda *_: continue_run(run)


def _difference(run: Run, task: FilmTask, options: BatchOptions) -> str | None:
    """Name what a run and a task disagree on; None if nothing. What the task leaves open, its run has decided."""
    found = run.plan.storyboard
    seed = found.seed if task.storyboard.seed is None else task.storyboard.seed
    planned = plan_film(replace(task.storyboard, seed=seed), options.model)
    if planned.identity["hash"] != run.record["model"]["hash"]:
        return "another model"
    # The same model may have two names, and its content was just compared.
    boards = (replace(board, model=None).to_plain() for board in (found, planned.plan.storyboard))
    if len({hash_plain(board) for board in boards}) > 1:
        return "another storyboard"
    asked = make_settings(planned.plan.geometry, task.settings)
    used = run.prepared.job.settings
    different = [name for name in task.settings if getattr(asked, name) != getattr(used, name)]
    return f"another {' and '.join(different)}" if different else None


def run_batch_local(tasks: list[FilmTask], options: BatchOptions) -> Iterator[FilmOutcome]:
    """Make films one after another in this process, with networks that are loaded once."""
    worker = KeptWorkers()
    for task in tasks:
        outcome = attempt_film(task, options, worker)
        num_attempts = 1
        while outcome.may_retry and num_attempts <= options.num_retries:
            outcome = attempt_film(task, options, worker)
            num_attempts += 1
        yield replace(outcome, num_attempts=num_attempts)
