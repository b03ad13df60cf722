"""Solvers against trajectories of an independent implementation, their orders, and the policies that end a schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from arlon.diffusion import samplers
from arlon.diffusion.solvers import SOLVERS, Solver, velocity_at
from arlon.diffusion.steps import EveryStep, StepPolicy

GOLDEN = load_file(Path(__file__).parents[2] / "data" / "solver_trajectories.safetensors")
THEIR_NAMES = {"rk3": "kutta3"}
ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "ab2": 2, "fireflow": 2, "rk3": 3, "rk4": 4}


def field(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Exact velocity of a Gaussian, or of a mixture of eight, whose flow is d x / d t = v(x, t)."""
    if name == "gauss":
        means, stds = GOLDEN["gauss.param.mean"][None], GOLDEN["gauss.param.std"][None]
        log_weights = torch.zeros(1, dtype=torch.float64)
    else:
        means, stds = GOLDEN["gmm.param.means"], GOLDEN["gmm.param.stds"][:, None].expand(-1, 64)
        log_weights = GOLDEN["gmm.param.weights"].log()

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        flat, t = x.flatten(1)[:, None].double(), t.double()[:, None, None]  # (B, 1, D), (B, 1, 1)
        variance = (1 - t) ** 2 * stds**2 + t**2
        away = flat - (1 - t) * means
        share = (log_weights - (away**2 / variance + variance.log()).sum(-1) / 2).softmax(-1)
        of_component = (t - (1 - t) * stds**2) / variance * away - means
        return (share[..., None] * of_component).sum(1).view_as(x).to(x.dtype)

    return velocity


@pytest.mark.parametrize("solver", sorted(ORDERS))
@pytest.mark.parametrize("case", ["gauss.opensora_240p51f", "gmm.opensora_240p51f", "gmm.uniform"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_both_directions_follow_the_trajectories_of_another_implementation(
    solver: str, case: str, dtype: torch.dtype, tolerance: float
) -> None:
    name, grid = case.split(".")
    times, velocity = GOLDEN[f"grid.{grid}.10"], field(name)
    theirs = f"{case}.{THEIR_NAMES.get(solver, solver)}.10"
    noise = samplers.invert(velocity, GOLDEN[f"{name}.x0"].to(dtype), times, solver)
    back = samplers.sample(velocity, GOLDEN[f"{theirs}.z_inv"].to(dtype), times, solver)
    assert noise.dtype == back.dtype == dtype
    for got, expected in ((noise, GOLDEN[f"{theirs}.z_inv"]), (back, GOLDEN[f"{theirs}.x_rec"])):
        assert (got.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(("solver", "order"), sorted(ORDERS.items()))
@pytest.mark.parametrize("rises", [False, True])
def test_errors_fall_with_the_order_of_the_solver(solver: str, order: int, rises: bool) -> None:
    """The end of fine Runge-Kutta steps stands for the exact one."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(2 * x + 3 * t[:, None]) + 0.3 * x

    def end(num_steps: int, name: str) -> Tensor:
        run = samplers.invert if rises else samplers.sample
        return run(velocity, torch.full((1, 1), 0.7, dtype=torch.float64), times(num_steps), name)

    def times(num_steps: int) -> Tensor:
        return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)

    exact = end(2000, "rk4")

    def error(num_steps: int) -> float:
        return float((end(num_steps, solver) - exact).abs())

    measured = math.log2(error(40) / error(80))
    assert measured > order - 0.15
    assert measured < order + 0.8


@pytest.mark.parametrize("solver", sorted(ORDERS))
@pytest.mark.parametrize("num_steps", [1, 7])
def test_evaluations_are_counted_exactly(solver: str, num_steps: int) -> None:
    calls = []
    samplers.sample(lambda x, t: calls.append(t) or -x, torch.ones(1, 2), samplers.make_times(num_steps), solver)
    assert len(calls) == SOLVERS[solver].evaluations(num_steps)


def test_a_solver_that_keeps_state_serves_one_integration_after_another() -> None:
    solver, x, times = SOLVERS["ab2"](), torch.ones(1, 2), samplers.make_times(5)
    first = samplers.sample(lambda x, t: x * t[:, None], x, times, solver)
    assert torch.equal(samplers.sample(lambda x, t: x * t[:, None], x, times, solver), first)


def test_state_is_forgotten_when_the_state_changes_between_steps() -> None:
    resets = []

    class Watched(Solver):
        def step(self, velocity_fn, x, t, t_next, velocity):
            return x + (t_next - t) * velocity

        def reset(self) -> None:
            resets.append(len(resets))

    def jump(index: int, t: Tensor, x: Tensor) -> Tensor:
        return x + 1 if index == 2 else x

    end = samplers.integrate(
        lambda x, t: torch.zeros_like(x),
        torch.zeros(1, 1),
        [1.0, 0.75, 0.5, 0.25, 0.0],
        solver=Watched(),
        before_step=jump,
    )
    assert float(end) == 1
    assert len(resets) == 2  # at the beginning, and behind the jump


class LeapAt(StepPolicy):
    """Sample b leaps at step `steps[b]`."""

    def __init__(self, *steps: int) -> None:
        self.steps = torch.tensor(steps)

    def leaps(self, index: int, velocity: Tensor) -> Tensor:
        return self.steps == index


def test_a_leap_covers_the_rest_along_one_velocity_sample_by_sample() -> None:
    calls = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        calls.append(float(t[0]))
        return x * t[:, None]

    times, x = samplers.make_times(5), torch.tensor([[1.0], [2.0]])
    end = samplers.sample(velocity, x, times, policy=LeapAt(1, 3))
    assert len(calls) == 4
    by_hand = x - 0.2 * x
    first = by_hand[0] - 0.8 * by_hand[0] * 0.8
    second = by_hand[1] - 0.2 * by_hand[1] * 0.8
    second = second - 0.2 * second * times[2]
    second = second - times[3] * second * times[3]
    torch.testing.assert_close(end, torch.stack((first, second)))


@pytest.mark.parametrize("solver", ["euler", "midpoint"])
def test_a_leap_at_the_last_euler_step_and_no_leap_at_all_change_no_bit(solver: str) -> None:
    x, times = torch.randn(2, 3), samplers.make_times(4)
    plain = samplers.sample(lambda x, t: x * t[:, None], x, times, solver)
    assert torch.equal(samplers.sample(lambda x, t: x * t[:, None], x, times, solver, policy=EveryStep()), plain)
    leapt = samplers.sample(lambda x, t: x * t[:, None], x, times, solver, policy=LeapAt(3, 3))
    assert torch.equal(leapt, plain) == (solver == "euler")


def test_schedules_that_turn_back_are_refused() -> None:
    with pytest.raises(ValueError, match="times must fall"):
        samplers.integrate(lambda x, t: x, torch.zeros(1, 1), [0.0, 0.5, 0.25])
    with pytest.raises(ValueError, match="times must fall"):
        samplers.invert(lambda x, t: x, torch.zeros(1, 1), [0.0, 0.5, 1.0])


def test_velocities_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape of x, \(1, 2\), got \(1, 1\)"):
        velocity_at(lambda x, t: x[:, :1], torch.zeros(1, 2), torch.tensor(1.0))
