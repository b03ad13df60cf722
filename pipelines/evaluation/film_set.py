"""Sets of films to measure: which files they are, and which prompts they were made from.

Films are files, run folders, or folders that are searched to any depth. A search leaves out the segments of runs, films
that still grow, their HLS streams, and exports for VBench. The prompts of a film come from a prompt file, or else from
the record inside or beside the film, or else from a file name in VBench's form (`a red circle-0.mp4`).

A prompt file is either JSON that maps the name of a film to a prompt, or to a list of prompts, one for each shot; or
text with one prompt a line, in the order of the film names (2 before 10). What is wrong with one film or prompt is
collected, and the others are measured.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arlon.data.video_io import read_tags
from arlon.evaluation.film import FilmShot, Outline
from arlon.film.record import RECORD_TAG
from arlon.film.strict_yaml import parse_json, read_text, shown
from pipelines.deliver.hls import PLAYLIST_NAME
from pipelines.deliver.sheet import find_film
from pipelines.store.run_folder import RUN_NAME

FILM_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
PARTIAL = ".partial"
SEGMENT_MARK = "segment.json"
EXPORT_MARK = "arlon_full_info.json"
"""File that marks a folder with copies of films for VBench."""
MAX_DIGITS = 24
"""Most digits of numbers in file names that are sorted by their value."""
_NUMBERED = re.compile(r"(?P<prompt>.*\S.*\s.*\S)-\d+")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A film, prompt or network that could not be used."""

    source: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class FilmFile:
    """A film to measure."""

    name: str
    """Path relative to the folder that holds all films, with `/`."""
    path: Path
    prompts: tuple[str, ...] | None = None
    """Prompts from a prompt file; None if its record or name gives them."""


def find_films(sources: Sequence[Path], *, leave_out: Path | None = None) -> tuple[list[FilmFile], list[Problem]]:
    """Find the films in files and folders, each once, sorted by name, with numbers in names by their value.

    Args:
        sources: Files and folders.
        leave_out: Folder that is not searched, unless it is a source itself.

    Returns:
        The films, and the sources that could not be used.
    """
    paths: list[Path] = []
    problems: list[Problem] = []
    for source in sources:
        try:
            films = _films_of(source, leave_out, problems)
        except (OSError, ValueError) as error:
            problems.append(Problem(source=str(source), reason=_reason(error)))
            continue
        if not films:
            problems.append(Problem(source=str(source), reason=f"no film in it ({', '.join(FILM_SUFFIXES)})"))
        paths += films
    found = {path.resolve(): Path(os.path.abspath(path)) for path in paths}  # abspath: a link keeps its own name
    unique = sorted(found.values(), key=_sort_key)
    if not unique:
        return [], problems
    common = Path(os.path.commonpath([path.parent for path in unique]))
    return [FilmFile(name=path.relative_to(common).as_posix(), path=path) for path in unique], problems


def _sort_key(path: Path) -> tuple[list[str], Path]:
    """Sort key of a path under which `film 2` comes before `film 10`."""
    return [re.sub("[0-9]+", lambda number: number[0].zfill(MAX_DIGITS), part) for part in path.parts], path


def _films_of(source: Path, leave_out: Path | None, problems: list[Problem]) -> list[Path]:
    """Find the films of one source; folders that cannot be searched are added to `problems`.

    Raises:
        FileNotFoundError: If there is no such source.
        ValueError: If it is a run whose film is not finished.
    """

    def note(error: OSError) -> None:
        problems.append(Problem(source=str(error.filename), reason=_reason(error)))

    if not source.exists():
        raise FileNotFoundError("no such file or folder")
    if source.is_file():
        return [source]
    if (source / RUN_NAME).is_file():
        film = find_film(source)
        if film.stem.endswith(PARTIAL):
            raise ValueError(f"its film is not finished: there is only '{film.name}'")
        return [film]
    found = []
    for folder, names, files in os.walk(source, onerror=note):
        if _is_left_out(Path(folder), files, source, leave_out):
            names.clear()
            continue
        names.sort()
        paths = (Path(folder) / name for name in files)
        found += [p for p in paths if p.suffix.lower() in FILM_SUFFIXES and not p.stem.endswith(PARTIAL)]
    return found


