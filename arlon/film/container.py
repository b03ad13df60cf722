"""Films as files: how a growing film gets its final form, and how the record inside a film is read.

    film.partial.mp4    grows by fragments and plays at any time, even cut off at any byte (`arlon.data.video_io`)
    film.mp4            the same frames behind an index (`arlon.data.mp4`), so that it starts at once and seeks

Both carry the record that `arlon.film.record` describes.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from arlon.data.mp4 import flatten
from arlon.data.video_io import REPEATABLE, VideoError, read_tags
from arlon.files import hash_file, publish, temporary_beside
from arlon.film.plan import Plan
from arlon.film.record import RECORD_FORMAT, RECORD_TAG, parse_record
from arlon.film.settings import Settings


def read_film_record(film: str | Path) -> dict[str, Any]:
    """Read what a film was made from, out of the film itself or the sidecar beside it.

    Args:
        film: A film, finished or not, or a PNG made by `arlon generate`.

    Raises:
        FileNotFoundError: If there is no such file.
        VideoError: If the file is not a video, has no record, or one of another version.
    """
    film = Path(film)
    found = _png_tags(film) if film.suffix.lower() == ".png" else read_tags(film)
    tags = {name.lower(): text for name, text in found.items()}  # Matroska writes tag names in capitals
    record = parse_record(tags.get(RECORD_TAG, ""))
    sidecar = film.with_suffix(".json")
    if record is None and sidecar.is_file():
        record = parse_record(sidecar.read_text(encoding="utf-8", errors="replace"))
    if record is None:
        raise VideoError(
            f"'{film}' does not say what it was made from: it was made by another program, or without metadata"
        )
    if record.get("format") != RECORD_FORMAT:
        raise VideoError(
            f"'{film}' was made by another version: its record has format {record.get('format')!r}, "
            f"this version reads {RECORD_FORMAT}"
        )
    return record


def _png_tags(picture: Path) -> dict[str, str]:
    """Read the text chunks of a PNG.

    Raises:
        FileNotFoundError: If there is no such file.
        VideoError: If it is not a picture.
    """
    try:
        with Image.open(picture) as opened:
            return {str(name): text for name, text in opened.info.items() if isinstance(text, str)}
    except FileNotFoundError:
        raise
    except (SyntaxError, ValueError, EOFError, OSError) as error:  # what Pillow raises for damaged files
        raise VideoError(f"'{picture}' cannot be read as a picture") from error


def encoder_options(plan: Plan, settings: Settings) -> dict[str, Any]:
    """Arguments of `arlon.data.video_io.encode_fragment` and `VideoWriter` with which a film is encoded."""
    return {
        "fps": plan.fps,
        "crf": settings.crf,
        "preset": settings.preset,
        "x264_params": REPEATABLE if settings.x264_cpu_independent else "",
    }


def finalise(partial: Path, film: Path, *, num_frames: int) -> str:
    """Turn a complete growing film into the finished one, and remove the growing one.

    Frames are copied, not encoded again, and memory does not grow with the film. The same fragments and tags give the
    same bytes. If this fails or is interrupted, the growing film is still there.

    Args:
        partial: The growing film.
        film: Path of the finished film; an existing file is replaced.
        num_frames: Frames the film must have.

    Returns:
        SHA-256 of the finished film.

    Raises:
        VideoError: If the growing film is damaged or cut off.
        RuntimeError: If it has another number of frames.
    """
    temporary = temporary_beside(film)
    try:
        with partial.open("rb") as source, temporary.open("wb") as target:
            try:
                found = flatten(source, target)
            except VideoError as error:
                raise VideoError(f"cannot finish '{partial}': {error}") from None
            if found != num_frames:
                raise RuntimeError(f"'{partial}' has {found} frames, but {num_frames} were planned")
            target.flush()
            os.fsync(target.fileno())
        film_hash = hash_file(temporary)
        publish(temporary, film)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(film)) from error  # the error of a full disk names no file
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    partial.unlink(missing_ok=True)
    return film_hash
