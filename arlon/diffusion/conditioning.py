"""Clean frames as a condition: frame masks for training, and sampling around frames that are given.

Frame masks are bool (B, T) on latent frames: True = noisy, to be made; False = clean, given.

Source: Open-Sora v1.2 (`MaskGenerator`, and the masked loop of its rectified-flow sampler).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from arlon.diffusion import flow
from arlon.diffusion.samplers import StepCallback, check_times, integrate
from arlon.diffusion.solvers import Solver
from arlon.diffusion.steps import StepPolicy
from arlon.errors import did_you_mean
from arlon.protocols import VelocityFn

MASK_MODES = (
    "identity",
    "random",
    "intepolate",
    "quarter_random",
    "quarter_head",
    "quarter_tail",
    "quarter_head_tail",
    "image_random",
    "image_head",
    "image_tail",
    "image_head_tail",
)
"""Names of the modes, spelt as in the released training configs."""
CLEAN_SHARE = (0.1, 0.9)
"""Range of the share of clean frames in mode "random"."""

MaskedVelocityFn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x (B, C, T, H, W), t (B,), frame_mask (B, T)) -> velocity, like x."""


def make_frame_mask(mode: str, num_frames: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw the frame mask of one training sample.

    `identity` gives no frame. `quarter_*` give 1 to T // 4 frames (at least 1), `image_*` one frame: at the
    `head`, the `tail`, both, or a `random` place. `random` gives every frame with a probability that is
    itself drawn from `CLEAN_SHARE`; `intepolate` gives every second frame. A single frame is never given, and
    where a draw leaves nothing to make, the last frame is made.

    Args:
        mode: One of `MASK_MODES`.
        num_frames: Latent frames T, at least 1.
        generator: CPU generator; the global one if None.

    Returns:
        (T,), bool, True = noisy.

    Raises:
        ValueError: If the mode is unknown or there is no frame.
    """
    _check_modes([mode])
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    noisy = torch.ones(num_frames, dtype=torch.bool)
    if num_frames == 1 or mode == "identity":
        return noisy
    if mode == "random":
        low, high = CLEAN_SHARE
        share = low + (high - low) * torch.rand((), generator=generator)
        noisy = torch.rand(num_frames, generator=generator) >= share
    elif mode == "intepolate":
        # Every second frame, from the first or from the second one on.
        noisy[_randint(0, 1, generator) :: 2] = False
    else:
        extent, place = mode.split("_", 1)
        count = 1 if extent == "image" else _randint(1, max(1, num_frames // 4), generator)
        if place == "random":
            start = _randint(0, num_frames - count, generator)
            noisy[start : start + count] = False
        if place in ("head", "head_tail"):
            noisy[:count] = False
        if place in ("tail", "head_tail"):
            noisy[-count:] = False
    # A sample without a noisy frame would have no loss.
    if not noisy.any():
        noisy[-1] = True
    return noisy


def sample_frame_masks(
    batch: int, num_frames: int, ratios: Mapping[str, float], generator: torch.Generator | None = None
) -> Tensor:
    """Draw one frame mask a sample, its mode with the probabilities `ratios`.

    Args:
        batch: Samples B.
        num_frames: Latent frames T.
        ratios: Mode -> probability. What is missing to 1 goes to "identity".
        generator: CPU generator; the global one if None.

    Returns:
        (B, T), bool, True = noisy.

    Raises:
        ValueError: If a mode is unknown, or the probabilities are negative or sum to more than 1.
    """
    _check_modes(ratios)
    # Rounding may leave a tiny negative rest, which is none.
    rest = 1 - sum(ratios.values())
    if min(ratios.values(), default=0.0) < 0 or rest < -1e-6:
        raise ValueError(f"mask ratios must not be negative nor sum to more than 1, got {dict(ratios)}")
    modes = [*ratios, "identity"]
    weights = torch.tensor([*ratios.values(), max(rest, 0.0)], dtype=torch.float64)
    drawn = torch.multinomial(weights, batch, replacement=True, generator=generator)
    return torch.stack([make_frame_mask(modes[i], num_frames, generator) for i in drawn.tolist()])


def _randint(low: int, high: int, generator: torch.Generator | None) -> int:
    """A whole number from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def _check_modes(modes: Mapping[str, float] | list[str]) -> None:
    for mode in modes:
        if mode not in MASK_MODES:
            raise ValueError(f"unknown mask mode {mode!r}, {did_you_mean(mode, MASK_MODES)}")


def place_clean(noise: Tensor, clean: Tensor, frame_mask: Tensor) -> Tensor:
    """State at t = 1: noise on noisy frames, clean on given ones; (B, C, T, H, W) each, frame_mask (B, T)."""
    return torch.where(flow.over_frames(frame_mask), noise, clean.to(noise))


def hold_clean(velocity_fn: VelocityFn, frame_mask: Tensor) -> VelocityFn:
    """Stop the given frames: velocity 0 where frame_mask (B, T) is False, so that any solver keeps them.

    The model learns of the mask by itself: bind the same `frame_mask` among its conditions.
    """
    mask = flow.over_frames(frame_mask)

    def held(x: Tensor, t: Tensor) -> Tensor:
        velocity = velocity_fn(x, t)
        return torch.where(mask, velocity, torch.zeros_like(velocity))

    return held


@torch.no_grad()
def sample_with_edits(
    velocity_fn: MaskedVelocityFn,
    latent: Tensor,
    edit_ratio: Tensor,
    times: Tensor | Sequence[float],
    draw: Callable[[int], Tensor],
    *,
    solver: str | Solver = "euler",
    policy: StepPolicy | None = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """Sample while given frames join late: a frame of edit ratio m stands still until t falls to m.

    At the first step with t <= m, a frame with m < 1 is noised to that t from where it stands, and is made
    from there on: 0 keeps it, 1 makes it from noise, 0.3 changes its details. The model sees a frame that
    stands still as clean.

    Args:
        velocity_fn: (x, t (B,), frame_mask (B, T)) -> velocity, like x.
        latent: State at times[0], (B, C, T, H, W): noise where the ratio is 1, the given latents elsewhere.
        edit_ratio: m, (B, T), in [0, 1].
        times: Falling flow times, (N + 1,).
        draw: Noise for the frames that join at step i = 0..N-1, like `latent`.
        solver: Name of a registered solver, or a solver object.
        policy: Decides from where the rest is covered at once; None: every step is made.
        callback: Called as (steps done, N, x) after every step.

    Returns:
        (B, C, T, H, W), float32.

    Raises:
        ValueError: If a ratio is out of range, the solver is unknown or the times rise.
    """
    if edit_ratio.shape != (latent.shape[0], latent.shape[2]) or not bool(
        ((edit_ratio >= 0) & (edit_ratio <= 1)).all()
    ):
        raise ValueError(
            f"edit_ratio must be (B, T) = {(latent.shape[0], latent.shape[2])} in [0, 1], "
            f"got shape {tuple(edit_ratio.shape)} with values {edit_ratio.tolist()}"
        )
    is_made = edit_ratio == 1
    """Frames that are being made, (B, T); the others stand still."""

    def join(index: int, t: Tensor, x: Tensor) -> Tensor:
        nonlocal is_made
        # m >= t: the frame is due at this step. Frames that joined earlier must not be noised again.
        joining = (edit_ratio >= t) & ~is_made
        is_made = edit_ratio >= t
        if not bool(joining.any()):
            return x
        noisy = flow.add_noise(x, draw(index).to(x), t.expand(x.shape[0]))
        return torch.where(flow.over_frames(joining), noisy, x)

    def held(x: Tensor, t: Tensor) -> Tensor:
        # Velocity 0 keeps a frame under any solver, and through a leap as well.
        velocity = velocity_fn(x, t, is_made)
        return torch.where(flow.over_frames(is_made), velocity, torch.zeros_like(velocity))

    times = check_times(times)
    return integrate(held, latent, times, solver=solver, policy=policy, before_step=join, callback=callback)
