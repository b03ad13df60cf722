"""The flow-matching step that the `dit` and `inject` stages share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from arlon.data.windows import Sample
from arlon.diffusion import conditioning, flow, guidance, samplers
from arlon.grids import num_pixel_frames
from arlon.models.stdit import Inject, STDiT3
from stages.config import FlowConfig


@dataclass(frozen=True)
class FrameSize:
    """Size of the frames behind the latents, in pixels."""

    height: int
    width: int


def shift_for(config: FlowConfig, size: FrameSize, latent_frames: int) -> Callable[[Tensor], Tensor]:
    """The resolution-aware shift of flow times for clips of one size."""
    return partial(
        flow.shift_times,
        height=float(size.height),
        width=float(size.width),
        num_frames=float(num_pixel_frames(latent_frames)),
        base_size=config.base_size,
        scale=config.shift_scale,
    )


def draw_times(config: FlowConfig, count: int, generator: torch.Generator) -> Tensor:
    """Flow times (count,) of a training step, before the shift."""
    if config.times == "uniform":
        return flow.uniform_times(count, generator)
    return flow.logit_normal_times(count, loc=config.time_loc, scale=config.time_scale, generator=generator)


def even_times(count: int) -> Tensor:
    """Times (count,) in the middles of `count` equal parts of [0, 1], for a validation loss."""
    return (torch.arange(count) + 0.5) / count


def flow_losses(
    model: STDiT3,
    batch: Sample,
    t: Tensor,
    *,
    size: FrameSize,
    generator: torch.Generator,
    inject: Inject | None = None,
) -> Tensor:
    """Flow-matching loss of each sample at times t: |v(noisy, t) - (noise - clean)|^2 over its noisy frames.

    Args:
        model: The DiT.
        batch: latent (B, C, T, H, W), text (B, L, E), text_mask (B, L), frame_mask (B, T), fps (B,).
        t: Shifted flow times, (B,).
        size: Frame size in pixels.
        generator: CPU generator of the noise and of what the model drops.
        inject: Semantic injection, if any.

    Returns:
        (B,), float32.
    """
    clean = batch["latent"]
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    t = t.to(clean.device)
    velocity = model(
        flow.add_noise(clean, noise, t, batch["frame_mask"]),
        t,
        batch["text"],
        batch["text_mask"],
        batch["frame_mask"],
        fps=batch["fps"],
        height=float(size.height),
        width=float(size.width),
        inject=inject,
        generator=generator,
    )
    return flow.flow_loss(velocity, flow.velocity_target(clean, noise), batch["frame_mask"])


def sample_latents(
    model: STDiT3,
    batch: Sample,
    config: FlowConfig,
    *,
    size: FrameSize,
    seed: int,
    inject: Inject | None = None,
) -> Tensor:
    """Sample the clips of a batch from their captions; frames outside the frame mask are given clean.

    Returns:
        (B, C, T, H, W), float32.
    """
    clean, mask = batch["latent"], batch["frame_mask"]
    velocity = guidance.guide(
        model,
        batch["text"],
        model.null_text(batch["text"].shape[1]),
        guidance_scale=config.guidance_scale,
        text_mask=batch["text_mask"],
        frame_mask=mask,
        fps=batch["fps"],
        height=float(size.height),
        width=float(size.width),
        inject=inject,
    )
    noise = samplers.draw_noise(clean.shape, seed, "sample picture").to(clean)
    times = samplers.make_times(config.sampling_steps, shift_for(config, size, clean.shape[2]))
    start = conditioning.place_clean(noise, clean, mask)
    return samplers.sample(conditioning.hold_clean(velocity, mask), start, times)
