"""Samplers for rectified flow: the schedule, the loop over its steps, and reproducible noise.

`sample` runs a schedule down from noise to data, `invert` the same schedule up from data to noise. A `Solver`
(`arlon.diffusion.solvers`) says how a step is made, a `StepPolicy` (`arlon.diffusion.steps`) which steps are made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from arlon.diffusion.solvers import SOLVERS, Solver
from arlon.diffusion.steps import StepPolicy
from arlon.protocols import VelocityFn

StepCallback = Callable[[int, int, Tensor], None]
"""(steps done, steps in all, x) -> None, after every step."""


class BeforeStep(Protocol):
    """Changes the state between two steps, for example where frames join that stood still."""

    def __call__(self, index: int, t: Tensor, x: Tensor) -> Tensor:
        """State to make step `index` from: x itself, or another tensor."""
        ...


def make_times(num_steps: int, shift: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Times 1, 1 - 1 / N, ..., 0 of N steps, moved by `shift` where given.

    Args:
        num_steps: Steps N, at least 1.
        shift: Maps times (N + 1,) in [0, 1] to such times and keeps their order, for example
            `functools.partial(flow.shift_times, height=..., width=..., num_frames=...)`.

    Returns:
        (N + 1,), float32, falling, or equal where `shift` makes them so.

    Raises:
        ValueError: If there is no step, or the shifted times rise or leave [0, 1].
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    times = 1 - torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    if shift is not None:
        times = shift(times)
    return check_times(times.float())


def check_times(times: Tensor | Sequence[float]) -> Tensor:
    """Return times (N + 1,), a tensor, a list or an array, as a floating-point tensor, otherwise unchanged.

    Equal neighbours are a step of length zero: a discrete schedule has them where it rounds.

    Raises:
        ValueError: If they are not at least two numbers in [0, 1] that never rise.
    """
    times = check_schedule(times)
    if float(times[0]) < float(times[-1]):
        raise ValueError(f"times must fall from at most 1 to at least 0, got {times.tolist()}")
    return times


def check_schedule(times: Tensor | Sequence[float]) -> Tensor:
    """Return times (N + 1,) that fall or rise as a floating-point tensor, otherwise unchanged.

    Raises:
        ValueError: If they are not at least two numbers in [0, 1], or change direction.
    """
    times = torch.as_tensor(times)
    if not times.is_floating_point():
        times = times.float()
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"times must be (N + 1,) with at least one step, got shape {tuple(times.shape)}")
    lengths = times.diff()
    one_way = bool((lengths <= 0).all()) or bool((lengths >= 0).all())  # not so if any time is NaN
    if not (one_way and float(times.min()) >= 0 and float(times.max()) <= 1):
        raise ValueError(f"times must fall from at most 1 to at least 0, got {times.tolist()}")
    return times


@torch.no_grad()
def integrate(
    velocity_fn: VelocityFn,
    x: Tensor,
    times: Tensor | Sequence[float],
    *,
    solver: str | Solver = "euler",
    policy: StepPolicy | None = None,
    before_step: BeforeStep | None = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """Integrate d x / d t = velocity along a schedule that falls or rises.

    Args:
        velocity_fn: (x (B, ...), t (B,)) -> velocity like x. x is float32, or float64 if the given state is.
        x: State at times[0], (B, ...).
        times: Flow times, (N + 1,), never changing direction. A step between equal times does nothing and asks for no
            velocity.
        solver: Name of a registered solver, or a solver object.
        policy: Decides from where the rest is covered at once; None: every step is made.
        before_step: Called before every step, those of length zero included; its result is the state to go on from.
        callback: Called as (steps done, N, x) after every step.

    Returns:
        State at times[-1], (B, ...).

    Raises:
        ValueError: If the solver is unknown, or the times change direction or leave [0, 1].
    """
    solver = SOLVERS[solver]() if isinstance(solver, str) else solver
    solver.reset()
    x = x if x.dtype == torch.float64 else x.float()
    times = check_schedule(times).to(x.device, x.dtype)
    num_steps, lengths = len(times) - 1, times.diff().tolist()
    # Samples that a policy has sent to the end; they stay as they are while the others go on step by step.
    has_leapt = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
    if policy is not None:
        policy.begin(times, x.shape[0])
    for index, (t, t_next) in enumerate(pairwise(times)):
        if before_step is not None and (changed := before_step(index, t, x)) is not x:
            solver.reset()  # earlier velocities belong to another state
            x = changed
        if lengths[index]:  # a discrete schedule has steps of length zero if it rounds; they cost no evaluation
            velocity = solver.start_velocity(velocity_fn, x, t)
            if policy is None:
                x = solver.step(velocity_fn, x, t, t_next, velocity)
            else:
                leaping = policy.leaps(index, velocity) & ~has_leapt
                x = torch.where(_over(leaping, x), x + (times[-1] - t) * velocity, x)
                has_leapt |= leaping
                if not bool(has_leapt.all()):
                    x = torch.where(_over(has_leapt, x), x, solver.step(velocity_fn, x, t, t_next, velocity))
        if callback is not None:
            callback(index + 1, num_steps, x)
        if policy is not None and bool(has_leapt.all()):
            break
    return x


def _over(samples: Tensor, x: Tensor) -> Tensor:
    """Flags (B,) with the axes of x (B, ...)."""
    return samples.view(-1, *[1] * (x.ndim - 1))


def sample(
    velocity_fn: VelocityFn,
    noise: Tensor,
    times: Tensor | Sequence[float],
    solver: str | Solver = "euler",
    callback: StepCallback | None = None,
    *,
    policy: StepPolicy | None = None,
) -> Tensor:
    """Integrate from noise to data.

    Args:
        velocity_fn: (x (B, ...), t (B,)) -> velocity like x. x is float32, or float64 if the noise is.
        noise: State at times[0], (B, ...).
        times: Falling flow times, (N + 1,), usually from 1 to 0; see `make_times`. A step between equal times does
            nothing and asks for no velocity.
        solver: Name of a registered solver, or a solver object.
        callback: Called as (steps done, N, x) after every step.
        policy: Decides from where the rest is covered at once; None: every step is made.

    Returns:
        State at times[-1], (B, ...), float32, or float64 if the noise is.

    Raises:
        ValueError: If the solver is unknown or the times rise.
    """
    return integrate(velocity_fn, noise, check_times(times), solver=solver, policy=policy, callback=callback)


def invert(
    velocity_fn: VelocityFn,
    clean: Tensor,
    times: Tensor | Sequence[float],
    solver: str | Solver = "euler",
    callback: StepCallback | None = None,
) -> Tensor:
    """Integrate from data to noise, along the schedule of `sample` run backwards.

    Args:
        velocity_fn: As of `sample`; usually without guidance (RF-Solver, arXiv:2411.04746).
        clean: State at times[-1], (B, ...).
        times: The same falling flow times as for `sample`, (N + 1,).
        solver: Name of a registered solver, or a solver object.
        callback: Called as (steps done, N, x) after every step.

    Returns:
        State at times[0], (B, ...), float32, or float64 if `clean` is.

    Raises:
        ValueError: If the solver is unknown or the times rise.
    """
    return integrate(velocity_fn, clean, check_times(times).flip(0), solver=solver, callback=callback)


def address_seed(seed: int, *address: int | str) -> int:
    """Seed of an address: the first 63 bits of the SHA-256 of seed and address, written as a JSON list.

    Raises:
        TypeError: If a part is neither an int nor a str, since its spelling might change between versions.
    """
    parts = (seed, *address)
    for part in parts:
        if type(part) not in (int, str):
            raise TypeError(f"an address holds int and str only, got {part!r} of type {type(part).__name__}")
    digest = hashlib.sha256(json.dumps(parts, separators=(",", ":")).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def draw_noise(shape: Sequence[int], seed: int, *address: int | str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal noise that depends on seed and address alone.

    The same numbers come in every process, in any order of calls and for any device, because a CPU generator
    of its own draws them.

    Args:
        shape: Shape of the noise.
        seed: Seed of the film.
        *address: What it is for, such as "noise", segment 3, step 7.
        dtype: Of the result; numbers are drawn in float32.

    Returns:
        (*shape), on the CPU.
    """
    generator = torch.Generator("cpu").manual_seed(address_seed(seed, *address))
    return torch.randn(*shape, generator=generator, dtype=torch.float32).to(dtype)
