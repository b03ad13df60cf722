"""The noise convention of this project, and rectified flow on it.

    noisy    = (1 - t) clean + t noise           t = 0 is data, t = 1 is noise
    velocity = d noisy / d t = noise - clean

Source: Open-Sora v1.2 (rectified flow, resolution-aware times); arXiv:2403.03206, 3.1 (logit-normal times).
"""

from __future__ import annotations

import torch
from torch import Tensor

from arlon.grids import CHUNK_FRAMES, TIME_STRIDE, ceil_div

BASE_SIZE = 512
"""Side in pixels of the square image for which the time shift is the identity."""
LATENTS_PER_CHUNK = ceil_div(CHUNK_FRAMES, TIME_STRIDE)


def expand_time(t: Tensor, like: Tensor) -> Tensor:
    """Give t (B,) the trailing axes of `like` (B, ...), so that it broadcasts per sample."""
    if t.shape != like.shape[:1]:
        raise ValueError(f"expected one flow time a sample, ({like.shape[0]},), got {tuple(t.shape)}")
    return t.reshape(-1, *[1] * (like.ndim - 1))


def add_noise(clean: Tensor, noise: Tensor, t: Tensor, frame_mask: Tensor | None = None) -> Tensor:
    """noisy = (1 - t) clean + t noise.

    Args:
        clean: Data, (B, ...); (B, C, T, H, W) with a frame mask.
        noise: Standard normal, like `clean`.
        t: Flow time, (B,), in [0, 1].
        frame_mask: True = noisy frame, (B, T); the other frames stay clean. All are noisy if None.

    Returns:
        Like `clean`.
    """
    t = expand_time(t, clean)
    noisy = (1 - t) * clean + t * noise
    return noisy if frame_mask is None else torch.where(over_frames(frame_mask), noisy, clean)


def velocity_target(clean: Tensor, noise: Tensor) -> Tensor:
    """velocity = noise - clean, what the network learns to predict at every t."""
    return noise - clean


def over_frames(frame_mask: Tensor) -> Tensor:
    """Give a mask (B, T) the axes of a latent: (B, 1, T, 1, 1)."""
    return frame_mask[:, None, :, None, None]


def flow_loss(velocity: Tensor, target: Tensor, frame_mask: Tensor | None = None) -> Tensor:
    """Squared error of the velocity, averaged over each sample; over its noisy frames where there is a mask.

    Args:
        velocity: Prediction, (B, C, T, H, W).
        target: `velocity_target`, of the same shape.
        frame_mask: True = noisy frame, (B, T). A sample without one has loss 0.

    Returns:
        (B,), float32.

    Raises:
        ValueError: If the shapes differ.
    """
    if velocity.shape != target.shape:
        raise ValueError(f"velocity {tuple(velocity.shape)} and target {tuple(target.shape)} must have one shape")
    error = (velocity.float() - target.float()).square()
    if frame_mask is None:
        return error.flatten(1).mean(dim=1)
    per_frame = error.mean(dim=(1, 3, 4))  # (B, T)
    return (per_frame * frame_mask).sum(dim=1) / frame_mask.sum(dim=1).clamp(min=1)


def shift_latent_frames(num_frames: Tensor) -> Tensor:
    """Latent frames that a video counts for in the time shift.

    1 frame counts 1; 17 or more count 5 for each full chunk of 17, remainders ignored; as in Open-Sora v1.2.
    2 to 16 frames count as many as their latent has, ceil(frames / 4). There the original counts 0, which
    turns every time into 0 or NaN.

    Args:
        num_frames: Video frames, any shape, whole numbers of at least 1.

    Returns:
        Like `num_frames`, float32.
    """
    frames = num_frames.float()
    whole_chunks = torch.floor(frames / CHUNK_FRAMES) * LATENTS_PER_CHUNK
    return torch.where(frames < CHUNK_FRAMES, torch.ceil(frames / TIME_STRIDE), whole_chunks)


def shift_times(
    t: Tensor | float,
    *,
    height: Tensor | float,
    width: Tensor | float,
    num_frames: Tensor | float,
    base_size: int = BASE_SIZE,
    scale: float = 1.0,
) -> Tensor:
    """Move times towards noise for large or long videos: t' = r t / (1 + (r - 1) t).

    r = scale sqrt(height width / base_size^2) sqrt(n), n of `shift_latent_frames`; r < 1 moves towards data.
    0 and 1 stay exactly where they are. Source: Open-Sora v1.2, `timestep_transform`.

    Args:
        t: Flow times in [0, 1], a number or a tensor of any shape that broadcasts with the sizes.
        height: Height of the video in pixels, a number or (B,).
        width: Width of the video in pixels, a number or (B,).
        num_frames: Frames of the video, a number or (B,).
        base_size: Side in pixels at which the spatial part of r is 1.
        scale: Further factor of r.

    Returns:
        Shifted times in [0, 1], a tensor, at least float32.

    Raises:
        ValueError: If a size given as a number is not positive, or shapes do not fit each other.
    """
    sizes = {
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "base_size": base_size,
        "scale": scale,
    }
    for name, value in sizes.items():
        if not isinstance(value, Tensor) and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    t = torch.as_tensor(t)
    if not t.is_floating_point() or t.element_size() < 4:
        t = t.float()
    height, width, num_frames = (
        torch.as_tensor(value, device=t.device, dtype=torch.float32) for value in (height, width, num_frames)
    )
    _check_broadcast(t, {"height": height, "width": width, "num_frames": num_frames})
    ratio = (height * width / base_size**2).sqrt() * shift_latent_frames(num_frames).sqrt() * scale
    moved = ratio * t
    return moved / (moved + (1 - t))


def _check_broadcast(t: Tensor, sizes: dict[str, Tensor]) -> None:
    try:
        torch.broadcast_shapes(t.shape, *(value.shape for value in sizes.values()))
    except RuntimeError:
        got = ", ".join(f"{name} {tuple(value.shape)}" for name, value in sizes.items())
        raise ValueError(
            f"times t {tuple(t.shape)} and sizes of samples do not broadcast: got {got}. For a schedule (N,) of "
            "samples of different sizes (B,), give the sizes as (B, 1)."
        ) from None


def uniform_times(count: int, generator: torch.Generator | None = None) -> Tensor:
    """Times (count,) uniform in [0, 1), float32, where the generator lives (CPU if None)."""
    return torch.rand(count, generator=generator, device=None if generator is None else generator.device)


def logit_normal_times(
    count: int, *, loc: float = 0.0, scale: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Times (count,) = sigmoid(loc + scale N(0, 1)), float32, where the generator lives (CPU if None)."""
    device = None if generator is None else generator.device
    return torch.sigmoid(loc + scale * torch.randn(count, generator=generator, device=device))
