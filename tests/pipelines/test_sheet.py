from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arlon.data.video_io import VideoError, VideoWriter
from arlon.film.record import RECORD_TAG
from pipelines.deliver.sheet import SheetRow, evenly_spaced, film_sheet, find_film, frames_to_sheet, write_sheet


def plain_frames(*levels: int, height: int = 32, width: int = 48) -> np.ndarray:
    frames = np.zeros((len(levels), height, width, 3), np.uint8)
    frames[:] = np.array(levels, np.uint8)[:, None, None, None]
    return frames


def write_film(path: Path, record: dict[str, object] | None) -> Path:
    tags = {} if record is None else {RECORD_TAG: json.dumps(record)}
    with VideoWriter(path, fps=8, tags=tags) as writer:
        writer.append(plain_frames(*[20] * 20))
        writer.append(plain_frames(*[200] * 10))
    return path


def timeline(*lengths: int) -> dict[str, object]:
    starts = np.cumsum([0, *lengths]).tolist()
    shots = [
        {"prompt": f"shot {i}", "transition": "cut", "start_frame": starts[i], "num_frames": length}
        for i, length in enumerate(lengths)
    ]
    return {"timeline": {"fps": 8.0, "shots": shots}}


def levels_of(sheet: Image.Image) -> set[int]:
    """Which of the two shots' grey levels the sheet shows."""
    grey = np.asarray(sheet.convert("L")).astype(int)
    return {level for level in (20, 200) if (np.abs(grey - level) <= 3).sum() > 20 * 48}


def test_small_frames_are_enlarged_without_blur() -> None:
    frames = plain_frames(100, height=2, width=2)
    frames[0, 0, 1] = (255, 0, 0)
    sheet = np.asarray(frames_to_sheet([SheetRow(title="x", frames=frames)], scale=5))
    assert (sheet == (255, 0, 0)).all(-1).sum() == 25
    assert (sheet == (100, 100, 100)).all(-1).sum() == 75


def test_every_row_and_frame_has_its_place() -> None:
    rows = [SheetRow(title="", frames=plain_frames(*range(60, 60 + n))) for n in (3, 5)]
    sheet = np.asarray(frames_to_sheet(rows, scale=1))
    for level, count in zip(range(60, 65), (2, 2, 2, 1, 1), strict=True):
        assert (sheet == level).all(-1).sum() == count * 32 * 48


def test_long_titles_are_wrapped_and_drawn() -> None:
    short, long = (
        frames_to_sheet([SheetRow(title=title, frames=plain_frames(90, 90))]) for title in ("a", "word " * 60)
    )
    assert long.width == short.width
    assert long.height > short.height + 40


def test_indices_lie_in_the_middle_of_equal_parts() -> None:
    assert evenly_spaced(100, 8, 4) == [101, 103, 105, 107]
    assert evenly_spaced(0, 51, 3) == [8, 25, 42]
    assert evenly_spaced(5, 2, 8) == [5, 6]


def test_sheet_of_a_film_has_a_row_a_shot(tmp_path: Path) -> None:
    film = write_film(tmp_path / "film.mp4", timeline(20, 10))
    sheet = film_sheet(film, num_columns=2, scale=1)
    assert sheet.width == 2 * 48 + 4 + 16
    assert levels_of(sheet) == {20, 200}
    grey = np.asarray(sheet.convert("L"))
    assert abs(int(grey[-20, 20]) - 200) <= 3  # the second shot is the last row
    write_sheet(sheet, tmp_path / "new" / "sheet.png")
    assert Image.open(tmp_path / "new" / "sheet.png").size == sheet.size


def test_sidecar_wins_over_the_tag(tmp_path: Path) -> None:
    film = write_film(tmp_path / "film.mp4", timeline(20, 10))
    (tmp_path / "film.json").write_text(json.dumps(timeline(20)))
    assert levels_of(film_sheet(film, num_columns=2, scale=1)) == {20}


def test_growing_film_shows_the_shots_it_has(tmp_path: Path) -> None:
    film = write_film(tmp_path / "film.partial.mp4", timeline(20, 40, 50))
    sheet = film_sheet(film, num_columns=2, scale=1)
    assert levels_of(sheet) == {20, 200}
    assert find_film(tmp_path) == film


def test_any_other_video_gives_one_row(tmp_path: Path) -> None:
    sheet = film_sheet(write_film(tmp_path / "other.mp4", None), num_columns=4, scale=1)
    assert levels_of(sheet) == {20, 200}
    assert sheet.height < 2 * 32 + 16


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one row"):
        frames_to_sheet([])
    with pytest.raises(ValueError, match=r"must be \(n, pH, pW, 3\)"):
        frames_to_sheet([SheetRow(title="x", frames=np.zeros((4, 4), np.uint8))])
    with pytest.raises(FileNotFoundError, match="no film in"):
        film_sheet(tmp_path)
    (tmp_path / "a.mp4").write_text("text")
    with pytest.raises(VideoError, match="as video"):
        film_sheet(tmp_path / "a.mp4")
