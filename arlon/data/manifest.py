"""Manifests: which videos and pictures to train on, and what each one shows.

A manifest is a table, one row a clip, with the column names of Open-Sora's data tools (v1.2,
`docs/data_processing.md`):

    path         video file, or picture; a relative path starts at the folder of the manifest
    text         caption
    num_frames   frames in the file; 1 for a picture
    height       pixels
    width        pixels
    fps          frames a second; optional, taken from the file if absent; not used for a picture

Other columns (`aes`, `flow`, `id`, ...) are kept as they are and not used. Two formats, by suffix: JSON lines
(`.jsonl`, one object a line) and CSV (`.csv`, header in the first line, UTF-8).
"""

from __future__ import annotations

import csv
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from arlon.data import video_io
from arlon.data.pictures import IMAGE_FPS, PICTURE_SUFFIXES, read_picture
from arlon.data.transforms import Filter
from arlon.errors import ManifestError, indent_lines
from arlon.files import atomic_file

log = logging.getLogger(__name__)

REQUIRED_COLUMNS = ("path", "text", "num_frames", "height", "width")
VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".gif"})
MIN_FPS = 0.01
"""Frames a second of a video, at least; at most `video_io.MAX_FPS`."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One row of a manifest."""

    path: Path
    """Video or picture file, absolute or relative to the working directory."""
    text: str
    """Caption."""
    num_frames: int
    """Frames in the file."""
    height: int
    """Pixels."""
    width: int
    """Pixels."""
    fps: float
    """Frames a second of the file."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Columns this project does not use."""

    @property
    def is_picture_file(self) -> bool:
        """Whether the file is a picture, going by its suffix."""
        return self.path.suffix.lower() in PICTURE_SUFFIXES

    @property
    def filter(self) -> Filter:
        """How its frames are scaled."""
        return "bicubic" if self.is_picture_file else "bilinear"

    def read(self, *, start: int, num_frames: int, fps: float | None) -> np.ndarray:
        """Frames (pT, pH, pW, 3) uint8 of the file, as `read_video` gives them; of a picture its one frame.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it cannot be read, or is too short; the message names it.
        """
        if not self.is_picture_file:
            return video_io.read_video(self.path, start=start, num_frames=num_frames, fps=fps)
        if (start, num_frames) != (0, 1):
            raise ValueError(f"'{self.path}' is a picture: frame 0 is all it has, got {num_frames} from {start} on")
        return _read_picture(self.path)


def read_manifest(path: str | Path, *, check_files: bool = True) -> list[Clip]:
    """Read and validate a manifest.

    Args:
        path: A `.jsonl` or `.csv` file.
        check_files: Open every file and hold its size and length against the row. Without it, files are
            opened only if a row has no `fps`.

    Returns:
        The clips, at least one, in the order of the file. Rows that repeat both file and caption are left out, with a
        warning.

    Raises:
        FileNotFoundError: If there is no such manifest.
        ManifestError: If anything in it is wrong: format, a missing column, a value, no row, a file that is
            missing, unreadable, no video or other than its row says. All problems are listed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such manifest: '{path}'")
    rows = _read_rows(path)
    if not rows:
        raise ManifestError(f"manifest '{path}' has no rows: it must name at least one clip")
    clips, problems = [], []
    for label, row in rows:
        try:
            clips.append(_row_to_clip(row, path.parent, check_file=check_files))
        except ValueError as error:
            problems += [f"{label}: {line}" for line in str(error).splitlines()]
    if problems:
        raise _listed(f"manifest '{path}'", problems)
    # A second row would train on the clip twice, or validate on what is trained on. Other captions are other samples.
    unique = {(os.path.abspath(clip.path), clip.text): clip for clip in reversed(clips)}
    if len(unique) < len(clips):
        repeated = len(clips) - len(unique)
        log.warning("%d of %d rows of '%s' repeat a file and its caption: left out", repeated, len(clips), path)
    return list(reversed(unique.values()))


def write_manifest(clips: Sequence[Clip], path: str | Path) -> None:
    """Write a manifest that `read_manifest` reads back; it is written atomically.

    Paths below the folder of the manifest are written relative to it, so that the folder can be moved.

    Raises:
        ManifestError: If there is no clip, or the suffix is neither `.jsonl` nor `.csv`.
    """
    path = Path(path)
    if not clips:
        raise ManifestError(f"manifest '{path}' would have no rows: give at least one clip")
    writer = _format_of(path, {".jsonl": _write_json_lines, ".csv": _write_csv})
    with atomic_file(path) as temporary:
        writer(temporary, [_clip_to_row(clip, path.parent) for clip in clips])


def build_manifest(folder: str | Path, *, skip_bad: bool = False) -> list[Clip]:
    """Describe all captioned videos and pictures below a folder, in the order of their paths.

    The caption of `name.mp4` or `name.jpg` is the content of `name.txt` beside it, with white space collapsed.

    Args:
        folder: Searched through all its subfolders; hidden ones are left out.
        skip_bad: Leave unusable files out, with a warning each and their number, instead of refusing the folder.

    Returns:
        The clips, at least one.

    Raises:
        FileNotFoundError: If there is no such folder.
        ManifestError: If there is no usable file, or (without `skip_bad`) any is unreadable or has no
            caption.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: '{folder}'")
    clips, problems = [], []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or path.suffix.lower() not in VIDEO_SUFFIXES | PICTURE_SUFFIXES or not path.is_file():
            continue
        try:
            clips.append(_describe(path))
        except ValueError as error:
            problems.append(str(error))
            if skip_bad:
                log.warning("left out: %s", error)
    if problems and not skip_bad:
        raise _listed(f"folder '{folder}'", problems)
    if not clips:
        suffixes = ", ".join(sorted(VIDEO_SUFFIXES | PICTURE_SUFFIXES))
        left_out = f"; {len(problems)} files are left out" if problems else ""
        raise ManifestError(f"folder '{folder}' holds no usable video or picture ({suffixes}){left_out}")
    if problems:
        log.warning("%d of %d files below '%s' are left out", len(problems), len(clips) + len(problems), folder)
    return clips


