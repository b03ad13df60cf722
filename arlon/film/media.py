"""Pictures and videos that a storyboard names: what each kind does, and the checks before any work starts.

    image        first frame of a shot that starts a take
    video        the shot starts a take and continues from the end of the video
    end_image    last frames of a shot
    references   pictures and videos that a mask strategy places in the take that the shot starts; starts snap to chunks

Each file is scaled until it covers the frame and cropped to the centre, never stretched. `arlon.film.encode_media`
encodes the files once, before a run starts, and `arlon.film.take_media` holds the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from arlon.film.plan import Plan, Segment
from arlon.film.storyboard import REFERENCE_KINDS, Storyboard, StoryboardError
from arlon.grids import num_latent_frames

if TYPE_CHECKING:
    from arlon.data.transforms import CoverCrop
    from arlon.diffusion.references import Placement

Kind = Literal["image", "end_image", "video", "references"]
MAX_REFERENCE_FRAMES = 816
"""Most frames of a video among `references`, which is encoded whole: the longest clip Open-Sora v1.2 has a name for."""
HEAD_ONLY = "0"
"""Mask strategy of a shot that gives none: the first latent frame of the first reference at the head of the take."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A file that a shot names, after its check."""

    shot: int
    kind: Kind
    path: Path
    fit: CoverCrop
    num_frames: int
    """Frames of a video at the frame rate of the film; 1 for an image."""
    note: str = ""
    """How much of a video is used, in words."""
    is_video: bool = False
    number: int | None = None
    """Index among the `references` of the shot; None for the other kinds."""

    @property
    def name(self) -> str:
        """Name under which its latent frames are stored."""
        return tensor_name(self.shot, self.kind, self.number)

    def describe(self) -> str:
        """One line for people: the file, how it is cropped, and how much of it is used."""
        note = f", {self.note}" if self.note else ""
        what = self.kind if self.number is None else f"reference {self.number}"
        return f"shot {self.shot + 1} {what}: {self.path.name}, {self.fit.describe()}{note}"


def check_references(plan: Plan, *, first_shot: int = 0) -> tuple[Reference, ...]:
    """Look at every file that a storyboard names, from shot `first_shot` on, and check that each has its place.

    Raises:
        StoryboardError: With every problem: a file that is missing or unreadable, or one that cannot go where it is.
    """
    problems = reference_problems(plan.storyboard)
    found = []
    for shot, kind, number, path in named_files(plan.storyboard):
        if shot < first_shot:
            continue
        try:
            found.append(_check_file(plan, shot, kind, number, Path(path).expanduser()))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            problems.append(f"shots[{shot}].{kind} '{path}': {reason}")
    if not problems:
        of_shot = {shot: list(files) for shot, files in groupby(found, key=lambda reference: reference.shot)}
        for _, segments in groupby(plan.segments, key=lambda segment: segment.take):
            problems += _placement_problems(plan, list(segments), of_shot)
    if problems:
        raise StoryboardError(problems)
    return tuple(found)


def reference_problems(storyboard: Storyboard) -> list[str]:
    """Files that a storyboard names for shots that cannot have them, one sentence each; no file is opened."""
    problems = []
    for index, shot in enumerate(storyboard.shots):
        starts_take = index == 0 or shot.transition == "cut"
        if shot.image and shot.video:
            problems.append(f"shots[{index}] has an image and a video to begin with: give one of them")
        if shot.references and (shot.image or shot.video):
            problems.append(f"shots[{index}] has references and an image or video: put all in `references`")
        for kind in ("image", "video", "references"):
            if getattr(shot, kind) and not starts_take:
                problems.append(
                    f"shots[{index}].{kind}: this shot goes on from the one before it; "
                    "give it `transition: cut` to begin with something else"
                )
    return problems


def reference_names(storyboard: Storyboard) -> list[str]:
    """Keys under which a storyboard names files, each once."""
    return list(dict.fromkeys(kind for _, kind, _, _ in named_files(storyboard)))


def named_files(storyboard: Storyboard) -> Iterator[tuple[int, Kind, int | None, str]]:
    """Every file of a storyboard: its shot, kind, index among the `references` of the shot (or None), and path."""
    for index, shot in enumerate(storyboard.shots):
        for kind in REFERENCE_KINDS:
            if (path := getattr(shot, kind)) is not None:
                yield index, kind, None, path
        for number, path in enumerate(shot.references):
            yield index, "references", number, path


