"""Patches, positions and numbers as vectors, for STDiT3 and the injection.

Source: Open-Sora v1.2. Positions and angles are float32 whatever the precision of the weights.

Dimension key
    B  batch    C  latent channels    T H W  latent grid    nT nH nW  patch grid    S  nH * nW    D  width
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arlon.grids import ceil_div

ROPE_BASE = 10_000.0
NUM_FREQUENCIES = 128
"""Frequencies of a scalar embedding; it is 256 wide."""


def pad_to_patches(latent: Tensor, patch_size: tuple[int, int, int]) -> Tensor:
    """Append zeros to latent (B, C, T, H, W) at the high end of axes that are no multiple of their patch."""
    missing = [-size % patch for size, patch in zip(latent.shape[2:], patch_size, strict=True)]
    if not any(missing):
        return latent
    return F.pad(latent, (0, missing[2], 0, missing[1], 0, missing[0]))


def patch_grid(latent: Tensor, patch_size: tuple[int, int, int]) -> tuple[int, int, int]:
    """Patch grid (nT, nH, nW) of latent (B, C, T, H, W), every axis rounded up."""
    t, h, w = (ceil_div(size, patch) for size, patch in zip(latent.shape[2:], patch_size, strict=True))
    return t, h, w


def sinusoid(values: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Sines and cosines of values (...) times frequencies (F,): two float32 tensors (..., F)."""
    angles = values.float().unsqueeze(-1) * frequencies
    return angles.sin(), angles.cos()


def spatial_position(height: Tensor, width: Tensor, grid: tuple[int, int], dim: int, base_size: int) -> Tensor:
    """Position embedding of the patches of one frame.

    With s = sqrt(height width) / base_size and b = round(sqrt(S)), row i lies at (i / s) (b / nH), column j
    at (j / s) (b / nW), so that pictures of any size and shape cover about the same range. A token holds the
    embedding of its column, then that of its row; each holds all its sines, then all its cosines.

    Args:
        height: Height of the video in pixels, (B,).
        width: Width of the video in pixels, (B,).
        grid: Patches (nH, nW) of a frame.
        dim: Width D, a multiple of 4.
        base_size: Side in pixels at which s is 1.

    Returns:
        (B, S, D), float32.
    """
    rows, columns = grid
    base = round(math.sqrt(rows * columns))
    scale = ((height.float() * width.float()).sqrt() / base_size).unsqueeze(-1)  # (B, 1)
    exponent = torch.arange(0, dim // 2, 2, device=height.device, dtype=torch.float32) / (dim // 2)
    frequencies = 1.0 / ROPE_BASE**exponent

    def embed(count: int) -> Tensor:
        places = torch.arange(count, device=height.device, dtype=torch.float32) / scale * (base / count)
        return torch.cat(sinusoid(places, frequencies), dim=-1)  # (B, count, D / 2)

    by_column = embed(columns).unsqueeze(1).expand(-1, rows, -1, -1)
    by_row = embed(rows).unsqueeze(2).expand(-1, -1, columns, -1)
    return torch.cat((by_column, by_row), dim=-1).flatten(1, 2)


class PatchEmbed(nn.Module):
    """Latent (B, C, T, H, W) to tokens (B, nT, S, D): a convolution whose stride is its kernel."""

    def __init__(self, in_channels: int, patch_size: tuple[int, int, int], dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv3d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, latent: Tensor) -> Tensor:
        """Embed latent (B, C, T, H, W), zero-padded where needed, as tokens (B, nT, S, D)."""
        patches = self.proj(pad_to_patches(latent, self.patch_size))  # (B, D, nT, nH, nW)
        return patches.flatten(3).permute(0, 2, 3, 1).contiguous()


class ScalarEmbedder(nn.Module):
    """A number per sample (flow time, frame rate) to a vector: 128 cosines and sines, then two Linears."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * NUM_FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, values: Tensor) -> Tensor:
        """Embed values (B,) as (B, D); cosines come first."""
        steps = torch.arange(NUM_FREQUENCIES, device=values.device, dtype=torch.float32)
        frequencies = torch.exp(steps * (-math.log(ROPE_BASE) / NUM_FREQUENCIES))
        sines, cosines = sinusoid(values, frequencies)
        return self.mlp(torch.cat((cosines, sines), dim=-1).to(next(self.mlp.parameters()).dtype))
