"""Pictures and videos that a film is given: how they are checked, what becomes of them, and where they are kept.

    image        the first frame of a shot that starts a take
    video        a shot that starts a take goes on from the end of a video, whose last frames it begins with
    end_image    the last frames of a shot
    references   pictures and videos that a mask strategy places in the take that a shot starts; starts snap to chunks

Each is scaled until it covers the frame and cut to its centre, never stretched, and encoded once, before a run starts.
Its latent frames are kept in the run folder (`references.safetensors`), so that a film can be gone on with, changed and
verified where the files are gone. They are held clean while the segment around them is made. The code model goes on
from the codes of what a take begins with, so that codes and frames agree: the complete code frames of a video, one code
frame of an image that stands still.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from arlon.film.plan import Plan, Segment
from arlon.film.storyboard import REFERENCE_KINDS, Storyboard, StoryboardError
from arlon.grids import SegmentGrid, num_latent_frames
from pipelines.store.run_folder import RunFolder

if TYPE_CHECKING:
    from arlon.data.transforms import CoverFit
    from arlon.diffusion.references import Placement
    from arlon.film.messages import Job

Kind = Literal["image", "end_image", "video", "references"]
CODES = "codes"
"""Name, beside those of `Kind`, under which the code frames are kept that a take begins with."""
MAX_REFERENCE_FRAMES = 816
"""Of a video among `references`, all of which is encoded: the longest clip Open-Sora v1.2 has a name for."""
HEAD_ONLY = "0"
"""Mask strategy where none is given: the first latent frame of the first reference at the head."""
MARGIN_FRAMES = 8
"""How much more of the end of a video is read than is needed: its frames are counted by its mean rate."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A file that a shot is given, checked."""

    shot: int
    kind: Kind
    path: Path
    fit: CoverFit
    num_frames: int
    """Frames of a video at the rate of the film; 1 of an image."""
    note: str = ""
    """How much of a video is used, in words."""
    is_video: bool = False
    number: int | None = None
    """Place among the `references` of its shot, from 0; None: of another kind."""

    @property
    def name(self) -> str:
        """Under which its latent frames are kept."""
        return _name(self.shot, self.kind, self.number)

    def describe(self) -> str:
        """What becomes of it, in words."""
        note = f", {self.note}" if self.note else ""
        what = self.kind if self.number is None else f"reference {self.number}"
        return f"shot {self.shot + 1} {what}: {self.path.name}, {self.fit.describe()}{note}"


def check_references(plan: Plan, *, first_shot: int = 0) -> tuple[Reference, ...]:
    """Look at every file that a storyboard names, from a shot on.

    Raises:
        StoryboardError: With every problem: a file that is missing, is no picture or video, or stands where it cannot.
    """
    problems = reference_problems(plan.storyboard)
    found = []
    for shot, kind, number, path in _named(plan.storyboard):
        if shot < first_shot:
            continue
        try:
            found.append(_check(plan, shot, kind, number, Path(path).expanduser()))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            problems.append(f"shots[{shot}].{kind} '{path}': {reason}")
    if not problems:
        problems += _room_problems(plan, found)
    if problems:
        raise StoryboardError(problems)
    return tuple(found)


def _room_problems(plan: Plan, found: Sequence[Reference]) -> list[str]:
    """What is wrong with where files go that were found: a place that is not there, or nothing left to make."""
    problems = []
    of_shot = {shot: list(given) for shot, given in groupby(found, key=lambda given: given.shot)}
    for _, segments in groupby(plan.segments, key=lambda segment: segment.take):
        take = list(segments)
        shot = take[0].shot
        dry = _dry(plan, shot, of_shot.get(shot, ()))
        problems += [
            f"shots[{shot}].mask_strategy names segment {group.segment}, but the take that the shot starts has "
            f"{len(take)} (counted from 0)"
            for group in dry.placements
            if group.segment >= len(take)
        ]
        problems += [
            f"shots[{shot}].references[{number}] is placed nowhere: name it in mask_strategy, or leave it out"
            for number in sorted(set(range(len(dry.references))) - {group.reference for group in dry.placements})
        ]
        for segment, after in zip_longest(take, take[1:]):
            ends_shot = after is None or after.shot != segment.shot
            kinds = [given.kind for given in of_shot.get(segment.shot, ())]
            try:
                _check_room(plan, segment, dry, has_tail=ends_shot and "end_image" in kinds)
            except ValueError as error:
                where = f"{shot}].mask_strategy" if dry.placements else f"{segment.shot}].{' and '.join(kinds)}"
                problems.append(f"shots[{where}: {error}")
                break
    return problems


