"""Video VAE: a per-frame KL autoencoder followed by a causal 3D autoencoder of its latents.

Source: Open-Sora v1.2, `VideoAutoencoderPipeline` (spatial part: diffusers AutoencoderKL, x8 in space; temporal part:
`VAE_Temporal_SD`, x4 in time). State-dict keys are the released ones.

Departures: encoding returns the posterior mean unless a generator is given (the original always samples); equal chunks
go through the temporal part as one batch (same figures, group norm statistics are per sample).

Dimension key
    B  batch    pT pH pW  video frames, height, width    T H W  latent frames, height, width
    C  channels of the final latent    F  channels of the per-frame latent
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arlon.grids import ceil_div, num_latent_frames


@dataclass(frozen=True, kw_only=True)
class SpatialVAEConfig:
    """Per-frame autoencoder (diffusers AutoencoderKL). Defaults: the SDXL one of Open-Sora v1.2."""

    latent_channels: int = 4
    layers_per_block: int = 2
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    scaling_factor: float = 0.18215
    """Multiplies its latents; 0.18215 is what the released video VAE was trained with, not SDXL's own 0.13025."""


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


@dataclass(frozen=True, kw_only=True)
class VideoVAEConfig:
    """Both parts, the chunk length and the normalisation of the final latent, `(z - shift) / scale` per channel."""

    spatial: SpatialVAEConfig = field(default_factory=SpatialVAEConfig)
    temporal: TemporalVAEConfig = field(default_factory=TemporalVAEConfig)
    micro_frame_size: int | None = 17
    """Frames of one temporal chunk; None encodes a whole video as one chunk."""
    micro_batch_size: int | None = 4
    """Frames that pass the spatial part together; bounds memory, changes nothing else. None: all."""
    shift: tuple[float, ...] = (-0.10, 0.34, 0.27, 0.98)
    scale: tuple[float, ...] = (3.85, 2.32, 2.33, 3.06)

    def __post_init__(self) -> None:
        if self.spatial.latent_channels != self.temporal.in_out_channels:
            raise ValueError(
                f"spatial.latent_channels ({self.spatial.latent_channels}) must equal temporal.in_out_channels "
                f"({self.temporal.in_out_channels})"
            )
        if not len(self.shift) == len(self.scale) == self.temporal.embed_dim:
            raise ValueError(
                f"shift and scale need one entry per latent channel: expected {self.temporal.embed_dim}, "
                f"got {len(self.shift)} and {len(self.scale)}"
            )

    @property
    def latent_channels(self) -> int:
        """Channels of the final latent."""
        return self.temporal.embed_dim

    @property
    def space_stride(self) -> int:
        """Pixels per latent row or column (8)."""
        return 2 ** (len(self.spatial.block_out_channels) - 1)


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


# --- temporal part ---------------------------------------------------------------------------------------------------


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


def _res_blocks(in_channels: int, out_channels: int, config: TemporalVAEConfig) -> nn.ModuleList:
    widths = [in_channels] + [out_channels] * config.num_res_blocks
    return nn.ModuleList(ResBlock(a, b, config.num_groups) for a, b in itertools.pairwise(widths))


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
            for block in blocks:
                x = block(x)
            if level < len(self.conv_blocks):
                x = self.conv_blocks[level](x)
        for block in self.res_blocks:
            x = block(x)
        return self.conv2(F.silu(self.norm1(x)))


