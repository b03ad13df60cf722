"""Solvers of d x / d t = v(x, t): how one step is made from velocities.

A solver object serves one integration. It may keep state between steps, such as an earlier velocity, and works in both
directions: a step has length h = t_next - t, negative while sampling and positive while inverting. Costs are counted in
velocities asked for ("evaluations"), each one pass of the network with guidance.

    name        a step from x at t over h                                        evaluations  order
    euler       x + h v                                                          1            1
    midpoint    x + h v(x + h/2 v, t + h/2); RF-Solver as released               2            2
    heun        x + h/2 (v + v(x + h v, t + h))                                  2            2
    ab2         x + h (v + h / (2 h') (v - v')), ' = the step before             1            2
    fireflow    midpoint with the midpoint velocity of the step before as v      1, +1 once   2
    rk3         Kutta's third-order rule                                         3            3
    rk4         the classical fourth-order rule                                  4            4

Sources: RF-Solver, arXiv:2411.04746 (its second-order Taylor step, with the derivative from a probe at h/2, is the
midpoint rule); FireFlow, arXiv:2412.07517; the others are textbook rules. A solver from another package is added with
`SOLVERS.register`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from arlon.plugins import Registry
from arlon.protocols import VelocityFn


class Solver(ABC):
    """One way to make a step; an object serves one integration."""

    evaluations_per_step: int = 1
    """Velocities asked for in a step."""

    @abstractmethod
    def step(self, velocity_fn: VelocityFn, x: Tensor, t: Tensor, t_next: Tensor, velocity: Tensor) -> Tensor:
        """State at t_next.

        Args:
            velocity_fn: Gives further velocities; `velocity_at` calls and checks it.
            x: State at t, (B, ...).
            t: Time, a scalar tensor.
            t_next: Time of the result, a scalar tensor on either side of t.
            velocity: v(x, t), from `start_velocity`.
        """

    def start_velocity(self, velocity_fn: VelocityFn, x: Tensor, t: Tensor) -> Tensor:
        """Velocity that a step begins with, v(x, t) unless the solver has a substitute."""
        return velocity_at(velocity_fn, x, t)

    def reset(self) -> None:  # noqa: B027 (a solver without state has nothing to forget)
        """Forget earlier steps, since the state or the field has changed in between."""

    @classmethod
    def evaluations(cls, num_steps: int) -> int:
        """Velocities that an integration of `num_steps` steps asks for."""
        return cls.evaluations_per_step * num_steps


SOLVERS: Registry[type[Solver]] = Registry("solver")


def velocity_at(velocity_fn: VelocityFn, x: Tensor, t: Tensor) -> Tensor:
    """Velocity at x (B, ...) and a scalar time t, in the precision of x.

    Raises:
        ValueError: If the velocity has not the shape of x.
    """
    velocity = velocity_fn(x, t.expand(x.shape[0]))
    if velocity.shape != x.shape:
        raise ValueError(f"velocity_fn must return the shape of x, {tuple(x.shape)}, got {tuple(velocity.shape)}")
    return velocity.to(x.dtype)


@SOLVERS.register("euler")
class Euler(Solver):
    """First order, one evaluation."""

    def step(self, velocity_fn: VelocityFn, x: Tensor, t: Tensor, t_next: Tensor, velocity: Tensor) -> Tensor:
        """x + h v."""
        return x + (t_next - t) * velocity


@SOLVERS.register("midpoint")
class Midpoint(Solver):
    """Second order, two evaluations: RF-Solver as released."""

    evaluations_per_step = 2

    def step(self, velocity_fn: VelocityFn, x: Tensor, t: Tensor, t_next: Tensor, velocity: Tensor) -> Tensor:
        """x + h v(x + h/2 v, t + h/2)."""
        h = t_next - t
        return x + h * velocity_at(velocity_fn, x + h / 2 * velocity, t + h / 2)


@SOLVERS.register("heun")
class Heun(Solver):
    """Second order, two evaluations; the last one of a sampling is at t = 0."""

    evaluations_per_step = 2

    def step(self, velocity_fn: VelocityFn, x: Tensor, t: Tensor, t_next: Tensor, velocity: Tensor) -> Tensor:
        """x + h/2 (v + v(x + h v, t + h))."""
        h = t_next - t
        return x + h / 2 * (velocity + velocity_at(velocity_fn, x + h * velocity, t_next))


@SOLVERS.register("ab2")
class AdamsBashforth2(Solver):
    """Second order with one evaluation a step, from the velocity of the step before; the first step is Euler's."""

    def __init__(self) -> None:
        self.before: tuple[Tensor, Tensor] | None = None
        """Velocity and length of the step before."""

    def step(self, velocity_fn: VelocityFn, x: Tensor, t: Tensor, t_next: Tensor, velocity: Tensor) -> Tensor:
        """x + h (v + h / (2 h') (v - v'))."""
        h, slope = t_next - t, velocity
        if self.before is not None:
            old_velocity, old_h = self.before
            # Steps may differ in length, so the slope is extrapolated by half of h, measured in old steps.
            slope = velocity + h / (2 * old_h) * (velocity - old_velocity)
        self.before = velocity, h
        return x + h * slope

    def reset(self) -> None:
        """Start with an Euler step again."""
        self.before = None


