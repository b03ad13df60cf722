"""Paths of a film and its other files, and whether they can be written.

    --output film.mp4     film.mp4, film.json (sidecar), film.run/ (run folder)
    --output folder       folder/film.mp4, folder/film.json; the folder is the run folder
    nothing               outputs/<first prompt>-<seed>/ as such a folder

With `--hls` the folder film.hls is beside the film. While the film grows it is film.partial.mp4, which plays.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arlon.errors import UsageError
from arlon.files import sweep
from arlon.film.storyboard import Storyboard
from arlon.film.strict_yaml import shown
from pipelines.store.run_folder import RUN_NAME, RunFolder, RunFolderError

MAX_SLUG_LENGTH = 40


@dataclass(frozen=True, kw_only=True)
class OutputPaths:
    """Paths of a film and its other files."""

    film: Path
    run_dir: Path

    @property
    def partial(self) -> Path:
        """Path of the film while it grows."""
        return self.film.with_name(f"{self.film.stem}.partial.mp4")

    @property
    def film_from_run_dir(self) -> str:
        """Path of the film relative to the run folder; `paths_of_run` reads it."""
        return self.film.name if self.film.parent == self.run_dir else f"../{self.film.name}"

    @property
    def hls(self) -> Path:
        """Folder of the film as a stream, which is made on request."""
        return self.film.with_suffix(".hls")

    @property
    def sidecar(self) -> Path:
        """Path of the JSON file that says what the film was made from."""
        return self.film.with_suffix(".json")

    def sweep(self) -> None:
        """Remove what a crash left of the film and its sidecar while they were written."""
        sweep([self.film.parent], (self.film.name, self.sidecar.name))

    def resolved(self) -> OutputPaths:
        """The same places as absolute paths, for a process with another working folder."""
        return OutputPaths(film=self.film.parent.resolve() / self.film.name, run_dir=self.run_dir.resolve())


@dataclass(frozen=True, kw_only=True)
class FilmOutput:
    """Where a film is written while it is made, and what is written into it besides its frames."""

    paths: OutputPaths
    """Absolute."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Metadata of the film; empty if it shall carry none."""
    has_stream: bool = False
    """Whether an HLS stream is made beside the film."""


def output_paths(output: str | Path | None, storyboard: Storyboard) -> OutputPaths:
    """Choose the paths of a film.

    Args:
        output: Path of the film (`.mp4`) or of a folder. Default: a new folder under `outputs`.
        storyboard: The film, for the name of that folder.

    Raises:
        UsageError: If `output` names another kind of file.
    """
    if output is None:
        run_dir = Path("outputs") / f"{slug(storyboard.shots[0].prompt)}-{storyboard.seed}"
        return OutputPaths(film=run_dir / "film.mp4", run_dir=run_dir)
    if not str(output):
        raise UsageError("the output is empty: name a film.mp4 or a folder")
    path = Path(output).expanduser()
    if path.suffix.lower() == ".mp4":
        return OutputPaths(film=path, run_dir=path.with_suffix(".run"))
    if path.suffix.lower() in (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mpg", ".webm"):
        raise UsageError(f"films are written as .mp4: name the output '{path.with_suffix('.mp4')}'")
    return OutputPaths(film=path / "film.mp4", run_dir=path)


def paths_of_run(run_dir: Path, film: Any) -> OutputPaths:
    """Find the paths of the film of a run.

    Args:
        run_dir: The run folder.
        film: Path of the film relative to it, as `run.json` says.

    Raises:
        RunFolderError: If the film is neither in the run folder nor beside it.
    """
    name = str(film).removeprefix("../")
    if not isinstance(film, str) or Path(name).name != name or Path(name).suffix.lower() != ".mp4":
        raise RunFolderError(f"'{run_dir}' names no film in or beside it, got {shown(film)}")
    if film == name:
        return OutputPaths(film=run_dir / name, run_dir=run_dir)
    if run_dir.name in ("", ".."):
        run_dir = run_dir.resolve()
    return OutputPaths(film=run_dir.parent / name, run_dir=run_dir)


def slug(text: str) -> str:
    """Make a short, safe folder name from a prompt."""
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return words[:MAX_SLUG_LENGTH].strip("-") or "film"


def check_output(paths: OutputPaths, *, overwrite: bool) -> None:
    """Refuse to replace a film unasked, and make sure that both folders can be written. Nothing is created.

    Args:
        paths: Paths of the film.
        overwrite: Whether a film or a run that is already there may be replaced.

    Raises:
        UsageError: If something is there that must not be replaced.
        OSError: If a folder cannot be written.
    """
    for path in (paths.film, paths.sidecar, paths.partial):
        if path.is_dir():
            raise UsageError(f"'{path}' is a folder, a file cannot be written there: choose another --output")
        if path.exists() and not path.is_file():  # opening a pipe would block until somebody reads it
            raise UsageError(f"'{path}' is a device or a pipe, not a file: choose another --output")
    if not overwrite:
        for path in (paths.film, paths.sidecar):
            if path.exists():
                raise UsageError(f"'{path}' exists: choose another --output, or replace it with --overwrite")
        if RunFolder(paths.run_dir).has_run():
            raise UsageError(
                f"'{paths.run_dir}' holds another run: choose another --output, or replace it with --overwrite"
            )
    elif (run := RunFolder(paths.run_dir)).has_run() and not run.is_ours():
        raise UsageError(f"will not replace what this program did not write: '{run.path / RUN_NAME}' tells of no film")
    for folder in (paths.run_dir, paths.film.parent):
        check_output_folder(folder)


def check_output_folder(folder: Path) -> None:
    """Refuse a folder that cannot be written or, if it is missing, made.

    Raises:
        OSError: If it cannot.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise OSError(f"cannot write to '{folder}': '{there}' is not a folder")
    probe = there / f".arlon-{os.getpid()}.tmp"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"cannot write to '{folder}': {error.strerror or error}") from error