class FileInfo(NamedTuple):
    """Number of frames, sizes and rate of a file; pixels are counted after the rotation that the file asks for."""

    num_frames: int
    height: int
    width: int
    fps: float


def _probe(path: Path) -> FileInfo:
    """Describe a video or a picture.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read; the message names it.
    """
    if path.suffix.lower() in PICTURE_SUFFIXES:
        _, height, width, _ = _read_picture(path).shape
        return FileInfo(1, height, width, IMAGE_FPS)
    info = video_io.probe(path)
    return FileInfo(info.num_frames, info.height, info.width, info.fps)


def _read_picture(path: Path) -> np.ndarray:
    if not path.exists():
        raise FileNotFoundError(f"no such picture file: '{path}'")
    try:
        return read_picture(path)
    except ValueError as error:
        raise ValueError(f"cannot read '{path}' as picture: {error}") from error


# --- rows ---------------------------------------------------------------------------------------------------


def _row_to_clip(row: Mapping[str, Any], folder: Path, *, check_file: bool) -> Clip:
    """Turn a row into a clip.

    Raises:
        ValueError: One line for each problem of the row.
    """
    problems: list[str] = [f"missing value or column {name!r}" for name in REQUIRED_COLUMNS if _is_empty(row.get(name))]
    for name in ("path", "text"):
        if not _is_empty(row.get(name)) and not _is_text(row[name]):
            problems.append(f"{name} must be text that UTF-8 can hold, got {row[name]!r}")

    path = folder / row["path"] if _is_text(row.get("path")) else folder
    is_picture = path.suffix.lower() in PICTURE_SUFFIXES
    numbers = ("num_frames", "height", "width") if is_picture else ("num_frames", "height", "width", "fps")
    given: dict[str, float] = {}
    for name in numbers:
        if not _is_empty(row.get(name)):
            try:
                given[name] = _number(name, row[name])
            except ValueError as error:
                problems.append(str(error))
    if is_picture:
        given["fps"] = IMAGE_FPS
    info = None
    if path != folder and (check_file or "fps" not in given):
        try:
            info = _probe(path)
        except (OSError, ValueError) as error:
            problems.append(str(error))
    if info is not None and check_file:
        problems += _mismatches(given, info, path)
    if info is not None:
        given.setdefault("fps", info.fps)
    if problems:
        raise ValueError("\n".join(problems))
    return Clip(
        path=path,
        text=str(row["text"]).strip(),
        num_frames=int(given["num_frames"]),
        height=int(given["height"]),
        width=int(given["width"]),
        fps=given["fps"],
        extra={name: value for name, value in row.items() if name not in (*REQUIRED_COLUMNS, "fps")},
    )


