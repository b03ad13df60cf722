"""Export of films in the folder layout of the official VBench suite.

    FOLDER/videos/PROMPT-INDEX.mp4     index 0, 1, ... for films of the same prompt
    FOLDER/arlon_full_info.json        "full info" in VBench's terms: prompt_en, dimension, video_list

VBench knows one prompt for each video. A film of one shot is copied as it is. Of a longer film every shot becomes a
video, encoded again without loss. The dimensions are those that VBench can compute for any prompt.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from arlon.data.video_io import VideoWriter, probe, read_video
from arlon.errors import UsageError
from arlon.files import copy_file, publish, temporary_beside, write_json
from pipelines.evaluation.film_set import EXPORT_MARK, PARTIAL, FilmFile, Problem, add_prompts, find_films, outline_of

VIDEOS_NAME = "videos"
INFO_NAME = EXPORT_MARK
DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
    "temporal_style",
    "overall_consistency",
    "temporal_flickering",
)
"""Dimensions that VBench measures without knowing more of a prompt than its words."""
MAX_NAME_BYTES = 220
"""Most bytes of a prompt: file names have at most 255, including the index and a temporary suffix."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """Result of an export."""

    info: Path
    num_videos: int
    problems: tuple[Problem, ...]


def export_films(
    sources: Sequence[Path], folder: Path, *, prompts: Path | None = None, leave_out: Path | None = None
) -> Export:
    """Write films in VBench's layout.

    Args:
        sources: Films and folders; see `pipelines.evaluation.film_set`.
        folder: Folder to write; the videos of an earlier export are replaced.
        prompts: Prompt file.
        leave_out: Folder that is not searched for films.

    Raises:
        UsageError: If the folder holds other videos, or is one of the sources.
        OSError: If the folder cannot be written.
    """
    check_export(folder, sources)
    videos = folder / VIDEOS_NAME
    films, problems = find_films(sources, leave_out=leave_out)
    if prompts is not None:
        films, more = add_prompts(films, prompts)
        problems += more
    growing = folder / f"{VIDEOS_NAME}{PARTIAL}"  # what a killed export left
    shutil.rmtree(growing, ignore_errors=True)
    growing.mkdir(parents=True)
    written: dict[str, list[str]] = {}
    for film in films:
        try:
            _export(film, growing, written)
        except (ValueError, OSError) as error:
            problems.append(Problem(source=film.name, reason=f"not exported: {error}"))
    info = [
        {"prompt_en": prompt, "dimension": list(DIMENSIONS), "video_list": names} for prompt, names in written.items()
    ]
    if videos.is_dir():
        shutil.rmtree(videos)
    write_json(folder / INFO_NAME, info)
    publish(growing, videos)
    return Export(info=folder / INFO_NAME, num_videos=sum(map(len, written.values())), problems=tuple(problems))


def check_export(folder: Path, sources: Sequence[Path]) -> None:
    """Refuse a folder that cannot take an export of films from `sources`.

    Raises:
        UsageError: If it holds videos that are not from an export, is a file, or is one of the sources, whose search
            would find the exported videos.
    """
    if folder.resolve() in {source.resolve() for source in sources}:
        raise UsageError(f"'{folder}' is a folder of the films: name another one as --export-vbench")
    videos = folder / VIDEOS_NAME
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"'{folder}' is a file: name a folder as --export-vbench")
    if videos.exists() and (not videos.is_dir() or {path.name for path in videos.iterdir()} - _exported(folder)):
        raise UsageError(f"'{videos}' holds other videos: choose another --export-vbench, or remove it")


def _exported(folder: Path) -> set[str]:
    """Read the file names of the videos of an earlier export; none if there is no export."""
    try:
        entries = json.loads((folder / INFO_NAME).read_text(encoding="utf-8"))
        return {Path(name).name for entry in entries for name in entry["video_list"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _export(film: FilmFile, videos: Path, written: dict[str, list[str]]) -> None:
    """Write the videos of a film into a folder, and add their names to `written`, by prompt."""
    info = probe(film.path)
    frames = read_video(film.path)
    shots = outline_of(film, info.tags, len(frames)).shots
    for shot in shots:
        check_prompt(shot.prompt)
    for shot in shots:
        target = videos / f"{shot.prompt}-{len(written.get(shot.prompt, ()))}.mp4"
        temporary = temporary_beside(target)
        try:
            if len(shots) == 1 and film.path.suffix.lower() == ".mp4":
                copy_file(film.path, temporary)
            else:
                with VideoWriter(temporary, fps=info.fps, crf=0) as writer:
                    writer.append(frames[shot.start_frame : shot.start_frame + shot.num_frames])
            publish(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        written.setdefault(shot.prompt, []).append(f"{VIDEOS_NAME}/{target.name}")


def check_prompt(prompt: str) -> None:
    """Refuse a prompt that cannot be a file name, since VBench names videos by their prompt.

    Raises:
        ValueError: If it cannot.
    """
    if not prompt:
        raise ValueError("its prompt is not known: give --prompts")
    if "/" in prompt or "\0" in prompt:
        raise ValueError(f"VBench names videos by their prompt, which must not hold '/': {prompt[:60]!r}")
    if len(os.fsencode(prompt)) > MAX_NAME_BYTES:
        raise ValueError(f"VBench names videos by their prompt, of at most {MAX_NAME_BYTES} bytes: {prompt[:60]!r}...")
