"""Flow-matching loss and sampling, shared by the stages `dit` and `inject`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from arlon.data.samples import Sample
from arlon.diffusion import conditioning, flow, guidance, samplers
from arlon.grids import num_pixel_frames
from arlon.models.stdit import Inject, Injection, STDiT3
from stages.config import FlowConfig

EVAL_TIMES = 10
"""Number of flow times of a validation loss on a fixed grid."""


def shift_for(config: FlowConfig, batch: Sample) -> Callable[[Tensor], Tensor]:
    """Resolution-aware shift of flow times for the clips of a batch, which all have the same size."""
    return partial(
        flow.shift_times,
        height=float(batch["height"][0]),
        width=float(batch["width"][0]),
        num_frames=float(num_pixel_frames(batch["latent"].shape[2])),
        base_size=config.base_size,
        scale=config.shift_scale,
    )


def draw_times(config: FlowConfig, generators: Sequence[torch.Generator]) -> Tensor:
    """Draw the unshifted flow times (B,) of a training step, each from the generator of its row."""
    if config.times == "uniform":
        return torch.cat([flow.uniform_times(1, generator) for generator in generators])
    loc, scale = config.time_loc, config.time_scale
    return torch.cat([flow.logit_normal_times(1, loc=loc, scale=scale, generator=g) for g in generators])


def even_times(count: int) -> Tensor:
    """Midpoints (count,) of `count` equal parts of [0, 1], the flow times of a validation loss."""
    return (torch.arange(count) + 0.5) / count


def grid_times() -> Tensor:
    """`EVAL_TIMES` times evenly spaced inside (0, 1), ends left out, as Open-Sora v1.2 evaluates its loss."""
    return torch.linspace(0, 1, EVAL_TIMES + 2)[1:-1]


def flow_losses(
    model: STDiT3,
    batch: Sample,
    t: Tensor,
    *,
    generators: Sequence[torch.Generator],
    inject: Inject | Injection | None = None,
) -> Tensor:
    """Flow-matching loss of each sample at times t: |v(noisy, t) - (noise - clean)|^2 over its noisy frames.

    Args:
        model: The DiT.
        batch: latent (B, C, T, H, W), text (B, L, E), text_mask (B, L), frame_mask (B, T), fps (B,), height and
            width (B,) in pixels.
        t: Shifted flow times, (B,).
        generators: CPU generator of each row, which draws its noise and the dropping of its caption.
        inject: Semantic injection, if any.

    Returns:
        (B,), float32.
    """
    clean = batch["latent"]
    # A generator for each row, so that a clip gets the same noise whichever process has it.
    noise = torch.stack([torch.randn(clean.shape[1:], generator=generator) for generator in generators]).to(clean)
    t = t.to(clean.device)
    velocity = model(
        flow.add_noise(clean, noise, t, batch["frame_mask"]),
        t,
        batch["text"],
        batch["text_mask"],
        batch["frame_mask"],
        fps=batch["fps"],
        height=batch["height"],
        width=batch["width"],
        inject=inject,
        generator=generators,
    )
    return flow.flow_loss(velocity, flow.velocity_target(clean, noise), batch["frame_mask"])


def sample_latents(
    model: STDiT3,
    batch: Sample,
    config: FlowConfig,
    *,
    seed: int,
    inject: Inject | Injection | None = None,
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
        height=batch["height"],
        width=batch["width"],
        inject=inject,
    )
    noise = samplers.draw_noise(clean.shape, seed, "sample picture").to(clean)
    times = samplers.make_times(config.sampling_steps, shift_for(config, batch))
    # Given frames are clean from the first step on, and the velocity there is 0.
    start = conditioning.place_clean(noise, clean, mask)
    return samplers.sample(conditioning.hold_clean(velocity, mask), start, times)