def _is_left_out(folder: Path, files: Sequence[str], source: Path, leave_out: Path | None) -> bool:
    """Whether a search skips a folder, with everything in it."""
    if leave_out is not None and folder != source and folder.resolve() == leave_out.resolve():
        return True
    has_copies = EXPORT_MARK in files or PLAYLIST_NAME in files
    return SEGMENT_MARK in files or (folder != source and (has_copies or folder.name.endswith(PARTIAL)))


# --- prompts -------------------------------------------------------------------------------------------------


def add_prompts(films: Sequence[FilmFile], prompt_file: Path) -> tuple[list[FilmFile], list[Problem]]:
    """Give films the prompts of a file; a film that the file does not name, or names wrongly, stays as it is.

    Returns:
        The films, and what is wrong with the file.
    """
    source = prompt_file.name
    try:
        text = read_text(prompt_file)
        if prompt_file.suffix.lower() in (".jsonl", ".csv", ".yaml", ".yml"):
            raise ValueError("expected JSON (.json), or text with one prompt a line (.txt)")
        is_json = prompt_file.suffix.lower() == ".json"
        added, problems = _add_by_name(films, parse_json(text), source) if is_json else _add_by_line(films, text)
        misfits = [_misfit(film) for film in added]
        problems += [Problem(source=source, reason=reason) for reason in misfits if reason]
        return [film if misfit else new for film, new, misfit in zip(films, added, misfits, strict=True)], problems
    except ValueError as error:
        return list(films), [Problem(source=source, reason=f"not a prompt file: {_reason(error)}")]


def _add_by_name(films: Sequence[FilmFile], data: Any, source: str) -> tuple[list[FilmFile], list[Problem]]:
    if not isinstance(data, Mapping):
        raise ValueError("expected a mapping of film name to prompt, or to a list of prompts")
    prompts: dict[str, tuple[str, ...]] = {}
    reasons = []
    known = {name for film in films for name in (film.name, film.path.name)}
    for name, value in data.items():
        given = [value] if isinstance(value, str) else value
        if name not in known:
            reasons.append(f"{shown(name)}: no such film")
        elif not isinstance(given, list) or not given or not all(isinstance(p, str) and p.strip() for p in given):
            reasons.append(f"{shown(name)}: expected a prompt or a list of prompts, got {shown(value)}")
        else:
            prompts[name] = tuple(given)
    added = [_with_prompts(film, prompts.get(film.name, prompts.get(film.path.name))) for film in films]
    unnamed = (film.name for film in films if not {film.name, film.path.name} & {*data})
    reasons += [f"no prompt for the film {shown(name)}" for name in unnamed]
    return added, [Problem(source=source, reason=reason) for reason in reasons]


def _add_by_line(films: Sequence[FilmFile], text: str) -> tuple[list[FilmFile], list[Problem]]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) != len(films):
        raise ValueError(f"expected one prompt a line for each of {len(films)} films, got {len(lines)} lines")
    return [_with_prompts(film, (line,)) for film, line in zip(films, lines, strict=True)], []


def _misfit(film: FilmFile) -> str:
    """Say why the given prompts of a film cannot be those of its shots; empty if they can, or if it is unreadable."""
    if film.prompts is None:
        return ""
    try:
        record = _read_record(film.path, read_tags(film.path))
        shots = [] if record is None else record["timeline"]["shots"]
        if not shots or len(shots) == len(film.prompts):
            return ""
        given = "1 prompt is" if len(film.prompts) == 1 else f"{len(film.prompts)} prompts are"
        return f"{shown(film.name)}: {given} given for its {len(shots)} shots; those of its record are used"
    except (OSError, ValueError, KeyError, TypeError):  # reported when the film is measured
        return ""


def _with_prompts(film: FilmFile, prompts: tuple[str, ...] | None) -> FilmFile:
    return FilmFile(name=film.name, path=film.path, prompts=prompts)


# --- outlines ------------------------------------------------------------------------------------------------


