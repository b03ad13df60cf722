"""The temporal part of the video VAE: a causal 3D autoencoder of per-frame latents, x4 in time.

Source: Open-Sora v1.2, `VAE_Temporal_SD`. State-dict keys are the released ones; dimension key as in
`arlon.models.video_vae`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class TemporalVAEConfig:
    """Causal 3D autoencoder over per-frame latents. Defaults: the released `VAE_Temporal_SD`."""

    in_out_channels: int = 4
    latent_embed_dim: int = 4
    embed_dim: int = 4
    filters: int = 128
    num_res_blocks: int = 4
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4)
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    num_groups: int = 32

    def __post_init__(self) -> None:
        if len(self.temporal_downsample) != len(self.channel_multipliers) - 1:
            raise ValueError(
                "temporal.temporal_downsample needs one entry fewer than temporal.channel_multipliers: expected "
                f"{len(self.channel_multipliers) - 1}, got {len(self.temporal_downsample)}"
            )

    @property
    def time_stride(self) -> int:
        """Video frames per latent frame (4)."""
        return 2 ** sum(self.temporal_downsample)


@dataclass(frozen=True)
class Posterior:
    """Diagonal Gaussian over latents; `mean` and `logvar` (B, C, T, H, W), logvar clamped to [-30, 20]."""

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> Posterior:
        """Split (B, 2C, ...) into mean and log-variance."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar.clamp(-30.0, 20.0))

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw `mean + std * noise`; the noise comes from `generator`, on its device."""
        device = generator.device if generator is not None else self.mean.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=torch.float32)
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean)

    def kl(self) -> Tensor:
        """KL divergence from a unit Gaussian, (B,) in nats, summed over all but the batch."""
        terms = self.mean.square() + self.logvar.exp() - 1.0 - self.logvar
        return 0.5 * terms.flatten(1).sum(1)


class CausalConv3d(nn.Module):
    """3D convolution that sees no later frame: all padding in time stands in front, zeros on all sides in space."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, *, time_stride: int = 1, bias: bool = True
    ) -> None:
        super().__init__()
        side = kernel // 2
        self.padding = (side, side, side, side, (kernel - 1) + (1 - time_stride), 0)
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride=(time_stride, 1, 1), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C', ceil(T / time_stride), H, W)."""
        return self.conv(F.pad(x, self.padding))


class ResBlock(nn.Module):
    """Two normalised, SiLU-activated 3x3x3 convolutions beside a skip."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, 3, bias=False)
        self.norm2 = nn.GroupNorm(num_groups, out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3, bias=False)
        if in_channels != out_channels:
            self.conv3 = CausalConv3d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C', T, H, W)."""
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (self.conv3(x) if hasattr(self, "conv3") else x)


def _res_blocks(in_channels: int, out_channels: int, config: TemporalVAEConfig) -> nn.Sequential:
    widths = [in_channels] + [out_channels] * config.num_res_blocks
    return nn.Sequential(*(ResBlock(a, b, config.num_groups) for a, b in itertools.pairwise(widths)))