def _dry(plan: Plan, shot: int, found: Sequence[Reference]) -> Given:
    """What a shot gives its take, of the lengths it will have; only these matter."""
    from arlon.diffusion.references import given_span

    grid, head, references = plan.geometry.grid, None, []
    for given in found:
        if given.kind == "references":
            latents = num_latent_frames(given.num_frames, grid.chunk_frames, grid.time_stride)
            references.append(torch.zeros(1, 1, latents, 1, 1))
        elif given.kind != "end_image":
            head = torch.zeros(1, 1, given_span(given.num_frames, grid).latents if given.is_video else 1, 1, 1)
    return Given(head=head, references=tuple(references), placements=_placements(plan, shot) if references else ())


def _check_room(plan: Plan, segment: Segment, dry: Given, *, has_tail: bool) -> None:
    """Refuse a segment in which a placement has no place, or nothing is left to make.

    Raises:
        ValueError: If so.
    """
    from arlon.diffusion.references import condition_segment

    placed = dry.placed(segment, plan.geometry.grid)
    head = torch.zeros(1, 1, segment.overlap, 1, 1) if segment.overlap else dry.head
    if placed is not None or has_tail or (dry.head is not None and not segment.overlap):
        tail = torch.zeros(1, 1, 1, 1, 1) if has_tail else None
        condition_segment((1, 1, segment.num_latents, 1, 1), head=head, tail=tail, placed=placed)


def _placements(plan: Plan, shot: int) -> tuple[Placement, ...]:
    from arlon.diffusion.references import parse_mask_strategy

    of_shot = plan.storyboard.shots[shot]
    return parse_mask_strategy(of_shot.mask_strategy or HEAD_ONLY) if of_shot.references else ()


def reference_problems(storyboard: Storyboard) -> list[str]:
    """What is wrong with where a storyboard has its references; no file is looked at."""
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
    """Keys of the files that a storyboard names, each once."""
    return list(dict.fromkeys(kind for _, kind, _, _ in _named(storyboard)))


def _named(storyboard: Storyboard) -> list[tuple[int, Kind, int | None, str]]:
    """Shot, kind, place among the references of the shot, and path of every file."""
    named: list[tuple[int, Kind, int | None, str]] = []
    for index, shot in enumerate(storyboard.shots):
        named += [(index, kind, None, path) for kind in REFERENCE_KINDS if (path := getattr(shot, kind)) is not None]
        named += [(index, "references", number, path) for number, path in enumerate(shot.references)]
    return named


def _name(shot: int, kind: str, number: int | None = None) -> str:
    return f"{shot}/{kind}" if number is None else f"{shot}/{kind}/{number}"


def _check(plan: Plan, shot: int, kind: Kind, number: int | None, path: Path) -> Reference:
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
    num_frames = max(1, int(info.num_frames / info.fps * plan.fps + 1e-6))
    if kind == "references" and num_frames > MAX_REFERENCE_FRAMES:
        raise ValueError(f"a reference has at most {MAX_REFERENCE_FRAMES} frames, got {num_frames}: cut it")
    is_end = kind == "video"
    return Reference(
        shot=shot,
        kind=kind,
        number=number,
        path=path,
        fit=plan_cover((info.height, info.width), target),
        num_frames=num_frames,
        note=given_span(num_frames, plan.geometry.grid).describe(num_frames) if is_end else f"{num_frames} frames",
        is_video=True,
    )


