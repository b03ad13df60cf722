"""Latent and code frames of the media that a shot is given, by shot, ready for the segments of its take.

The frames are held clean while the segment around them is made. The code model continues from the codes of what a take
begins with, so that codes and frames agree: the complete code frames of a video, one code frame of a still image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from arlon.diffusion.references import place_references
from arlon.film.media import named_files, shot_placements, tensor_name
from arlon.film.plan import Plan, Segment
from arlon.grids import SegmentGrid

if TYPE_CHECKING:
    from arlon.diffusion.references import Placement

CODES = "codes"
"""Name, beside the kinds of files, under which the code frames are stored that a take begins with."""


@dataclass(frozen=True, kw_only=True)
class TakeMedia:
    """What one shot is given, encoded."""

    head: Tensor | None = None
    """First latent frames of the take that the shot starts, (1, C, n, H, W)."""
    tail: Tensor | None = None
    """Last latent frames of the shot, (1, C, n, H, W)."""
    codes: Tensor | None = None
    """Code frames that the take begins with, (1, n, cH, cW) int64."""
    references: tuple[Tensor, ...] = ()
    """Latent frames that `placements` place in the take, (1, C, n, H, W) each."""
    placements: tuple[Placement, ...] = ()

    def conditioning_for(self, segment: Segment, grid: SegmentGrid) -> tuple[Tensor, Tensor] | None:
        """Latent frames that the placements give a segment of the take.

        Returns:
            The latent (1, C, T, H, W), zero on free frames, and its edit ratio (1, T), 1 on free frames; None if no
            placement is for this segment.

        Raises:
            ValueError: If a placement names a reference or a frame that does not exist.
        """
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


NO_MEDIA = TakeMedia()
"""What a shot without files is given."""


def take_media(plan: Plan, tensors: Mapping[str, Tensor]) -> dict[int, TakeMedia]:
    """Encoded media of every shot that names files, by shot.

    Args:
        plan: The film.
        tensors: Latent and code frames by `SHOT/KIND`, from `arlon.film.encode_media` or from a run folder.

    Raises:
        KeyError: If the latent frames of a reference are missing.
    """
    shots = dict.fromkeys(shot for shot, *_ in named_files(plan.storyboard))
    return {shot: media_of_shot(plan, shot, tensors) for shot in shots}


def media_of_shot(plan: Plan, shot: int, tensors: Mapping[str, Tensor]) -> TakeMedia:
    """Encoded media of one shot; arguments as of `take_media`."""
    image, video = (tensors.get(tensor_name(shot, kind)) for kind in ("image", "video"))
    count = len(plan.storyboard.shots[shot].references)
    return TakeMedia(
        head=image if video is None else video,
        tail=tensors.get(tensor_name(shot, "end_image")),
        codes=tensors.get(tensor_name(shot, CODES)),
        references=tuple(tensors[tensor_name(shot, "references", number)] for number in range(count)),
        placements=shot_placements(plan.storyboard, shot),
    )
