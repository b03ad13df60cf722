"""Open-Sora v1.2's loop over segments, written out on latents: the truth that films with references are held against.

Source: Open-Sora v1.2 (`loop`, `condition_frame_length`, `condition_frame_edit`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from arlon.diffusion.conditioning import MaskedVelocityFn, sample_with_edits
from arlon.diffusion.flow import LATENTS_PER_CHUNK
from arlon.diffusion.references import Placement, place_references
from arlon.diffusion.samplers import StepCallback

DrawFn = Callable[[int, int], Tensor]
"""(segment k, draw j) -> noise (B, C, T, H, W); draw 0 starts the segment, draw i + 1 is for step i."""


def carry_over(
    latent: Tensor,
    placements: Sequence[Placement],
    references: Sequence[Tensor],
    *,
    segment: int,
    overlap: int,
    edit_ratio: float = 0.0,
) -> tuple[tuple[Placement, ...], tuple[Tensor, ...]]:
    """Let a segment start with the last latent frames of the one before.

    What is given is not changed, so the next film begins with its own references alone; the original appends to the
    caller's lists, and a second sample starts with the clips of the first.

    Args:
        latent: Of the segment before, or at least its end, (C, T, H, W).
        placements: Groups so far.
        references: References so far, each (C, T_ref, H, W).
        segment: Index of the segment that is to start with it.
        overlap: Latent frames carried over (`condition_frame_length` of the original).
        edit_ratio: How much the carried frames may change (`condition_frame_edit`).

    Returns:
        Placements and references, one longer each.
    """
    carried = Placement(
        segment=segment,
        reference=len(references),
        reference_start=-overlap,
        length=overlap,
        edit_ratio=edit_ratio,
    )
    return (*placements, carried), (*references, latent)


def sample_take(
    velocity_for: Callable[[int], MaskedVelocityFn],
    draw: DrawFn,
    times: Tensor,
    *,
    num_segments: int,
    overlap: int = LATENTS_PER_CHUNK,
    edit_ratio: float = 0.0,
    references: Sequence[Sequence[Tensor]] | None = None,
    placements: Sequence[Sequence[Placement]] | None = None,
    align: int | None = LATENTS_PER_CHUNK,
    reencode: Callable[[Tensor], Tensor] | None = None,
    solver: str = "euler",
    callback: StepCallback | None = None,
) -> Iterator[Tensor]:
    """Sample a take of any length.

    Segment k > 0 starts with the last `overlap` latent frames of segment k - 1, after its own references. Nothing
    but these is kept from one segment to the next.

    Args:
        velocity_for: Gives segment k its velocity (x, t (B,), frame_mask (B, T)) -> like x, with the prompt of k.
        draw: Noise by address, such as `lambda k, j: samplers.draw_noise(shape, seed, "dit", k, j)`.
        times: Falling flow times, (N + 1,).
        num_segments: At least 1.
        overlap: Latent frames carried over, whole VAE chunks of 5.
        edit_ratio: How much carried frames may change inside the next segment, from 0 to 1. They are not yielded
            again either way.
        references: For every sample its references, each (C, T_ref, H, W).
        placements: For every sample where they go, see `references.parse_mask_strategy`.
        align: See `references.place_references`.
        reencode: Maps latent frames (B, C, overlap, H, W) to those of the decoded video, as the original does with
            every clip. None carries them over as they are, without the loss of the VAE.
        solver: Name of a registered solver.
        callback: Called as (steps done, N, x) after every step.

    Yields:
        New latent frames of each segment, float32: (B, C, T, H, W) of the first, T - overlap of the others.

    Raises:
        ValueError: If a number is out of range, or the references do not fit.
    """
    if num_segments < 1:
        raise ValueError(f"num_segments must be at least 1, got {num_segments}")
    if overlap < 1 or overlap % LATENTS_PER_CHUNK:
        raise ValueError(f"overlap counts latent frames of whole chunks: expected 5, 10, 15 ..., got {overlap}")
    carried: Tensor | None = None
    for k in range(num_segments):
        noise = draw(k, 0)
        if num_segments > 1 and overlap >= noise.shape[2]:
            raise ValueError(f"overlap ({overlap}) must be less than the {noise.shape[2]} latent frames of a segment")
        groups = placements or [()] * len(noise)
        sources = references or [()] * len(noise)
        if carried is not None:
            given = [
                carry_over(*sample, segment=k, overlap=overlap, edit_ratio=edit_ratio)
                for sample in zip(carried, groups, sources, strict=True)
            ]
            groups, sources = zip(*given, strict=True)
        start, ratio = place_references(noise, sources, groups, segment=k, align=align)
        latent = sample_with_edits(
            velocity_for(k), start, ratio, times, lambda i, k=k: draw(k, i + 1), solver=solver, callback=callback
        )
        yield latent if carried is None else latent[:, :, overlap:]
        carried = latent[:, :, -overlap:]
        if reencode is not None and k + 1 < num_segments:
            with torch.no_grad():
                carried = reencode(carried)