@torch.inference_mode()
def encode_references(job: Job, references: Sequence[Reference]) -> dict[str, Tensor]:
    """Latent frames (1, C, n, H, W) float32 by `SHOT/KIND`, and code frames (1, n, cH, cW) int64 by `SHOT/codes`."""
    from arlon.diffusion.references import encode_continued, encode_end_image, encode_image, encode_reference
    from arlon.film.workers import load_vae, torch_threads

    if not references:
        return {}
    grid, device = job.plan.geometry.grid, job.settings.device
    tensors: dict[str, Tensor] = {}
    with torch_threads(job.settings.num_threads):
        vae = load_vae(job)

        def encode(video: Tensor) -> Tensor:
            return vae.encode(video.to(device), tile=job.settings.vae_tile)

        def codes_of_still(picture: Tensor) -> Tensor | None:
            if not job.plan.geometry.has_codes:
                return None
            return _codes(job, encode(picture.expand(-1, grid.chunk_frames, -1, -1)[None]), 1)

        for given in references:
            video = _pixels(given, job.plan)
            if given.kind == "video":
                latent = encode_continued(encode, video, grid)
                codes = _codes(job, latent, latent.shape[2] // job.plan.geometry.code_ratio[0])
            elif given.kind == "image":
                latent, codes = encode_image(encode, video, grid), codes_of_still(video)
            elif given.kind == "references":
                latent, codes = encode_reference(encode, video, grid), None
            else:
                latent, codes = encode_end_image(encode, video, grid), None
            tensors[given.name] = latent.float().cpu().contiguous()
            if codes is not None:
                tensors[_name(given.shot, CODES)] = codes.cpu().contiguous()
        for shot, of_shot in groupby((g for g in references if g.kind == "references"), key=lambda given: given.shot):
            if (kept := _kept_head(job.plan, shot, tensors)) is None:
                continue
            codes = _codes(job, kept.to(device), kept.shape[2] // job.plan.geometry.code_ratio[0])
            if codes is None and kept.shape[2] == 1:
                pictures = (given for given in of_shot if not given.is_video)
                picture = next((given for given in pictures if torch.equal(tensors[given.name], kept)), None)
                codes = None if picture is None else codes_of_still(_pixels(picture, job.plan))
            if codes is not None:
                tensors[_name(shot, CODES)] = codes.cpu().contiguous()
    return tensors


def _kept_head(plan: Plan, shot: int, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """Latent frames (1, C, n, H, W) that the references of a shot keep at the head of its take; None if they do not."""
    first = next(segment for segment in plan.segments if segment.shot == shot)
    if (placed := _given_of(plan, shot, tensors).placed(first, plan.geometry.grid)) is None:
        return None
    latent, edit_ratio = placed
    kept = int((edit_ratio[0] == 0).long().cumprod(0).sum())
    return latent[:, :, :kept] if kept else None


def _pixels(given: Reference, plan: Plan) -> Tensor:
    """Video (3, pT, pH, pW) in [-1, 1] of the size at which the film is computed."""
    from arlon.data.pictures import read_picture
    from arlon.data.transforms import resize_and_crop
    from arlon.data.video_io import read_video
    from arlon.diffusion.references import given_span

    size = {"height": plan.frame_fit.made_height, "width": plan.frame_fit.made_width}
    if not given.is_video:
        return resize_and_crop(read_picture(given.path), **size, filter="bicubic")
    if given.kind == "references":
        return resize_and_crop(read_video(given.path, fps=plan.fps)[: given.num_frames], **size)
    needed = given_span(given.num_frames, plan.geometry.grid).frames
    start = max(0, given.num_frames - needed - MARGIN_FRAMES)
    return resize_and_crop(read_video(given.path, start=start, fps=plan.fps)[-needed:], **size)


def _codes(job: Job, latent: Tensor, count: int) -> Tensor | None:
    """The first `count` code frames of a latent; None without any, or for a base alone."""
    if not job.plan.geometry.has_codes or not count:
        return None
    from arlon.models.vqvae import LatentVQVAE

    vqvae = LatentVQVAE.from_pretrained(job.component("vqvae")).to(job.settings.device)
    return vqvae.encode(latent.float())[:, :count]


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a shot is given."""

    head: Tensor | None = None
    """Its first latent frames, (1, C, n, H, W)."""
    tail: Tensor | None = None
    """Its last latent frames, (1, C, n, H, W)."""
    codes: Tensor | None = None
    """The code frames that its take begins with, (1, n, cH, cW) int64."""
    references: tuple[Tensor, ...] = ()
    """What is placed in its take, (1, C, n, H, W) each."""
    placements: tuple[Placement, ...] = ()
    """Where."""

    def placed(self, segment: Segment, grid: SegmentGrid) -> tuple[Tensor, Tensor] | None:
        """What a segment of the take is given: latent (1, C, T, H, W), zero where free, and edit ratio (1, T).

        Raises:
            ValueError: If a placement names a reference or a frame that is not there.
        """
        from arlon.diffusion.references import place_references

        if all(group.segment != segment.index_in_take for group in self.placements):
            return None
        _, channels, _, *size = self.references[0].shape
        return place_references(
            torch.zeros(1, channels, segment.num_latents, *size),
            [[latent[0] for latent in self.references]],
            [self.placements],
            segment=segment.index_in_take,
            align=grid.chunk_latents,
        )


NOTHING = Given()


def read_given(job: Job) -> Mapping[int, Given]:
    """What the shots of a film are given, by shot, from its run folder.

    Raises:
        FileNotFoundError, RunFolderError: If that is not there, or damaged.
    """
    named = _named(job.plan.storyboard)
    if not named:
        return {}
    tensors = RunFolder(job.run_dir).read_references()
    return {shot: _given_of(job.plan, shot, tensors) for shot in dict.fromkeys(shot for shot, *_ in named)}


def _given_of(plan: Plan, shot: int, tensors: Mapping[str, Tensor]) -> Given:
    def of(kind: str) -> Tensor | None:
        return tensors.get(_name(shot, kind))

    count = len(plan.storyboard.shots[shot].references)
    return Given(
        head=of("image") if of("video") is None else of("video"),
        tail=of("end_image"),
        codes=of(CODES),
        references=tuple(tensors[_name(shot, "references", number)] for number in range(count)),
        placements=_placements(plan, shot),
    )
