"""Given frames in latent space: the mask-strategy grammar of Open-Sora v1.2, and what a film's own references give.

A mask strategy says which latent frames of which reference stand where in which segment, and how much of them may
change. Groups are separated by `;`, their fields by `,`:

    segment, reference, reference start, target start, length, edit ratio        "0;2,1,-5,0,5,0.3"

Fields left out are 0,0,0,0,1,0: "0" puts the first latent frame of the first reference at the head of the first
segment. All but the ratio count latent frames or things from 0; a negative start counts from the end. Later groups
overwrite earlier ones. (The original says loop where this project says segment.)

The second half of this module needs no grammar: an image at the head, an image at the end, a video to go on from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from arlon.grids import SegmentGrid, num_latent_frames

EncodeFn = Callable[[Tensor], Tensor]
"""Video (1, 3, pT, pH, pW) in [-1, 1] -> latent (1, C, T, H, W), such as `VideoVAE.encode`."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """One group of a mask strategy."""

    segment: int = 0
    """Segment of the take it belongs to."""
    reference: int = 0
    """Index among the references."""
    reference_start: int = 0
    """First latent frame taken; negative: from the end of the reference."""
    target_start: int = 0
    """Where it goes in the segment, in latent frames; negative: from the end of the segment."""
    length: int = 1
    """Latent frames, at most; fewer where the reference or the segment ends before."""
    edit_ratio: float = 0.0
    """0 keeps the frames, 1 generates them from noise; see `arlon.diffusion.conditioning.sample_with_edits`."""

    def __post_init__(self) -> None:
        if min(self.segment, self.reference) < 0 or self.length < 1 or not 0 <= self.edit_ratio <= 1:
            raise ValueError(
                "segment and reference must be at least 0, length at least 1, edit ratio from 0 to 1, got "
                f"{self.segment}, {self.reference}, {self.length} and {self.edit_ratio:g}"
            )


def parse_mask_strategy(text: str) -> tuple[Placement, ...]:
    """Read a mask strategy; an empty text places nothing, and a `;` at the end adds nothing.

    Raises:
        ValueError: If a group is not one to six numbers in range; the message names it.
    """
    text = text.rstrip("; \t\r\n")
    return tuple(_parse_group(group) for group in text.split(";")) if text.strip() else ()


def _parse_group(group: str) -> Placement:
    names = [field.name for field in fields(Placement)]
    values = group.split(",")
    try:
        if len(values) > len(names):
            raise ValueError(f"expected at most {len(names)} fields, got {len(values)}")
        pairs = zip(names, values, strict=False)
        numbers: dict[str, Any] = {name: float(v) if name == "edit_ratio" else int(v) for name, v in pairs}
        return Placement(**numbers)
    except ValueError as error:
        expected = ", ".join(name.replace("_", " ") for name in names)
        raise ValueError(f"mask strategy group {group!r} must be numbers: {expected} ({error})") from None


def snap(value: int, step: int, limit: int) -> int:
    """Multiple of `step` that a start snaps to under the `align` option of the original.

    The nearest one, a half going down; but never up to the last whole step before `limit`, nor past it.

    Args:
        value: Start in latent frames, at least 0.
        step: Latent frames of a VAE chunk (5).
        limit: Latent frames of the whole.
    """
    # `2 * rest > step` rounds to the nearest multiple; it rounds up only if a step fits behind the result.
    below, rest = divmod(value, step)
    return (below + (2 * rest > step and below < limit // step - 1)) * step


def place_references(
    latent: Tensor,
    references: Sequence[Sequence[Tensor]],
    placements: Sequence[Sequence[Placement]],
    *,
    segment: int,
    align: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Put latent frames of references into the noise of a segment.

    Args:
        latent: Noise, (B, C, T, H, W); left as it is.
        references: For every sample its references, each (C, T_ref, H, W).
        placements: For every sample its groups; those of other segments are passed over.
        segment: Index of the segment.
        align: Starts snap to multiples of this, see `snap`; 5 in the released configs. A target start of -1 in 15
            latent frames then means 10, the start of the last chunk. None: starts as they are.

    Returns:
        The latent with the references in it, (B, C, T, H, W), and the edit ratio, (B, T): 1 on free frames.

    Raises:
        ValueError: If a group names a reference or a frame that is not there, or sizes differ.
    """
    if not len(references) == len(placements) == len(latent):
        raise ValueError(
            f"references and placements need one entry a sample: expected {len(latent)}, got {len(references)} and "
            f"{len(placements)}"
        )
    placed = latent.clone()
    edit_ratio = torch.ones(latent.shape[0], latent.shape[2], device=latent.device)
    # `target` and `ratio` are views: `_place` writes into `placed` and `edit_ratio`.
    for target, ratio, sources, groups in zip(placed, edit_ratio, references, placements, strict=True):
        for group in groups:
            if group.segment == segment:
                _place(target, ratio, sources, group, align)
    return placed, edit_ratio