class TemporalEncoder(nn.Module):
    """Per-frame latents (B, F, pT, H, W), pT a multiple of the time stride -> features (B, 2C, T, H, W)."""

    def __init__(self, config: TemporalVAEConfig) -> None:
        super().__init__()
        widths = [config.filters * m for m in config.channel_multipliers]
        self.conv_in = CausalConv3d(config.in_out_channels, config.filters, 3, bias=False)
        self.block_res_blocks = nn.ModuleList()
        self.conv_blocks = nn.ModuleList()
        previous = config.filters
        for level, width in enumerate(widths):
            self.block_res_blocks.append(_res_blocks(previous, width, config))
            if level < len(config.temporal_downsample):
                # A level that keeps its length has an identity, so that indices are those of the released weights.
                halves = config.temporal_downsample[level]
                self.conv_blocks.append(CausalConv3d(width, width, 3, time_stride=2) if halves else nn.Identity())
            previous = width
        self.res_blocks = _res_blocks(previous, previous, config)
        self.norm1 = nn.GroupNorm(config.num_groups, previous)
        self.conv2 = CausalConv3d(previous, 2 * config.latent_embed_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Encode; see the class."""
        x = self.conv_in(x)
        for level, blocks in enumerate(self.block_res_blocks):
            x = blocks(x)
            if level < len(self.conv_blocks):
                x = self.conv_blocks[level](x)
        x = self.res_blocks(x)
        return self.conv2(F.silu(self.norm1(x)))


class TemporalDecoder(nn.Module):
    """Latents (B, C, T, H, W) -> per-frame latents (B, F, T * time stride, H, W)."""

    def __init__(self, config: TemporalVAEConfig) -> None:
        super().__init__()
        widths = [config.filters * m for m in config.channel_multipliers]
        top = widths[-1]
        self.conv1 = CausalConv3d(config.latent_embed_dim, top, 3)
        self.res_blocks = _res_blocks(top, top, config)
        blocks: list[nn.Sequential] = []
        doubling: list[nn.Module] = []
        previous = top
        for level in reversed(range(len(widths))):
            # Built from the coarsest level to the finest, but numbered the other way: as in the released weights.
            blocks.insert(0, _res_blocks(previous, widths[level], config))
            previous = widths[level]
            if level > 0:
                # Twice the channels, of which `_phase_to_time` makes twice the frames.
                doubles = config.temporal_downsample[level - 1]
                doubling.insert(0, CausalConv3d(previous, 2 * previous, 3) if doubles else nn.Identity())
        self.block_res_blocks = nn.ModuleList(blocks)
        self.conv_blocks = nn.ModuleList(doubling)
        self.norm1 = nn.GroupNorm(config.num_groups, previous)
        self.conv_out = CausalConv3d(previous, config.in_out_channels, 3)

    def forward(self, z: Tensor) -> Tensor:
        """Decode; see the class."""
        x = self.res_blocks(self.conv1(z))
        for level in reversed(range(len(self.block_res_blocks))):
            x = self.block_res_blocks[level](x)
            if level > 0 and isinstance(self.conv_blocks[level - 1], CausalConv3d):
                x = _phase_to_time(self.conv_blocks[level - 1](x))
        return self.conv_out(F.silu(self.norm1(x)))


def _phase_to_time(x: Tensor) -> Tensor:
    """(B, 2C, T, H, W) -> (B, C, 2T, H, W): channel c * 2 + phase becomes frame t * 2 + phase."""
    b, c, t, h, w = x.shape
    return x.view(b, c // 2, 2, t, h, w).transpose(2, 3).reshape(b, c // 2, 2 * t, h, w)


class TemporalVAE(nn.Module):
    """Causal 3D VAE of one chunk of per-frame latents; x4 in time, no change in space."""

    def __init__(self, config: TemporalVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = TemporalEncoder(config)
        self.quant_conv = CausalConv3d(2 * config.latent_embed_dim, 2 * config.embed_dim, 1)
        self.post_quant_conv = CausalConv3d(config.embed_dim, config.latent_embed_dim, 1)
        self.decoder = TemporalDecoder(config)

    def moments(self, x: Tensor) -> Tensor:
        """Per-frame latents (B, F, pT, H, W) -> mean and log-variance (B, 2C, ceil(pT / 4), H, W)."""
        # Padding goes in front: the convolutions are causal, so the last latent frame ends with the last frame.
        front = -x.shape[2] % self.config.time_stride
        x = like_weights(x, self)
        return full_precision(self.quant_conv(self.encoder(F.pad(x, (0, 0, 0, 0, front, 0)))))

    def encode(self, x: Tensor) -> Posterior:
        """Per-frame latents (B, F, pT, H, W) -> posterior over (B, C, ceil(pT / 4), H, W); zeros go in front."""
        return Posterior.from_moments(self.moments(x))

    def decode(self, z: Tensor, num_frames: int) -> Tensor:
        """(B, C, T, H, W) -> per-frame latents (B, F, num_frames, H, W); the frames that padding added are dropped."""
        x = full_precision(self.decoder(self.post_quant_conv(like_weights(z, self))))
        # The decoder gives whole latent frames; what `moments` padded comes first.
        surplus = x.shape[2] - num_frames
        if not 0 <= surplus < self.config.time_stride:
            raise ValueError(
                f"num_frames ({num_frames}) does not fit {z.shape[2]} latent frames: expected "
                f"{x.shape[2] - self.config.time_stride + 1} to {x.shape[2]}"
            )
        return x[:, :, surplus:]


def like_weights(x: Tensor, module: nn.Module) -> Tensor:
    """`x` in the precision of the weights of a module."""
    weight = next(module.parameters(), None)
    return x if weight is None else x.to(weight.dtype)


def full_precision(x: Tensor) -> Tensor:
    """`x` in float32 if it is in half precision, otherwise as it is."""
    return x.float() if x.element_size() < 4 else x