@SOLVERS.register("fireflow")
class FireFlow(Solver):
    """The midpoint rule whose half step uses the midpoint velocity of the step before: one evaluation a step."""

    def __init__(self) -> None:
        self.middle: Tensor | None = None
        """Midpoint velocity of the step before."""

    def start_velocity(self, velocity_fn: VelocityFn, x: Tensor, t: Tensor) -> Tensor:
        """Midpoint velocity of the step before; v(x, t) in the first step."""
        # The midpoint velocity changes slowly, so that of the step before is a good stand-in for v(x, t).
        return velocity_at(velocity_fn, x, t) if self.middle is None else self.middle

    def step(self, velocity_fn: VelocityFn, x: Tensor, t: Tensor, t_next: Tensor, velocity: Tensor) -> Tensor:
        """x + h v(x + h/2 v, t + h/2), with the substitute for v in the half step."""
        h = t_next - t
        self.middle = velocity_at(velocity_fn, x + h / 2 * velocity, t + h / 2)
        return x + h * self.middle

    def reset(self) -> None:
        """Evaluate at the start of the next step again."""
        self.middle = None

    @classmethod
    def evaluations(cls, num_steps: int) -> int:
        """Number of model evaluations: one per step, plus one at the start."""
        return num_steps + 1 if num_steps else 0


@SOLVERS.register("rk3")
class RungeKutta3(Solver):
    """Kutta's third-order rule, three evaluations."""

    evaluations_per_step = 3

    def step(self, velocity_fn: VelocityFn, x: Tensor, t: Tensor, t_next: Tensor, velocity: Tensor) -> Tensor:
        """x + h/6 (k1 + 4 k2 + k3) with k3 at x + h (2 k2 - k1)."""
        h = t_next - t
        k2 = velocity_at(velocity_fn, x + h / 2 * velocity, t + h / 2)
        k3 = velocity_at(velocity_fn, x + h * (2 * k2 - velocity), t_next)
        return x + h / 6 * (velocity + 4 * k2 + k3)


@SOLVERS.register("rk4")
class RungeKutta4(Solver):
    """The classical fourth-order rule, four evaluations."""

    evaluations_per_step = 4

    def step(self, velocity_fn: VelocityFn, x: Tensor, t: Tensor, t_next: Tensor, velocity: Tensor) -> Tensor:
        """x + h/6 (k1 + 2 k2 + 2 k3 + k4)."""
        h = t_next - t
        k2 = velocity_at(velocity_fn, x + h / 2 * velocity, t + h / 2)
        k3 = velocity_at(velocity_fn, x + h / 2 * k2, t + h / 2)
        k4 = velocity_at(velocity_fn, x + h * k3, t_next)
        return x + h / 6 * (velocity + 2 * k2 + 2 * k3 + k4)