def outline_of(film: FilmFile, tags: Mapping[str, str], num_frames: int) -> Outline:
    """Find the shots and segments of a film.

    Args:
        film: The film.
        tags: Tags of its container.
        num_frames: Frames that it has.

    Raises:
        ValueError: If its record is damaged, names another number of frames, or does not fit the given prompts.
    """
    record = _read_record(film.path, tags)
    if record is None:
        return _outline_without_record(film, num_frames)
    try:
        outline = _outline_from_record(record["timeline"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"its record has no usable timeline ({type(error).__name__}: {error})") from error
    named = max((shot.start_frame + shot.num_frames for shot in outline.shots), default=0)
    if named > num_frames:
        raise ValueError(f"it is cut off: its record names {named} frames, it has {num_frames}")
    if named < num_frames:
        raise ValueError(
            f"it was changed: its record names {named} frames, it has {num_frames}; give the film as it was made, or a "
            "copy without its record"
        )
    if film.prompts is None:
        return outline
    if len(film.prompts) != len(outline.shots):
        raise ValueError(f"{len(film.prompts)} prompts are given for its {len(outline.shots)} shots")
    pairs = zip(outline.shots, film.prompts, strict=True)
    shots = tuple(
        FilmShot(prompt=prompt, start_frame=s.start_frame, num_frames=s.num_frames, is_cut=s.is_cut)
        for s, prompt in pairs
    )
    return Outline(shots=shots, segment_starts=outline.segment_starts)


def _read_record(path: Path, tags: Mapping[str, str]) -> dict[str, Any] | None:
    """Read the record inside a film, or else in the sidecar beside it; None if it has neither.

    Raises:
        ValueError: If the film has only a sidecar, and that is not JSON.
    """
    found = {name.lower(): text for name, text in tags.items()}  # Matroska writes tag names in capitals
    with suppress(ValueError, RecursionError):  # any program may write a comment into a film
        record = json.loads(found.get(RECORD_TAG, ""))
        if isinstance(record, dict) and "timeline" in record:
            return record
    sidecar = path.with_suffix(".json")
    if not sidecar.is_file():
        return None
    try:
        record = json.loads(sidecar.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{sidecar.name}' beside it is not valid JSON: {error}") from error
    return record if isinstance(record, dict) and "timeline" in record else None


def _outline_from_record(timeline: Mapping[str, Any]) -> Outline:
    shots = tuple(
        FilmShot(
            prompt=str(shot["prompt"] or ""),
            start_frame=int(shot["start_frame"]),
            num_frames=int(shot["num_frames"]),
            is_cut=index > 0 and shot["transition"] == "cut",
        )
        for index, shot in enumerate(timeline["shots"])
    )
    if not shots:
        raise ValueError("no shots")
    for number, shot in enumerate(shots, start=1):
        if shot.start_frame < 0 or shot.num_frames < 1:
            raise ValueError(f"shot {number} has {shot.num_frames} frames from frame {shot.start_frame} on")
    starts = timeline.get("segment_starts")
    return Outline(shots=shots, segment_starts=None if starts is None else tuple(int(start) for start in starts))


def prompt_of_name(path: Path) -> str | None:
    """Read the prompt in a file name such as `a red circle-0.mp4`; None if the name has another form."""
    match = _NUMBERED.fullmatch(path.stem)
    return match["prompt"] if match else None


def _outline_without_record(film: FilmFile, num_frames: int) -> Outline:
    """Outline of a film that says nothing of its shots: the given prompts share it evenly."""
    prompts = film.prompts or (prompt_of_name(film.path) or "",)
    if len(prompts) > num_frames:
        raise ValueError(f"{len(prompts)} prompts are given for its {num_frames} frames")
    ends = [round(num_frames * (index + 1) / len(prompts)) for index in range(len(prompts))]
    starts = [0, *ends[:-1]]
    shots = tuple(
        FilmShot(prompt=prompt, start_frame=start, num_frames=end - start)
        for prompt, start, end in zip(prompts, starts, ends, strict=True)
    )
    return Outline(shots=shots)


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error).strip() or type(error).__name__
