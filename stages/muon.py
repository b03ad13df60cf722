"""Muon: momentum whose step is orthogonalised, for matrices and for convolution kernels.

    m <- momentum m + gradient                      the gradient seen as a matrix (outputs, everything else)
    u  = orthogonal factor of (gradient + momentum m), by five Newton-Schulz iterations
    w <- w - lr 0.2 sqrt(max(rows, columns)) u      an update of the root mean square that AdamW has

Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); scale: arXiv:2502.16982,
eq. 4. `torch.optim.Muon` takes matrices only; the video VAE is made of kernels, and learns several times faster so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from arlon.precision import fast_dtype

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration x <- a x + b x^3 + c x^5 on singular values."""
NUM_ITERATIONS = 5
RMS_OF_ADAMW = 0.2


def orthogonalize(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Nearly orthogonal factor U V^T of a matrix (rows, columns) = U S V^T; singular values land in [0.7, 1.2].

    The iteration runs in `dtype`: it forgives rounding, and bfloat16 halves its time where it is fast.
    """
    a, b, c = NEWTON_SCHULZ
    x = (matrix / (matrix.norm() + 1e-7)).to(dtype)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Muon over parameters of two or more dimensions; see the module."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        if flat := [tuple(p.shape) for group in self.param_groups for p in group["params"] if p.ndim < 2]:
            raise ValueError(
                f"Muon is for matrices and kernels, got parameters of shapes {flat[:3]}: use AdamW for them"
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].mul_(group["momentum"]).add_(parameter.grad)
        direction = parameter.grad.add(momentum, alpha=group["momentum"]).flatten(1)
        scale = RMS_OF_ADAMW * math.sqrt(max(direction.shape))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(
            orthogonalize(direction, fast_dtype(direction.device)).view_as(parameter), alpha=-group["lr"] * scale
        )