def _number(name: str, given: Any) -> float:
    """A size, a count or a rate.

    Raises:
        ValueError: If it is none.
    """
    try:
        value = math.nan if isinstance(given, bool) else float(given)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if name == "fps":
        if not MIN_FPS <= value <= video_io.MAX_FPS:
            raise ValueError(f"fps must be a number from {MIN_FPS} to {video_io.MAX_FPS}, got {given!r}")
    elif not (0 < value < math.inf and value == int(value)):
        raise ValueError(f"{name} must be a positive whole number, got {given!r}")
    return value


def _mismatches(given: Mapping[str, float], info: FileInfo, path: Path) -> list[str]:
    """Problems of a row that says something else than the file; of rates only great ones, as they are means."""
    rates = [given.get("fps", info.fps), info.fps]
    unlike = [f"fps is {rates[0]:g}, but '{path}' has {rates[1]:g}"] if max(rates) > 1.5 * min(rates) else []
    return unlike + [
        f"{name} is {given[name]:g}, but '{path}' has {getattr(info, name)}"
        for name in ("num_frames", "height", "width")
        if name in given and given[name] != getattr(info, name)
    ]


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _is_text(value: Any) -> bool:
    """Whether a value is text without halves of characters, which stand for bytes of file names that are not UTF-8."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _describe(path: Path) -> Clip:
    if not _is_text(str(path)):
        raise ManifestError(f"{str(path)!r} has a name that is not UTF-8: rename it")
    caption_path = path.with_suffix(".txt")
    if not caption_path.is_file():
        raise ManifestError(f"'{path}' has no caption: write it into '{caption_path.name}' beside it")
    text = " ".join(caption_path.read_text(encoding="utf-8", errors="replace").split())
    if not text:
        raise ManifestError(f"'{path}' has no caption: '{caption_path.name}' is empty")
    info = _probe(path)
    return Clip(path=path, text=text, num_frames=info.num_frames, height=info.height, width=info.width, fps=info.fps)


def _clip_to_row(clip: Clip, folder: Path) -> dict[str, Any]:
    path, home = clip.path.resolve(), folder.resolve()
    return {
        "path": str(path.relative_to(home) if path.is_relative_to(home) else path),
        "text": clip.text,
        "num_frames": clip.num_frames,
        "height": clip.height,
        "width": clip.width,
        "fps": clip.fps,
        **clip.extra,
    }


def _listed(what: str, problems: Sequence[str]) -> ManifestError:
    plural = "s" if len(problems) > 1 else ""
    return ManifestError(f"{what} has {len(problems)} problem{plural}:\n{indent_lines(problems)}")


# --- files --------------------------------------------------------------------------------------------------


def _format_of(path: Path, formats: Mapping[str, Callable]) -> Callable:
    if path.suffix.lower() not in formats:
        raise ManifestError(f"manifest '{path}' must end in {' or '.join(formats)}, got {path.suffix!r}: convert it")
    return formats[path.suffix.lower()]


def _read_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Pairs (where in the file, row)."""
    reader = _format_of(path, {".jsonl": _read_json_lines, ".csv": _read_csv})
    try:
        return reader(path)
    except UnicodeDecodeError as error:
        raise ManifestError(f"manifest '{path}' is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except csv.Error as error:
        raise ManifestError(f"manifest '{path}' is not CSV: {error}") from None


def _read_json_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    rows, problems = [], []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                problems.append(f"line {number}: not JSON: {getattr(error, 'msg', error)}")
                continue
            if not isinstance(row, dict):
                problems.append(f"line {number}: expected one object a line, got {type(row).__name__}")
                continue
            rows.append((f"line {number}", row))
    if problems:
        raise _listed(f"manifest '{path}'", problems)
    return rows


def _read_csv(path: Path) -> list[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        missing = [name for name in REQUIRED_COLUMNS if name not in columns]
        if missing and columns:
            raise ManifestError(
                f"manifest '{path}' lacks the column{'s' * (len(missing) > 1)} "
                f"{', '.join(map(repr, missing))}; it has {', '.join(map(repr, columns))}"
            )
        rows = []
        for row in reader:
            if None in row:
                raise ManifestError(
                    f"manifest '{path}', line {reader.line_num}: more values than columns; quote a text that has commas"
                )
            rows.append((f"line {reader.line_num}", row))
        return rows


def _write_json_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