def _place(target: Tensor, ratio: Tensor, references: Sequence[Tensor], group: Placement, align: int | None) -> None:
    """Write one group into a sample, target (C, T, H, W) and ratio (T,)."""
    to, taken = _frames_of(group, target.shape[1], [reference.shape[1] for reference in references], align)
    source = references[group.reference]
    # Everything but the number of frames has to agree.
    sizes = tuple((*tensor.shape[:1], *tensor.shape[2:]) for tensor in (target, source))
    if sizes[0] != sizes[1]:
        raise ValueError(f"reference {group.reference} must have (C, H, W) = {sizes[0]} as the segment, got {sizes[1]}")
    target[:, to] = source[:, taken].to(target)
    ratio[to] = group.edit_ratio


def _frames_of(group: Placement, num_latents: int, references: Sequence[int], align: int | None) -> tuple[slice, slice]:
    """Latent frames of a segment that a group fills, and those of its reference that it takes.

    Args:
        group: The group.
        num_latents: Latent frames of the segment.
        references: Latent frames of each reference.
        align: See `place_references`.

    Raises:
        ValueError: If the group names a reference or a frame that does not exist.
    """
    if group.reference >= len(references):
        raise ValueError(
            f"the mask strategy names reference {group.reference}, but there are {len(references)} (counted from 0)"
        )
    available = references[group.reference]
    start = _resolve(group.target_start, num_latents, align, "target start")
    source_start = _resolve(group.reference_start, available, align, "reference start")
    # A group may run past either end; what is left of it is placed.
    length = min(group.length, num_latents - start, available - source_start)
    return slice(start, start + length), slice(source_start, source_start + length)


def _resolve(start: int, num_frames: int, align: int | None, name: str) -> int:
    """A start as an index from the front."""
    if not -num_frames <= start < num_frames:
        raise ValueError(
            f"{name} {start} of the mask strategy is outside of {num_frames} latent frames: "
            f"expected {-num_frames} to {num_frames - 1}"
        )
    # A negative start counts from the end, as an index of a list does.
    index = start % num_frames
    return index if align is None else snap(index, align, num_frames)


@dataclass(frozen=True)
class GivenSpan:
    """The end of a video that a segment goes on from."""

    frames: int
    latents: int

    def describe(self, num_frames: int) -> str:
        """Say which of the `num_frames` frames of a video are used."""
        used = "all" if self.frames == num_frames else f"the last {self.frames} of"
        return f"goes on from {used} {num_frames} frames"


