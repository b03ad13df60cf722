"""Dense optical flow without learned weights: iterative Lucas-Kanade over a pyramid.

Source: Bouguet, "Pyramidal implementation of the Lucas Kanade feature tracker", 2000; here with a Gaussian window, the
gradients of both frames, and a median filter after every update. Where a window holds no texture the flow is zero.
Plain objects on plain ground come out too fast at their edges, where ground and object cannot be told apart.

Dimension key: N pairs of frames, C colours, pH pW pixels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

COARSEST_SIDE = 8
"""The pyramid ends before a side would be shorter, in pixels."""
NUM_ITERATIONS = 4
"""Updates at each level."""
WINDOW_SIGMA = 2.5
"""Standard deviation of the window, pixels of the level."""
MAX_UPDATE = 1.0
"""Longest step of an update, pixels of the level: larger ones belong to the level above."""
TEXTURE_FLOOR = 2e-3
"""Added to the squared gradients (values in [0, 1], a pixel), so that noise on a flat background does not flow."""
_BLUR = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


def estimate_flow(before: Tensor, after: Tensor) -> Tensor:
    """Displacement of the picture at each pixel of a frame to the next frame.

    Args:
        before: Pictures (N, C, pH, pW) in [0, 1]; colours count alike.
        after: The later frames, likewise.

    Returns:
        (N, 2, pH, pW), the shift to the right and down, in pixels.

    Raises:
        ValueError: If the shapes differ or are not (N, C, pH, pW).
    """
    if before.shape != after.shape or before.ndim != 4:
        shapes = f"{tuple(before.shape)} and {tuple(after.shape)}"
        raise ValueError(f"expected pictures (N, C, pH, pW) of one shape, got {shapes}")
    pyramids = [_pyramid(pictures.float()) for pictures in (before, after)]
    flow: Tensor | None = None
    # From coarse to fine: every level refines the flow of the one above.
    for first, second in zip(*(reversed(levels) for levels in pyramids), strict=True):
        size = first.shape[-2:]
        flow = first.new_zeros(len(first), 2, *size) if flow is None else _enlarge(flow, size)
        flow = _refine(first, second, flow)
    assert flow is not None
    return flow


def _pyramid(pictures: Tensor) -> list[Tensor]:
    """Pictures (N, C, pH, pW) at full size, half size, ..."""
    levels = [pictures]
    while min(levels[-1].shape[-2:]) // 2 >= COARSEST_SIDE:
        levels.append(_filtered(levels[-1], torch.tensor(_BLUR))[..., ::2, ::2])
    return levels


def _enlarge(flow: Tensor, size: torch.Size) -> Tensor:
    """Flow of the level above in pixels of this level."""
    scale = [new / old for new, old in zip(size, flow.shape[-2:], strict=True)]
    wide = F.interpolate(flow, size=size, mode="bilinear", align_corners=False)
    return wide * torch.tensor([scale[1], scale[0]], device=flow.device).view(1, 2, 1, 1)


def _refine(before: Tensor, after: Tensor, flow: Tensor) -> Tensor:
    """Updates at one level: least squares of brightness constancy in a window around every pixel."""
    radius = math.ceil(2.5 * WINDOW_SIGMA)
    window = torch.exp(-(torch.arange(-radius, radius + 1.0) ** 2) / (2 * WINDOW_SIGMA**2))
    window = window / window.sum()
    for _ in range(NUM_ITERATIONS):
        # Each update solves for what is left after the second frame is moved back by the flow so far.
        there = _warp(after, flow)
        dx, dy = _gradients((before + there) / 2)
        change = before - there
        products = [(a * b).mean(1) for a, b in ((dx, dx), (dx, dy), (dy, dy), (dx, change), (dy, change))]
        xx, xy, yy, x, y = _filtered(torch.stack(products, 1), window).unbind(1)
        # The floor also keeps the determinant below away from zero.
        xx, yy = xx + TEXTURE_FLOOR, yy + TEXTURE_FLOOR
        # Inverse of the 2 x 2 structure tensor times the right-hand side (Cramer's rule).
        update = torch.stack([yy * x - xy * y, xx * y - xy * x], 1) / (xx * yy - xy * xy)[:, None]
        length = update.norm(dim=1, keepdim=True)
        flow = _median(flow + update * (MAX_UPDATE / length.clamp(min=MAX_UPDATE)))
    return flow


def _median(flow: Tensor) -> Tensor:
    """Median of 3 x 3 neighbours of each component: what one window alone believes is dropped."""
    wide = F.pad(flow, (1, 1, 1, 1), mode="replicate")
    return wide.unfold(2, 3, 1).unfold(3, 3, 1).flatten(-2).median(-1).values


def _gradients(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences of (N, C, pH, pW) to the right and down, a pixel."""
    wide = F.pad(pictures, (1, 1, 1, 1), mode="replicate")
    return (wide[..., 1:-1, 2:] - wide[..., 1:-1, :-2]) / 2, (wide[..., 2:, 1:-1] - wide[..., :-2, 1:-1]) / 2


def _filtered(planes: Tensor, window: Tensor) -> Tensor:
    """Planes (N, C, pH, pW) under a separable window, edges repeated."""
    channels, radius, window = planes.shape[1], len(window) // 2, window.to(planes)
    wide = F.pad(planes, (radius,) * 4, mode="replicate")
    rows = F.conv2d(wide, window.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    return F.conv2d(rows, window.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)


def _warp(pictures: Tensor, flow: Tensor) -> Tensor:
    """Pictures (N, C, pH, pW) read at every pixel plus its flow (N, 2, pH, pW)."""
    height, width = pictures.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = torch.stack([x, y]).to(flow) + flow
    size = torch.tensor([width, height]).to(flow).view(1, 2, 1, 1)
    # Pixel centres to the coordinates of grid_sample, in which -1 and 1 are the outer edges.
    grid = ((2 * place + 1) / size - 1).movedim(1, -1)
    return F.grid_sample(pictures, grid, mode="bilinear", padding_mode="border", align_corners=False)
