"""Many films, one a line of a file: what each is, how one is made, and a run of all in this process.

A line of `films.jsonl` is a list of prompts, or an object:

    ["a red circle moves left", "a green circle moves left"]
    {"name": "circle", "prompts": ["a red circle moves left"], "duration": 4, "seed": 7}
    {"storyboard": "boards/two.yaml", "num_inference_steps": 8}
    {"shots": [{"prompt": "a blue square", "duration": "51f"}], "fps": 8}

`storyboard` is a file, looked for beside `films.jsonl`, and so are files that prompts and `shots`, a storyboard written
out, name. Other keys are film-level keys of a storyboard and settings. A film without a name gets one of its line and
its first prompt. Film NAME is made in OUTPUT_DIR/NAME as `arlon generate --output OUTPUT_DIR/NAME` makes it, so every
command on runs works there, and a second run of the batch goes on where the first ended.

A film that cannot be made is a row of the result, never the end of the batch.
"""

from __future__ import annotations

import re
import time
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from arlon.errors import UsageError
from arlon.files import hash_plain
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
from arlon.film.storyboard_values import parse_duration
from arlon.film.strict_yaml import parse_json, read_text, shown
from pipelines.deliver.paths import output_paths, slug
from pipelines.executors.local import WorkerSource, new_worker
from pipelines.runs.generate import Begin, Prepared, generate, prepare, start_run
from pipelines.runs.resume import Run, continue_run, open_run
from pipelines.runs.status import read_status
from pipelines.store.lock import RunLockedError
from pipelines.store.run_folder import RunFolder

MAX_NAME_LENGTH = 100
SOURCES = ("prompts", "storyboard", "shots")
_FILM_KEYS = frozenset(field.name for field in fields(Storyboard)) - {"shots", "model"}
_SETTING_KEYS = frozenset(field.name for field in fields(Settings))
_KEYS = frozenset({"name", "duration", "transition", *SOURCES}) | _FILM_KEYS | _SETTING_KEYS

State = Literal["done", "skipped", "failed"]


@dataclass(frozen=True, kw_only=True)
class FilmTask:
    """One film of a batch."""

    line: int
    """In the file, from 1."""
    name: str
    storyboard: Storyboard
    settings: Mapping[str, Any]
    """Values of `Settings`, where they differ from the model's."""