def given_span(num_frames: int, grid: SegmentGrid) -> GivenSpan:
    """Find the last frames of a video that a segment can begin with.

    As many latent frames as segments carry over, or as the video fills: the span starts at a chunk border of the
    segment and ends with the last frame of the video, so that its latent frames cover the video frames they will
    cover in the film. (The original encodes from the start of the video and snaps to its chunks, which may leave out
    up to 16 of the last frames: a jump.)

    Args:
        num_frames: Frames of the video, at least 1.
        grid: Of the take.

    Raises:
        ValueError: If the video is too short for one latent frame.
    """
    # The first latent frame of a chunk covers fewer video frames than the others (17 = 1 + 4 * 4).
    lead = grid.chunk_frames - (grid.chunk_latents - 1) * grid.time_stride
    if num_frames < lead:
        raise ValueError(f"a video to go on from needs at least {lead} frame{'s' * (lead > 1)}, got {num_frames}")
    best = GivenSpan(0, 0)
    for latents in range(1, grid.overlap + 1):
        chunks, rest = divmod(latents, grid.chunk_latents)
        frames = chunks * grid.chunk_frames + (lead + (rest - 1) * grid.time_stride if rest else 0)
        if frames <= num_frames:
            best = GivenSpan(frames, latents)
    return best


@torch.no_grad()
def encode_continued(encode: EncodeFn, video: Tensor, grid: SegmentGrid) -> Tensor:
    """Latent frames of the end of a video to go on from.

    Args:
        encode: Of the VAE.
        video: (3, pT, pH, pW) in [-1, 1], at the frame rate of the film.
        grid: Of the take.

    Returns:
        (1, C, n, H, W), n of `given_span`.
    """
    span = given_span(video.shape[1], grid)
    return encode(_whole_chunks(video[:, -span.frames :], grid))[:, :, : span.latents]


@torch.no_grad()
def encode_image(encode: EncodeFn, image: Tensor, grid: SegmentGrid) -> Tensor:
    """Latent frame (1, C, 1, H, W) of an image (3, 1, pH, pW) in [-1, 1] as the first frame of a take."""
    return encode(_whole_chunks(_checked_image(image), grid))[:, :, :1]


@torch.no_grad()
def encode_end_image(encode: EncodeFn, image: Tensor, grid: SegmentGrid) -> Tensor:
    """Latent frame (1, C, 1, H, W) of an image (3, 1, pH, pW) in [-1, 1] as the end of a segment.

    It covers the last few video frames (4), which all show the image. (The original puts the latent of a single
    frame there, or, under `align`, at the start of the last chunk.)
    """
    return encode(_whole_chunks(_checked_image(image), grid))[:, :, -1:]


@torch.no_grad()
def encode_reference(encode: EncodeFn, video: Tensor, grid: SegmentGrid) -> Tensor:
    """Latent frames (1, C, n, H, W) of a picture or video (3, pT, pH, pW) in [-1, 1], for a mask strategy."""
    latents = num_latent_frames(video.shape[1], grid.chunk_frames, grid.time_stride)
    return encode(_whole_chunks(video, grid))[:, :, :latents]


def _whole_chunks(video: Tensor, grid: SegmentGrid) -> Tensor:
    """A video (3, pT, pH, pW) held at its last frame until its last chunk is full, with a batch axis.

    Normalisation inside the VAE looks over a whole chunk: frames that are encoded alone, as the original does, get
    latents unlike those of the same frames in a video.
    """
    missing = -video.shape[1] % grid.chunk_frames
    return torch.cat((video, video[:, -1:].expand(-1, missing, -1, -1)), dim=1)[None]


def _checked_image(image: Tensor) -> Tensor:
    if image.ndim != 4 or image.shape[:2] != (3, 1):
        raise ValueError(f"expected an image as a video of one frame, (3, 1, pH, pW), got {tuple(image.shape)}")
    return image


@dataclass(frozen=True)
class SegmentCondition:
    """Conditioning of a segment by given latent frames.

    Attributes:
        latent: Clean latent, (B, C, T, H, W); zeros on frames that are to be made.
        edit_ratio: (B, T), in [0, 1]: 0 on frames that are kept, 1 on those that are made from noise, between them on
            frames that are changed; see `conditioning.sample_with_edits`.
    """

    latent: Tensor
    edit_ratio: Tensor

    @property
    def is_free(self) -> Tensor:
        """(B, T), bool, True = made from noise."""
        return self.edit_ratio == 1