def tensor_name(shot: int, kind: str, number: int | None = None) -> str:
    """Name of a tensor in `references.safetensors`: `SHOT/KIND`, or `SHOT/references/NUMBER`."""
    return f"{shot}/{kind}" if number is None else f"{shot}/{kind}/{number}"


def shot_placements(storyboard: Storyboard, shot: int) -> tuple[Placement, ...]:
    """Where the `references` of a shot go in its take; nothing for a shot without any."""
    from arlon.diffusion.references import parse_mask_strategy

    of_shot = storyboard.shots[shot]
    return parse_mask_strategy(of_shot.mask_strategy or HEAD_ONLY) if of_shot.references else ()


def _check_file(plan: Plan, shot: int, kind: Kind, number: int | None, path: Path) -> Reference:
    """Open one file and measure it.

    Raises:
        OSError, ValueError: If it is missing, is neither picture nor video, or is too short or too long.
    """
    from arlon.data.pictures import is_picture_file, read_picture
    from arlon.data.transforms import plan_cover
    from arlon.data.video_io import probe
    from arlon.diffusion.references import given_span

    target = (plan.frame_fit.made_height, plan.frame_fit.made_width)
    if not path.is_file():
        raise FileNotFoundError("there is no such file" if not path.exists() else "this is no file")
    if kind in ("image", "end_image") or (kind == "references" and is_picture_file(path)):
        fit = plan_cover(read_picture(path).shape[1:3], target)
        return Reference(shot=shot, kind=kind, number=number, path=path, fit=fit, num_frames=1)
    info = probe(path)
    # The small constant keeps rounding from losing a frame where the product is a whole number.
    num_frames = max(1, int(info.num_frames / info.fps * plan.fps + 1e-6))
    if kind == "references" and num_frames > MAX_REFERENCE_FRAMES:
        raise ValueError(f"a reference has at most {MAX_REFERENCE_FRAMES} frames, got {num_frames}: cut it")
    is_continued = kind == "video"
    return Reference(
        shot=shot,
        kind=kind,
        number=number,
        path=path,
        fit=plan_cover((info.height, info.width), target),
        num_frames=num_frames,
        note=given_span(num_frames, plan.geometry.grid).describe(num_frames)
        if is_continued
        else f"{num_frames} frames",
        is_video=True,
    )


def _placement_problems(plan: Plan, segments: Sequence[Segment], of_shot: dict[int, list[Reference]]) -> Iterator[str]:
    """Files of one take that have no place in its segments, or segments that are left nothing to make.

    Args:
        plan: The film.
        segments: All segments of the take.
        of_shot: Checked files by shot.
    """
    from arlon.diffusion.references import given_span, plan_edit_ratios

    grid, shot = plan.geometry.grid, segments[0].shot
    # Latent frames of what the take begins with, and of each of its references.
    num_head, lengths = 0, []
    for reference in of_shot.get(shot, ()):
        if reference.kind == "references":
            lengths.append(num_latent_frames(reference.num_frames, grid.chunk_frames, grid.time_stride))
        elif reference.kind == "video":
            num_head = given_span(reference.num_frames, grid).latents
        elif reference.kind == "image":
            num_head = 1
    placements = shot_placements(plan.storyboard, shot) if lengths else ()
    for group in placements:
        if group.segment >= len(segments):
            yield (
                f"shots[{shot}].mask_strategy names segment {group.segment}, but the take that the shot starts has "
                f"{len(segments)} (counted from 0)"
            )
    for number in sorted(set(range(len(lengths))) - {group.reference for group in placements}):
        yield f"shots[{shot}].references[{number}] is placed nowhere: name it in mask_strategy, or leave it out"
    for segment in segments:
        kinds = [reference.kind for reference in of_shot.get(segment.shot, ())]
        try:
            plan_edit_ratios(
                segment.num_latents,
                head=num_head if segment.starts_take else segment.overlap,
                tail=1 if segment.ends_shot and "end_image" in kinds else 0,
                references=lengths,
                placements=[group for group in placements if group.segment == segment.index_in_take],
                align=grid.chunk_latents,
            )
        except ValueError as error:
            where = f"{shot}].mask_strategy" if placements else f"{segment.shot}].{' and '.join(kinds)}"
            yield f"shots[{where}: {error}"
            return
