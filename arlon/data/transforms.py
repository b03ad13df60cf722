"""From decoded frames of any size to training videos of one size."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def resize_and_crop(frames: np.ndarray, *, height: int, width: int) -> Tensor:
    """Scale frames until they just cover (height, width), cut the centre out, map 0..255 to [-1, 1].

    The aspect ratio is kept. Scaling is bilinear with an anti-aliasing filter; frames of the right size are
    not touched.

    Args:
        frames: (pT, pH, pW, 3) uint8.
        height: Height of the result, pixels.
        width: Width of the result, pixels.

    Returns:
        Video (3, pT, height, width), float32 in [-1, 1].

    Raises:
        ValueError: If `frames` has another shape or type, or the size is not positive.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise ValueError(f"expected frames (pT, pH, pW, 3) uint8, got {tuple(frames.shape)} {frames.dtype}")
    if height < 1 or width < 1:
        raise ValueError(f"height and width must be positive, got {height} and {width}")
    video = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()  # (pT, 3, pH, pW)
    scaled = cover_size(video.shape[-2:], (height, width))
    if scaled != tuple(video.shape[-2:]):
        video = F.interpolate(video, size=scaled, mode="bilinear", antialias=True, align_corners=False)
    top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
    video = video[:, :, top : top + height, left : left + width]
    return (video.transpose(0, 1) / 127.5 - 1).clamp(-1, 1).contiguous()


def cover_size(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """Smallest (height, width) of the proportions of `size` that covers `target`, rounded to whole pixels."""
    scale = max(target[0] / size[0], target[1] / size[1])
    return max(target[0], round(size[0] * scale)), max(target[1], round(size[1] * scale))
