"""The spatial part of the video VAE: a per-frame KL autoencoder, diffusers' AutoencoderKL, x8 in space."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


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


class SpatialVAE(nn.Module):
    """Holds diffusers' AutoencoderKL under the released key prefix `spatial_vae.module`."""

    def __init__(self, config: SpatialVAEConfig) -> None:
        from diffusers.models import AutoencoderKL

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


def channels_last(frames: Tensor) -> Tensor:
    """Frames (N, C, H, W) on a CPU, channels innermost in memory.

    Convolutions with few channels decode in three quarters of the time then; with those of the full size it makes no
    difference.
    """
    return frames.contiguous(memory_format=torch.channels_last) if frames.device.type == "cpu" else frames
