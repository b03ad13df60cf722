"""VBench's rules: what its networks are shown, and what is made of what they find.

Source: Huang et al., "VBench: Comprehensive benchmark suite for video generative models", arXiv:2311.17982, and its
code where the paper leaves something open (preprocessing, thresholds).
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

RULES = 2
"""Version of the rules here and in `networks`; stored figures of another version are computed again."""
FLOW_FPS = 8
"""Frames a second at which motion is looked at."""
FASTEST_SHARE = 0.05
DYNAMIC_PIXELS = 6.0
"""Shift from one frame to the next, in pixels of a frame with a short side of 256, that counts as motion."""
DYNAMIC_FRAMES = 0.25
INPUT_SIDE = 224
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


# --- what is made of what they find --------------------------------------------------------------------------


def flow_stride(fps: float) -> int:
    """Every how many frames motion is looked at."""
    return max(1, round(fps / FLOW_FPS))


def fastest_pixels(flow: Tensor) -> Tensor:
    """Mean length of the fastest 5 % of a flow (N, 2, pH, pW), in its unit, (N,)."""
    lengths = flow.norm(dim=1).flatten(1)
    count = max(1, int(lengths.shape[1] * FASTEST_SHARE))
    return lengths.topk(count, dim=1).values.mean(1)


def is_dynamic(pixels: Tensor, size: tuple[int, int], *, fps: float, num_frames: int) -> bool:
    """Whether enough frames move fast enough.

    Args:
        pixels: `fastest_pixels` of every pair of frames, (n,).
        size: Height and width of a frame.
        fps: Frames a second of the film.
        num_frames: Frames looked at.
    """
    threshold = max(1.0, FLOW_FPS / fps) * DYNAMIC_PIXELS * min(size) / 256
    return int((pixels > threshold).sum()) >= round(DYNAMIC_FRAMES * num_frames)


def consistency(features: Tensor) -> float:
    """Mean over frames from the second on of (cosine with the frame before + cosine with the first) / 2.

    Args:
        features: Of every frame, (pT, E); negative cosines count as 0.

    Returns:
        A value in [0, 1]; 1 for a single frame.
    """
    if len(features) < 2:
        return 1.0
    unit = F.normalize(features.double(), dim=-1)
    before = (unit[1:] * unit[:-1]).sum(-1).clamp(min=0)
    first = (unit[1:] @ unit[0]).clamp(min=0)
    return ((before + first) / 2).mean().item()


# --- what networks are shown ---------------------------------------------------------------------------------


def prepare_pictures(
    frames: np.ndarray,
    mode: str,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    *,
    side: int = INPUT_SIDE,
    in_levels: bool = False,
) -> Tensor:
    """Frames (n, pH, pW, 3) uint8 to normalised pictures (n, 3, h, w) whose shorter side is `side`.

    As torchvision does it for VBench: without anti-aliasing, and what bicubic filtering makes of edges is not clamped
    unless the result is to be `in_levels`, as that of pictures in uint8 is.
    """
    pictures = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()
    height, width = pictures.shape[-2:]
    size = (side, side * width // height) if height <= width else (side * height // width, side)
    pictures = F.interpolate(pictures, size=size, mode=mode, align_corners=False)
    pictures = (pictures.clamp(0, 255).round() if in_levels else pictures) / 255
    shape = (1, 3, 1, 1)
    return (pictures - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)


def centre(pictures: Tensor, side: int) -> Tensor:
    """The middle (side, side) of pictures (n, 3, h, w), where torchvision finds it: halves are rounded to even."""
    top, left = (round((length - side) / 2) for length in pictures.shape[-2:])
    return pictures[..., top : top + side, left : left + side]


def prepare_for_prompt(frames: np.ndarray, count: int, side: int) -> Tensor:
    """The middle frame of each of `count` parts of a shot, the last again if it has fewer, (count, 3, side, side)."""
    ends = np.linspace(0, len(frames), min(count, len(frames)) + 1).astype(int)
    middle = [(start + end - 1) // 2 for start, end in pairwise(ends)]
    picked = frames[[*middle, *middle[-1:] * (count - len(middle))]]
    return centre(prepare_pictures(picked, "bicubic", *CLIP, side=side, in_levels=True), side)


def pad_to_eighths(pictures: Tensor) -> Tensor:
    """Pictures (n, 3, h, w) with sides that are multiples of 8, edges repeated on both sides alike."""
    down, right = (-length % 8 for length in pictures.shape[-2:])
    return F.pad(pictures, (right // 2, right - right // 2, down // 2, down - down // 2), mode="replicate")