class TemporalDecoder(nn.Module):
    """Latents (B, C, T, H, W) -> per-frame latents (B, F, T * time stride, H, W)."""

    def __init__(self, config: TemporalVAEConfig) -> None:
        super().__init__()
        widths = [config.filters * m for m in config.channel_multipliers]
        top = widths[-1]
        self.conv1 = CausalConv3d(config.latent_embed_dim, top, 3)
        self.res_blocks = _res_blocks(top, top, config)
        blocks: list[nn.ModuleList] = []
        doubling: list[nn.Module] = []
        previous = top
        for level in reversed(range(len(widths))):
            blocks.insert(0, _res_blocks(previous, widths[level], config))
            previous = widths[level]
            if level > 0:
                doubles = config.temporal_downsample[level - 1]
                doubling.insert(0, CausalConv3d(previous, 2 * previous, 3) if doubles else nn.Identity())
        self.block_res_blocks = nn.ModuleList(blocks)
        self.conv_blocks = nn.ModuleList(doubling)
        self.norm1 = nn.GroupNorm(config.num_groups, previous)
        self.conv_out = CausalConv3d(previous, config.in_out_channels, 3)

    def forward(self, z: Tensor) -> Tensor:
        """Decode; see the class."""
        x = self.conv1(z)
        for block in self.res_blocks:
            x = block(x)
        for level in reversed(range(len(self.block_res_blocks))):
            for block in self.block_res_blocks[level]:
                x = block(x)
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

    def encode(self, x: Tensor) -> Posterior:
        """Per-frame latents (B, F, pT, H, W) -> posterior over (B, C, ceil(pT / 4), H, W); zeros go in front."""
        front = -x.shape[2] % self.config.time_stride
        x = F.pad(x, (0, 0, 0, 0, front, 0))
        return Posterior.from_moments(self.quant_conv(self.encoder(x)))

    def decode(self, z: Tensor, num_frames: int) -> Tensor:
        """(B, C, T, H, W) -> per-frame latents (B, F, num_frames, H, W); the frames that padding added are dropped."""
        x = self.decoder(self.post_quant_conv(z))
        surplus = x.shape[2] - num_frames
        if not 0 <= surplus < self.config.time_stride:
            raise ValueError(
                f"num_frames ({num_frames}) does not fit {z.shape[2]} latent frames: expected "
                f"{x.shape[2] - self.config.time_stride + 1} to {x.shape[2]}"
            )
        return x[:, :, surplus:]


# --- both parts ------------------------------------------------------------------------------------------------------


class _SpatialVAE(nn.Module):
    """Holds diffusers' AutoencoderKL under the released key prefix `spatial_vae.module`."""

    def __init__(self, config: SpatialVAEConfig) -> None:
        from diffusers import AutoencoderKL

        super().__init__()
        levels = len(config.block_out_channels)
        self.module = AutoencoderKL(
            latent_channels=config.latent_channels,
            layers_per_block=config.layers_per_block,
            block_out_channels=config.block_out_channels,
            norm_num_groups=config.norm_num_groups,
            mid_block_add_attention=config.mid_block_add_attention,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
        )


