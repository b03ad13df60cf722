"""Layers of the latent VQ-VAE, and its encoder and decoder made of them.

Features are (B, T, H, W, D): channels last, the fast layout of convolutions and linear maps on a CPU. No layer has
statistics over time or space.
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

MIN_WIDTH = 32
"""Narrowest level of the encoder and decoder (if `hidden_dim` is not narrower still)."""
NORM_EPS = 1e-6

Stride = tuple[int, int, int]


class SpatialConv(nn.Conv2d):
    """3x3 convolution of every frame of (B, T, H, W, D)."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__(dim_in, dim_out, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve over height and width, zeros outside."""
        y = super().forward(rearrange(x, "b t h w d -> (b t) d h w"))
        return rearrange(y, "(b t) d h w -> b t h w d", b=x.shape[0])


class TemporalConv(nn.Conv2d):
    """Convolution with a kernel of 3 over the frames of (B, T, H, W, D), at every position by itself."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__(dim_in, dim_out, kernel_size=(3, 1), padding=(1, 0))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve over time, zeros before the first and after the last frame."""
        y = super().forward(rearrange(x, "b t h w d -> b d t (h w)"))
        return rearrange(y, "b d t (h w) -> b t h w d", h=x.shape[2])


class ResBlock(nn.Module):
    """Pre-activation residual block: norm, SiLU, 1x3x3; norm, SiLU, 3x1x1. The identity when fresh."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.spatial_norm = nn.RMSNorm(dim, eps=NORM_EPS)
        self.spatial = SpatialConv(dim, dim)
        self.temporal_norm = nn.RMSNorm(dim, eps=NORM_EPS)
        self.temporal = TemporalConv(dim, dim)
        # The residual branch gives zero, so that a fresh block is the identity.
        for parameter in self.temporal.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, T, H, W, D)."""
        y = self.spatial(F.silu(self.spatial_norm(x)))
        return x + self.temporal(F.silu(self.temporal_norm(y)))


class Downsample(nn.Module):
    """Merge every patch of `stride` positions by one linear map: a convolution whose kernel is its stride."""

    def __init__(self, dim_in: int, dim_out: int, stride: Stride) -> None:
        super().__init__()
        self.stride = stride
        self.linear = nn.Linear(dim_in * stride[0] * stride[1] * stride[2], dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H, W, D) -> (B, T/t, H/h, W/w, D')."""
        t, h, w = self.stride
        return self.linear(rearrange(x, "b (T t) (H h) (W w) d -> b T H W (t h w d)", t=t, h=h, w=w))


class Upsample(nn.Module):
    """Split every position into a patch of `stride` positions by one linear map: `Downsample` mirrored."""

    def __init__(self, dim_in: int, dim_out: int, stride: Stride) -> None:
        super().__init__()
        self.stride = stride
        self.linear = nn.Linear(dim_in, dim_out * stride[0] * stride[1] * stride[2])

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H, W, D) -> (B, T*t, H*h, W*w, D')."""
        t, h, w = self.stride
        return rearrange(self.linear(x), "b T H W (t h w d) -> b (T t) (H h) (W w) d", t=t, h=h, w=w)


class Levels:
    """The grids between latent and codes, finest first.

    Attributes:
        strides: Between levels; halvings end at the code grid: ratio (2, 4, 4) -> (1, 2, 2), (2, 2, 2).
        widths: Of every level; the last is the code grid's, `hidden_dim`.
    """

    def __init__(self, ratio: tuple[int, int, int], hidden_dim: int) -> None:
        # log2 of the ratio along time, height and width.
        halvings = [r.bit_length() - 1 for r in ratio]
        deepest = max(halvings)
        self.strides: list[Stride] = []
        for level in range(deepest):
            # An axis with fewer halvings has them in the last levels.
            t, h, w = (2 if level >= deepest - n else 1 for n in halvings)
            self.strides.append((t, h, w))
        # Half the width per finer level, but never below `MIN_WIDTH`.
        narrowest = min(MIN_WIDTH, hidden_dim)
        self.widths = [max(hidden_dim >> (deepest - level), narrowest) for level in range(deepest + 1)]


def build_encoder(latent_channels: int, levels: Levels, *, code_dim: int, num_res_blocks: int) -> nn.Sequential:
    """(B, T, H, W, C) -> (B, cT, cH, cW, d)."""
    widths = levels.widths
    layers: list[nn.Module] = [SpatialConv(latent_channels, widths[0])]
    for level, stride in enumerate(levels.strides):
        layers += [ResBlock(widths[level]), Downsample(widths[level], widths[level + 1], stride)]
    layers += [ResBlock(widths[-1]) for _ in range(num_res_blocks)]
    return nn.Sequential(*layers, nn.RMSNorm(widths[-1], eps=NORM_EPS), nn.SiLU(), nn.Linear(widths[-1], code_dim))


def build_decoder(latent_channels: int, levels: Levels, *, code_dim: int, num_res_blocks: int) -> nn.Sequential:
    """(B, cT, cH, cW, d) -> (B, T, H, W, C)."""
    widths = levels.widths
    layers: list[nn.Module] = [nn.Linear(code_dim, widths[-1])]
    layers += [ResBlock(widths[-1]) for _ in range(num_res_blocks)]
    for level, stride in reversed(list(enumerate(levels.strides))):
        layers += [Upsample(widths[level + 1], widths[level], stride), ResBlock(widths[level])]
    return nn.Sequential(
        *layers,
        nn.RMSNorm(widths[0], eps=NORM_EPS),
        nn.SiLU(),
        SpatialConv(widths[0], latent_channels),
    )
