"""Step policies: which steps of a schedule are made one by one, and from where the rest is covered at once.

At every step a policy is shown the velocity that the step begins with. If it says so, a sample covers the rest of the
schedule in one move along that velocity, and no more velocities are asked for it. A policy object serves one
integration and may keep state, such as the velocity before.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class StepPolicy(ABC):
    """Decides at every step which samples cover the rest at once; an object serves one integration."""

    def begin(self, times: Tensor, batch: int) -> None:  # noqa: B027 (a policy without state needs no beginning)
        """Prepare for an integration.

        Args:
            times: Its schedule, (N + 1,).
            batch: Samples B.
        """

    @abstractmethod
    def leaps(self, index: int, velocity: Tensor) -> Tensor:
        """Choose the samples that cover the rest of the schedule in one move, at this step.

        Args:
            index: Step, from 0.
            velocity: Velocity that the step begins with, guided, (B, ...).

        Returns:
            (B,) bool.
        """


class EveryStep(StepPolicy):
    """Makes every step; the default."""

    def leaps(self, index: int, velocity: Tensor) -> Tensor:
        """No sample leaps."""
        return torch.zeros(velocity.shape[0], dtype=torch.bool, device=velocity.device)
