"""The film as a file: what is written into it, and its finished shape.

    film.partial.mp4    grows by fragments; plays at any time, cut off at any byte too (`arlon.data.video_io`)
    film.mp4            the same frames behind an index (`arlon.data.mp4`): starts fast and seeks
    film.hls/           an HLS stream for web players, where it is asked for (`pipelines.deliver.hls`)

Both films carry the record they were made from, as JSON, under the tag `comment`: of the tags one may choose, the one
that other programs keep when they copy a film into another container.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from arlon.data.mp4 import flatten
from arlon.data.video_io import VideoError, read_tags
from arlon.files import hash_file, publish, temporary_beside

RECORD_FORMAT = 1
RECORD_TAG = "comment"


def film_tags(record: Mapping[str, Any], title: str) -> dict[str, str]:
    """Tags of a film that say what it was made from."""
    return {"title": title, RECORD_TAG: json.dumps(record, ensure_ascii=False, separators=(",", ":"))}


def read_film_record(film: str | Path) -> dict[str, Any]:
    """What a film was made from: from inside it, whether it is finished or not, or else from the sidecar beside it.

    Raises:
        FileNotFoundError: If there is no such file.
        VideoError: If the file is not a video, says nothing, or says it in a way of another version.
    """
    film = Path(film)
    found = _png_tags(film) if film.suffix.lower() == ".png" else read_tags(film)
    tags = {name.lower(): text for name, text in found.items()}  # Matroska has them in capitals
    record = _parse_record(tags.get(RECORD_TAG, ""))
    sidecar = film.with_suffix(".json")
    if record is None and sidecar.is_file():
        record = _parse_record(sidecar.read_text(encoding="utf-8", errors="replace"))
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
    from PIL import Image

    try:
        with Image.open(picture) as opened:
            return {name: str(text) for name, text in opened.info.items() if isinstance(text, str)}
    except (SyntaxError, ValueError, EOFError) as error:
        raise VideoError(f"'{picture}' is no picture that can be read") from error
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise VideoError(f"'{picture}' is no picture that can be read") from error


def _parse_record(text: str) -> dict[str, Any] | None:
    """The record in a text, or None if the text is something else."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) and "storyboard" in values else None


def finalise(partial: Path, film: Path, *, num_frames: int) -> str:
    """Make the finished film of a growing one that is complete, and remove the growing one.

    The frames are copied, not encoded again; memory does not grow with the film. The same fragments and tags give the
    same bytes. If it fails, or is interrupted, the growing film is still there.

    Args:
        partial: The growing film.
        film: Where the finished one goes; an existing one is replaced.
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
        raise OSError(error.errno, error.strerror, str(film)) from error  # a full disk names no file
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    partial.unlink(missing_ok=True)
    return film_hash