class VideoVAE(nn.Module):
    """Pixels <-> normalised latents."""

    config_class = VideoVAEConfig

    def __init__(self, config: VideoVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.spatial_vae = _SpatialVAE(config.spatial)
        self.temporal_vae = TemporalVAE(config.temporal)
        self.register_buffer("scale", torch.tensor(config.scale).view(1, -1, 1, 1, 1))
        self.register_buffer("shift", torch.tensor(config.shift).view(1, -1, 1, 1, 1))
        self._init_weights()

    def _init_weights(self) -> None:
        """Start every residual block as its skip: a fresh network is nearly linear, and learns faster."""
        for name, module in self.named_modules():
            if isinstance(module, ResBlock):
                nn.init.zeros_(module.conv2.conv.weight)
            elif name.rpartition(".")[0].endswith("resnets"):
                nn.init.zeros_(module.conv2.weight)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **overrides: Any) -> VideoVAE:
        """Load a component folder: our own export or the released Open-Sora VAE v1.2 layout; strict."""
        from arlon.checkpoint import load_component

        return load_component(cls, folder, **overrides)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write config.json and model.safetensors to `folder`."""
        from arlon.checkpoint import save_component

        save_component(self, folder, dtype=dtype)

    @staticmethod
    def translate_config(values: Mapping[str, Any]) -> dict[str, Any]:
        """Config values of this class from a config.json in the released layout (`vae_2d`, `vae_temporal`)."""
        if "vae_2d" not in values:
            return dict(values)
        kept = {key: values[key] for key in ("micro_frame_size", "shift", "scale") if key in values}
        return kept | {"micro_batch_size": values["vae_2d"].get("micro_batch_size", 4)}

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T, H, W) of a video of this size; height and width are rounded down to whole latents."""
        stride = self.config.space_stride
        frames = num_latent_frames(num_frames, self.config.micro_frame_size, self.config.temporal.time_stride)
        return self.config.latent_channels, frames, height // stride, width // stride

    def encode(self, video: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Encode a video.

        Args:
            video: (B, 3, pT, pH, pW) in [-1, 1].
            generator: If given, both posteriors are sampled from it; otherwise their means are used.

        Returns:
            Normalised latent (B, C, T, H, W).
        """
        frames = self.encode_frames(video, generator)
        parts = [self._draw(p, generator) for p in self._encode_chunks(frames)]
        return (torch.cat(parts, dim=2) - self.shift) / self.scale

    def decode(self, latent: Tensor, num_frames: int) -> Tensor:
        """Decode a normalised latent (B, C, T, H, W) to (B, 3, num_frames, pH, pW), about [-1, 1].

        Raises:
            ValueError: If `num_frames` video frames do not make T latent frames.
        """
        chunk = self.config.micro_frame_size
        expected = num_latent_frames(num_frames, chunk, self.config.temporal.time_stride)
        if expected != latent.shape[2]:
            raise ValueError(
                f"num_frames={num_frames} makes {expected} latent frames, but the latent has {latent.shape[2]}"
            )
        z = latent * self.scale + self.shift
        if chunk is None:
            return self.decode_frames(self.temporal_vae.decode(z, num_frames))
        step = ceil_div(chunk, self.config.temporal.time_stride)
        full = num_frames // chunk
        parts = []
        if full:
            folded = _fold(z[:, :, : full * step], full)
            parts.append(_unfold(self.temporal_vae.decode(folded, chunk), full))
        if num_frames % chunk:
            parts.append(self.temporal_vae.decode(z[:, :, full * step :], num_frames % chunk))
        return self.decode_frames(torch.cat(parts, dim=2))

    def encode_frames(self, video: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Spatial part alone: (B, 3, pT, pH, pW) -> scaled per-frame latents (B, F, pT, H, W)."""
        module = self.spatial_vae.module

        def run(frames: Tensor) -> Tensor:
            moments = module.quant_conv(module.encoder(frames))
            return self._draw(Posterior.from_moments(moments), generator) * self.config.spatial.scaling_factor

        return self._by_frame(run, video)

    def decode_frames(self, frames: Tensor) -> Tensor:
        """Spatial part alone: scaled per-frame latents (B, F, pT, H, W) -> (B, 3, pT, pH, pW)."""
        module = self.spatial_vae.module

        def run(z: Tensor) -> Tensor:
            return module.decoder(module.post_quant_conv(z / self.config.spatial.scaling_factor))

        return self._by_frame(run, frames)

    def _encode_chunks(self, frames: Tensor) -> list[Posterior]:
        """Posteriors of all temporal chunks, in order, for per-frame latents (B, F, pT, H, W)."""
        chunk = self.config.micro_frame_size
        if chunk is None or frames.shape[2] <= chunk:
            return [self.temporal_vae.encode(frames)]
        full = frames.shape[2] // chunk
        folded = self.temporal_vae.encode(_fold(frames[:, :, : full * chunk], full))
        parts = [Posterior(_unfold(folded.mean, full), _unfold(folded.logvar, full))]
        if frames.shape[2] % chunk:
            parts.append(self.temporal_vae.encode(frames[:, :, full * chunk :]))
        return parts

    def _by_frame(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Apply `run` to (n, C, H, W) micro batches of the frames of (B, C, pT, H, W)."""
        batch, frames = x.shape[0], x.shape[2]
        flat = x.transpose(1, 2).flatten(0, 1)
        size = self.config.micro_batch_size or len(flat)
        done = [run(part) for part in flat.split(size)]
        flat = done[0] if len(done) == 1 else torch.cat(done)
        return flat.unflatten(0, (batch, frames)).transpose(1, 2)

    @staticmethod
    def _draw(posterior: Posterior, generator: torch.Generator | None) -> Tensor:
        return posterior.mean if generator is None else posterior.sample(generator)


def _fold(x: Tensor, chunks: int) -> Tensor:
    """(B, C, chunks * n, H, W) -> (B * chunks, C, n, H, W)."""
    b, c, t, h, w = x.shape
    return x.reshape(b, c, chunks, t // chunks, h, w).transpose(1, 2).reshape(b * chunks, c, t // chunks, h, w)


def _unfold(x: Tensor, chunks: int) -> Tensor:
    """Inverse of `_fold`."""
    bc, c, n, h, w = x.shape
    return x.view(bc // chunks, chunks, c, n, h, w).transpose(1, 2).reshape(bc // chunks, c, chunks * n, h, w)


def latent_statistics(latents: Sequence[Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel mean and standard deviation of unnormalised latents (B, C, T, H, W): a VAE's `shift` and `scale`."""
    flat = torch.cat([z.transpose(0, 1).flatten(1) for z in latents], dim=1).double()
    return tuple(flat.mean(1).tolist()), tuple(flat.std(1).tolist())
