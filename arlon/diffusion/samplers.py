"""From noise to data: times as data, solvers as single steps, randomness by address.

A solver is a function (velocity_fn, x, t, t_next) -> x at t_next; `SOLVERS` holds them by name and
`register_solver` adds one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

VelocityFn = Callable[[Tensor, Tensor], Tensor]
"""(x (B, ...), t (B,)) -> d x / d t, like x."""
SolverStep = Callable[[VelocityFn, Tensor, Tensor, Tensor], Tensor]
"""(velocity_fn, x, t, t_next) -> x at t_next; t and t_next are scalar tensors."""
StepCallback = Callable[[int, int, Tensor], None]
"""(steps done, steps in all, x) -> None, after every step."""

SOLVERS: dict[str, SolverStep] = {}


def register_solver(name: str) -> Callable[[SolverStep], SolverStep]:
    """Make a step function known to `sample` under `name`.

    Raises:
        ValueError: If the name is taken.
    """
    if name in SOLVERS:
        raise ValueError(f"solver {name!r} is already registered")

    def register(step: SolverStep) -> SolverStep:
        SOLVERS[name] = step
        return step

    return register


def get_solver(name: str) -> SolverStep:
    """The step function of a solver.

    Raises:
        ValueError: If there is none of that name; the names there are, are listed.
    """
    if name not in SOLVERS:
        raise ValueError(f"unknown solver {name!r}, choose from {', '.join(map(repr, sorted(SOLVERS)))}")
    return SOLVERS[name]


@register_solver("euler")
def euler_step(velocity_fn: VelocityFn, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """x + (t_next - t) v(x, t): first order, one evaluation."""
    return x + (t_next - t) * velocity_at(velocity_fn, x, t)


def velocity_at(velocity_fn: VelocityFn, x: Tensor, t: Tensor) -> Tensor:
    """Velocity at x (B, ...) and a scalar time t, handed over as (B,), in float32.

    Raises:
        ValueError: If the velocity has not the shape of x.
    """
    velocity = velocity_fn(x, t.expand(x.shape[0]))
    if velocity.shape != x.shape:
        raise ValueError(f"velocity_fn must return the shape of x, {tuple(x.shape)}, got {tuple(velocity.shape)}")
    return velocity.float()


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
    times = torch.as_tensor(times)
    if not times.is_floating_point():
        times = times.float()
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"times must be (N + 1,) with at least one step, got shape {tuple(times.shape)}")
    falling = bool((times[1:] <= times[:-1]).all())
    if not (falling and float(times[-1]) >= 0 and float(times[0]) <= 1):
        raise ValueError(f"times must fall from at most 1 to at least 0, got {times.tolist()}")
    return times


@torch.no_grad()
def sample(
    velocity_fn: VelocityFn,
    noise: Tensor,
    times: Tensor | Sequence[float],
    solver: str = "euler",
    callback: StepCallback | None = None,
) -> Tensor:
    """Integrate d x / d t = velocity along `times`.

    Args:
        velocity_fn: (x (B, ...), t (B,)) -> velocity like x. x is float32.
        noise: State at times[0], (B, ...).
        times: Falling flow times, (N + 1,), usually from 1 to 0; see `make_times`. A step between equal times does
            nothing and asks for no velocity.
        solver: Name of a registered solver.
        callback: Called as (steps done, N, x) after every step.

    Returns:
        State at times[-1], (B, ...), float32.

    Raises:
        ValueError: If the solver is unknown or the times rise.
    """
    step = get_solver(solver)
    times = check_times(times).to(noise.device, torch.float32)
    moves = times.diff().tolist()
    x = noise.float()
    for done, (t, t_next) in enumerate(pairwise(times), start=1):
        if moves[done - 1]:
            x = step(velocity_fn, x, t, t_next)
        if callback is not None:
            callback(done, len(times) - 1, x)
    return x


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
