"""Between decoded frames and videos: conversion of pixel values, and resizing with proportions kept.

*Frames* are what files hold, (pT, pH, pW, 3) uint8; a *video* is what networks see, (3, pT, pH, pW) float in [-1, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Filter = Literal["bilinear", "bicubic"]
Size = tuple[int, int]
"""(height, width) in pixels."""


@dataclass(frozen=True, kw_only=True)
class CoverCrop:
    """Scaling and centre crop that make frames of one size fill frames of another, proportions kept."""

    source: Size
    scaled: Size
    target: Size

    def describe(self) -> str:
        """Scaling and cropping in words; sizes are width x height."""
        if self.source == self.target:
            return f"{_spelled(self.source)}, used as it is"
        actions = [] if self.scaled == self.source else [f"scaled to {_spelled(self.scaled)}"]
        if self.scaled != self.target:
            cut = next(axis for axis in (0, 1) if self.scaled[axis] != self.target[axis])
            lost = 1 - self.target[cut] / self.scaled[cut]
            sides = ("top and bottom", "left and right")[cut]
            actions.append(f"cut to the centre {_spelled(self.target)} ({lost:.0%} lost at {sides})")
        return f"{_spelled(self.source)}, {', '.join(actions)}"


def plan_cover(source: Size, target: Size) -> CoverCrop:
    """Scaling and centre crop that make frames of size `source` fill `target`; needs no pixels.

    Raises:
        ValueError: If a size is not positive.
    """
    if min(*source, *target) < 1:
        raise ValueError(f"height and width must be positive, got {source} to fill {target}")
    return CoverCrop(source=source, scaled=cover_size(source, target), target=target)


def cover_size(size: Size, target: Size) -> Size:
    """Smallest (height, width) of the proportions of `size` that covers `target`, rounded to whole pixels."""
    scale = max(target[0] / size[0], target[1] / size[1])
    return max(target[0], round(size[0] * scale)), max(target[1], round(size[1] * scale))


def frames_to_video(frames: np.ndarray) -> Tensor:
    """Video (3, pT, pH, pW) float32 in [-1, 1] of frames (pT, pH, pW, 3) uint8, as a view of new memory."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2).to(torch.float32) / 127.5 - 1


def video_to_frames(video: Tensor) -> np.ndarray:
    """Frames (pT, pH, pW, 3) uint8 of a video (3, pT, pH, pW) in [-1, 1]; values outside are clipped."""
    levels = ((video.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return levels.permute(1, 2, 3, 0).contiguous().cpu().numpy()


def resize_and_crop(frames: np.ndarray, *, height: int, width: int, filter: Filter = "bilinear") -> Tensor:
    """Scale frames until they just cover (height, width), cut the centre out, map 0..255 to [-1, 1].

    The aspect ratio is kept; `plan_cover` says what is done in words. Scaling has an anti-aliasing filter; frames of
    the right size are not touched.

    Args:
        frames: (pT, pH, pW, 3) uint8.
        height: Height of the result, pixels.
        width: Width of the result, pixels.
        filter: Open-Sora v1.2 takes "bilinear" for videos and "bicubic" for pictures.

    Returns:
        Video (3, pT, height, width), float32 in [-1, 1].

    Raises:
        ValueError: If `frames` has another shape or type, or the size is not positive.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise ValueError(f"expected frames (pT, pH, pW, 3) uint8, got {tuple(frames.shape)} {frames.dtype}")
    fit = plan_cover(frames.shape[1:3], (height, width))
    video = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()  # (pT, 3, pH, pW)
    if fit.scaled != fit.source:
        video = F.interpolate(video, size=fit.scaled, mode=filter, antialias=True, align_corners=False)
    video = crop_centre(video, height=height, width=width)
    return (video.transpose(0, 1) / 127.5 - 1).clamp(-1, 1).contiguous()


def crop_centre(video: Tensor, *, height: int, width: int) -> Tensor:
    """The centre (..., height, width) of a video (..., pH, pW), as a view.

    Raises:
        ValueError: If the video is smaller than that.
    """
    size = tuple(video.shape[-2:])
    if not (1 <= height <= size[0] and 1 <= width <= size[1]):
        raise ValueError(f"cannot cut (height, width) = {(height, width)} out of frames of {size}")
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return video[..., top : top + height, left : left + width]


def _spelled(size: Size) -> str:
    return f"{size[1]} x {size[0]}"
