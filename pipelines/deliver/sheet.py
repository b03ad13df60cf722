"""Contact sheets: a row of evenly spaced frames for each shot, with its prompt above."""

from __future__ import annotations

import io
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from arlon.data.video_io import probe, read_video
from arlon.errors import UsageError
from arlon.files import write_bytes
from arlon.film.record import RECORD_TAG

MARGIN = 8
GAP = 4
FONT_SIZE = 14
BACKGROUND = (255, 255, 255)
INK = (20, 20, 20)
MIN_CELL = 96
"""Height in pixels below which frames are enlarged to a whole multiple of their size."""


@dataclass(frozen=True, kw_only=True)
class SheetRow:
    """A row of a contact sheet."""

    title: str
    frames: np.ndarray
    """(n, pH, pW, 3) uint8, all of which are shown."""


def frames_to_sheet(rows: Sequence[SheetRow], *, scale: int | None = None) -> Image.Image:
    """Draw a contact sheet.

    Args:
        rows: At least one row; frames of different rows may differ in number and size.
        scale: Whole factor by which frames are enlarged, with sharp pixels. Default: so that the smallest frame is at
            least 96 pixels high.

    Raises:
        ValueError: If there is no row, or a row has no frames of the right shape.
    """
    if not rows:
        raise ValueError("a contact sheet needs at least one row of frames")
    for row in rows:
        if row.frames.ndim != 4 or row.frames.shape[-1] != 3 or not len(row.frames):
            raise ValueError(f"frames of row {row.title!r} must be (n, pH, pW, 3), got {tuple(row.frames.shape)}")
    if scale is None:
        # Rounded up to a whole factor.
        scale = max(1, -(-MIN_CELL // min(row.frames.shape[1] for row in rows)))
    width = max(_row_width(row, scale) for row in rows) + 2 * MARGIN
    font = ImageFont.load_default(size=FONT_SIZE)
    titles = [_wrapped(row.title, width - 2 * MARGIN, font) for row in rows]
    heights = [_title_height(title) + row.frames.shape[1] * scale for title, row in zip(titles, rows, strict=True)]
    sheet = Image.new("RGB", (width, sum(heights) + MARGIN * (len(rows) + 1)), BACKGROUND)
    draw, y = ImageDraw.Draw(sheet), MARGIN
    for row, title, height in zip(rows, titles, heights, strict=True):
        draw.multiline_text((MARGIN, y), title, fill=INK, font=font)
        _paste_frames(sheet, row.frames, y + _title_height(title), scale)
        y += height + MARGIN
    return sheet


def evenly_spaced(start: int, num_frames: int, count: int) -> list[int]:
    """Choose up to `count` different frame indices from `start` on, in the middle of equal parts of `num_frames`."""
    count = min(count, num_frames)
    return [start + int((i + 0.5) * num_frames / count) for i in range(count)]


def film_sheet(film: str | Path, *, num_columns: int = 8, scale: int | None = None) -> Image.Image:
    """Draw a contact sheet of a film, with a row for each shot of its record; any other video gives one row.

    Args:
        film: A film, or a run folder with one.
        num_columns: Frames for each shot.
        scale: Whole factor by which frames are enlarged; see `frames_to_sheet`.

    Raises:
        FileNotFoundError: If there is no such file.
        UsageError: If `num_columns` is not positive.
        VideoError: If the file is not a readable video.
    """
    if num_columns < 1:
        raise UsageError(f"a sheet needs at least 1 column, got {num_columns}")
    path = find_film(film)
    info = probe(path)
    frames = read_video(path)
    rows = []
    for title, start, length in _shots_of(path, info.tags, len(frames)):
        picked = evenly_spaced(start, length, num_columns)
        rows.append(SheetRow(title=title, frames=frames[picked]))
    return frames_to_sheet(rows, scale=scale)


def write_sheet(sheet: Image.Image, path: str | Path) -> None:
    """Write a contact sheet as PNG; the file appears complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    write_bytes(path, buffer.getvalue())


def find_film(path: str | Path) -> Path:
    """Find the film of a run folder, finished or not; any other path is returned as it is.

    Raises:
        FileNotFoundError: If the folder has no film.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    names = ["film.mp4", "film.partial.mp4"]
    candidates = [path / name for name in names]
    if path.suffix == ".run":
        candidates += [path.with_suffix(suffix) for suffix in (".mp4", ".partial.mp4")]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"no film in '{path}': expected {' or '.join(names)}")


def _shots_of(path: Path, tags: dict[str, str], num_frames: int) -> list[tuple[str, int, int]]:
    """Triples (title, first frame, number of frames) of the shots of a film, as far as the film has grown."""
    shots = []
    for number, shot in enumerate(_timeline(path, tags), start=1):
        start, fps = shot["start_frame"], shot["fps"]
        # A film that is still growing ends within a shot, or before it.
        length = min(shot["num_frames"], num_frames - start)
        if length > 0:
            joins = f", {shot['transition']}" if number > 1 else ""
            shots.append((f"{number}. {shot['prompt']}   ({start / fps:.1f} s{joins})", start, length))
    return shots or [(path.name, 0, num_frames)]


def _timeline(path: Path, tags: dict[str, str]) -> list[dict[str, Any]]:
    """Read the shots with their frame ranges from the sidecar or from inside the film; empty if it has neither."""
    try:
        sidecar = path.with_suffix(".json")
        record = json.loads(sidecar.read_text(encoding="utf-8") if sidecar.is_file() else tags.get(RECORD_TAG, "{}"))
        timeline = record["timeline"]
        return [shot | {"fps": timeline["fps"]} for shot in timeline["shots"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _row_width(row: SheetRow, scale: int) -> int:
    count, _, width, _ = row.frames.shape
    return count * (width * scale + GAP) - GAP


def _wrapped(title: str, width: int, font: Any) -> str:
    # An n is about as wide as the mean character.
    columns = max(20, int(width / font.getlength("n")))
    return "\n".join(textwrap.wrap(title, columns)) or " "


def _title_height(title: str) -> int:
    return (title.count("\n") + 1) * (FONT_SIZE + 5) + GAP


def _paste_frames(sheet: Image.Image, frames: np.ndarray, y: int, scale: int) -> None:
    x = MARGIN
    for frame in frames:
        picture = Image.fromarray(frame)
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
        sheet.paste(picture, (x, y))
        x += picture.width + GAP