@dataclass(frozen=True, kw_only=True)
class FilmOutcome:
    """What became of a film of a batch."""

    line: int
    name: str
    state: State
    """`skipped`: it was complete before."""
    film: str | None = None
    num_made: int = 0
    """Segments made in the last attempt."""
    num_attempts: int = 0
    elapsed_s: float = 0.0
    error: str | None = None
    may_retry: bool = False
    """Whether another attempt could do better: the machine failed, not the film."""

    def to_plain(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {name: value for name, value in asdict(self).items() if name != "may_retry"}


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """What all films of a batch have in common."""

    output_dir: str
    model: str | None = None
    """Name or path of the model; None: the storyboard's, or `shapes`."""
    num_retries: int = 2
    """Further attempts at a film after a failure that may pass."""
    hls: bool = False
    """Make an HLS stream beside every film that is begun; see `pipelines.deliver.hls`."""

    def __post_init__(self) -> None:
        if "://" in self.output_dir:
            raise UsageError(f"the output folder must be a path, mount what is elsewhere: got {self.output_dir!r}")
        if self.num_retries < 0:
            raise UsageError(f"the number of retries must be 0 or more, got {self.num_retries}")


def read_batch(
    path: str | Path, *, film_values: Mapping[str, Any] | None = None, settings: Mapping[str, Any] | None = None
) -> list[FilmTask | FilmOutcome]:
    """Read the films of a batch.

    Args:
        path: The file.
        film_values: Film-level values that all films get, whatever their lines say.
        settings: Values of `Settings` that all films get, whatever their lines say.

    Returns:
        A task a line, or for a line that is no film the outcome that says why; empty lines are left out.

    Raises:
        UsageError: If the file cannot be read or holds no line.
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
            folder = unicodedata.normalize("NFC", name).casefold()  # one folder on some file systems
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
    values = parse_json(text)
    if isinstance(values, list):
        values = {"prompts": values}
    if not isinstance(values, dict):
        raise UsageError(f"must be a list of prompts or an object, got {shown(values)}")
    if unknown := sorted(set(values) - _KEYS):
        raise UsageError(f"unknown key {shown(unknown[0])}; known: {', '.join(sorted(_KEYS))}")
    storyboard = _read_storyboard(values, folder)
    own = {name: value for name, value in values.items() if value is not None}
    film = {name: value for name, value in own.items() if name in _FILM_KEYS}
    name = own["name"] if "name" in own else f"{number:04d}-{slug(storyboard.shots[0].prompt)}"
    return FilmTask(
        line=number,
        name=_checked_name(name),
        storyboard=with_overrides(storyboard, film | dict(film_values)),
        settings={name: value for name, value in own.items() if name in _SETTING_KEYS} | dict(settings),
    )


def _read_storyboard(values: Mapping[str, Any], folder: Path) -> Storyboard:
    given = [name for name in SOURCES if name in values]
    if len(given) != 1:
        raise UsageError(f"give one of {', '.join(SOURCES)}, got {' and '.join(given) or 'none'}")
    if "duration" in values and not isinstance(values["duration"], int | float | str):
        raise UsageError(f"duration must be seconds or frames, got {shown(values['duration'])}")
    duration = None if "duration" not in values else _duration(values["duration"])
    if "transition" in values and given != ["prompts"]:
        raise UsageError("transition goes with prompts; in a storyboard every shot has its own")
    source = values[given[0]]
    if given == ["storyboard"]:
        if not isinstance(source, str) or not source:
            raise UsageError(f"storyboard must be the name of a file, got {shown(source)}")
        return load_storyboard(folder / source, default_duration=duration)
    if given == ["prompts"]:
        source = [source] if isinstance(source, str) else source
        if isinstance(source, list) and all(isinstance(prompt, str) for prompt in source):
            join = values.get("transition", "continue")
            return anchored(storyboard_from_prompts(source, duration=duration, transition=join), folder)
        raise UsageError(f"prompts must be a list of texts, got {shown(source)}")
    return anchored(parse_storyboard({"shots": source}, default_duration=duration), folder)


def _duration(value: Any) -> Any:
    try:
        return parse_duration(value)
    except ValueError as error:
        raise UsageError(f"duration {error}") from error


def _checked_name(name: Any) -> str:
    """A name that is that of a folder, in the output folder and nowhere else.

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
    return name


def attempt_film(task: FilmTask, options: BatchOptions, worker: WorkerSource = new_worker) -> FilmOutcome:
    """Make a film, go on with it, or find it complete; whatever fails is told by the outcome.

    Args:
        task: The film.
        options: Of the batch.
        worker: Builds workers, or has them from the film before.
    """
    started_s = time.perf_counter()
    known = {"line": task.line, "name": task.name}
    try:
        prepared, begin = _prepare_film(task, options)
        if begin is None:
            return FilmOutcome(**known, state="skipped", film=str(prepared.paths.film))
        made = generate(prepared, begin=begin, worker=worker)
    except Exception as error:
        is_ours = isinstance(error, ValueError | OSError | RuntimeError | MemoryError)
        return FilmOutcome(
            **known,
            state="failed",
            error=str(error) or type(error).__name__ if is_ours else f"unexpected {type(error).__name__}: {error}",
            elapsed_s=time.perf_counter() - started_s,
            may_retry=isinstance(error, OSError | RuntimeError | MemoryError) and not isinstance(error, RunLockedError),
        )
    elapsed_s = time.perf_counter() - started_s
    return FilmOutcome(**known, state="done", film=str(made.film), num_made=made.num_made, elapsed_s=elapsed_s)


def _prepare_film(task: FilmTask, options: BatchOptions) -> tuple[Prepared, Begin | None]:
    """The film, checked, and how it begins; None: it is complete."""
    output = Path(options.output_dir) / task.name
    run_dir = output_paths(output, task.storyboard).run_dir
    if not RunFolder(run_dir).has_run():
        prepared = prepare(task.storyboard, model=options.model, output=output, settings=task.settings, hls=options.hls)
        return prepared, start_run
    run = open_run(run_dir)
    if difference := _difference(run, task, options):
        raise UsageError(f"'{run_dir}' holds a film with {difference}: name this one otherwise, or delete that")
    is_complete = read_status(run_dir).state == "complete"
    return run.prepared, None if is_complete else lambda *_: continue_run(run)


def _difference(run: Run, task: FilmTask, options: BatchOptions) -> str | None:
    """In what a run is not the film asked for; what the task leaves open, its run has decided."""
    found = run.plan.storyboard
    seed = found.seed if task.storyboard.seed is None else task.storyboard.seed
    planned = plan_film(replace(task.storyboard, seed=seed), options.model)
    if planned.identity["hash"] != run.record["model"]["hash"]:
        return "another model"
    boards = (replace(board, model=None).to_plain() for board in (found, planned.plan.storyboard))
    if len({hash_plain(board) for board in boards}) > 1:
        return "another storyboard"
    asked = make_settings(planned.plan.geometry, task.settings)
    used = run.prepared.job.settings
    different = [name for name in task.settings if getattr(asked, name) != getattr(used, name)]
    return f"another {' and '.join(different)}" if different else None


def run_batch_local(tasks: list[FilmTask], options: BatchOptions) -> Iterator[FilmOutcome]:
    """Make films one after another in this process; networks are loaded once."""
    from pipelines.executors.local import KeptWorkers

    worker = KeptWorkers()
    for task in tasks:
        outcome = attempt_film(task, options, worker)
        num_attempts = 1
        while outcome.may_retry and num_attempts <= options.num_retries:
            outcome = attempt_film(task, options, worker)
            num_attempts += 1
        yield replace(outcome, num_attempts=num_attempts)