def condition_segment(
    shape: Sequence[int],
    *,
    head: Tensor | None = None,
    tail: Tensor | None = None,
    placed: tuple[Tensor, Tensor] | None = None,
) -> SegmentCondition:
    """Lay given latent frames at the two ends of a segment, over those that a mask strategy placed.

    Args:
        shape: (B, C, T, H, W) of the segment.
        head: Its first latent frames, (B, C, n, H, W): an image, the end of a video, or what is carried over.
        tail: Its last latent frames, (B, C, m, H, W): an end image.
        placed: Latent (B, C, T, H, W) and edit ratio (B, T) of `place_references`.

    Returns:
        For `conditioning.place_clean` and `conditioning.sample_with_edits`.

    Raises:
        ValueError: If sizes differ, or nothing is left to make.
    """
    given = [part for part in (head, tail) if part is not None]
    for part in [*given, *([] if placed is None else placed[:1])]:
        expected = (*shape[:2], part.shape[2], *shape[3:])
        if tuple(part.shape) != expected:
            got = tuple(part.shape)
            raise ValueError(f"given frames must fit the segment: expected (B, C, n, H, W) = {expected}, got {got}")
    if placed is not None:
        latent, edit_ratio = (part.clone() for part in placed)
    else:
        latent = torch.zeros(*shape, device=given[0].device if given else None)
        edit_ratio = torch.ones(shape[0], shape[2], device=latent.device)
    num_given = sum(part.shape[2] for part in given)
    if head is not None and num_given < shape[2]:
        latent[:, :, : head.shape[2]] = head
        edit_ratio[:, : head.shape[2]] = 0
    if tail is not None and num_given < shape[2]:
        latent[:, :, -tail.shape[2] :] = tail
        edit_ratio[:, -tail.shape[2] :] = 0
    _check_something_is_made(max(num_given, int((edit_ratio == 0).sum(dim=1).max())), shape[2])
    return SegmentCondition(latent, edit_ratio)


def plan_edit_ratios(
    num_latents: int,
    *,
    head: int = 0,
    tail: int = 0,
    references: Sequence[int] = (),
    placements: Sequence[Placement] = (),
    align: int | None = None,
) -> tuple[float, ...]:
    """Edit ratio of every latent frame of a segment, from lengths alone.

    The same as `place_references` followed by `condition_segment` gives, before any tensor exists.

    Args:
        num_latents: Latent frames of the segment.
        head: How many of the first ones are given: by an image, the end of a video, or the segment before.
        tail: How many of the last ones are given: 1 by an end image.
        references: Latent frames of each reference.
        placements: The groups of the segment.
        align: See `place_references`.

    Returns:
        One ratio in [0, 1] for each latent frame: 0 if it is kept, 1 if it is made from noise.

    Raises:
        ValueError: If a group names a reference or a frame that does not exist, or nothing is left to make.
    """
    ratios = [1.0] * num_latents
    for group in placements:
        to, _ = _frames_of(group, num_latents, references, align)
        ratios[to] = [group.edit_ratio] * (to.stop - to.start)
    if head + tail < num_latents:
        ratios[:head] = [0.0] * head
        ratios[num_latents - tail :] = [0.0] * tail
    _check_something_is_made(max(head + tail, ratios.count(0.0)), num_latents)
    return tuple(ratios)


def _check_something_is_made(num_kept: int, num_latents: int) -> None:
    """Raise a ValueError if a segment has all of its latent frames given."""
    if num_kept >= num_latents:
        raise ValueError(f"{num_kept} of {num_latents} latent frames of a segment are given: nothing is left to make")
