"""Muon: momentum whose step is orthogonalised, for matrices and for convolution kernels.

    m <- momentum m + gradient                      the gradient seen as a matrix (outputs, everything else)
    u  = orthogonal factor of (gradient + momentum m), by five Newton-Schulz iterations
    w <- w - lr 0.2 sqrt(max(rows, columns)) u      an update whose root mean square is that of AdamW

Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); scale: arXiv:2502.16982,
eq. 4.

`torch.optim.Muon` takes matrices only, and the video VAE is made of kernels. For matrices its update is not the same
either: it iterates in bfloat16 on every device, which moves the update by 0.5 % of its norm. So both kinds of weights
are updated here, by the same lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from arlon.precision import fast_dtype

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration x <- a x + b x^3 + c x^5 on singular values."""
NUM_ITERATIONS = 5
RMS_OF_ADAMW = 0.2
"""Root mean square of a typical update of AdamW, over its learning rate."""


def orthogonalize(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Nearly orthogonal factor U V^T of a matrix (rows, columns) = U S V^T; singular values land in [0.7, 1.2].

    The iteration runs in `dtype`: it tolerates rounding, and bfloat16 halves its time where hardware supports it.
    """
    a, b, c = NEWTON_SCHULZ
    x = (matrix / (matrix.norm() + 1e-7)).to(dtype)
    tall = x.shape[0] > x.shape[1]
    if tall:  # the product of the shorter side is cheaper
        x = x.T
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).to(matrix.dtype)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the groups with `use_muon`, AdamW for all others; one optimizer, with one state and one schedule."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        """Set up the optimizer. Every argument but `params` is a default that a group may override.

        Args:
            params: Parameters, which Muon takes, or groups of them, as dicts with `params` and, for AdamW,
                `use_muon=False`.
            lr: Learning rate.
            momentum: Muon's decay of the momentum.
            betas: AdamW's decay rates of the two moments.
            eps: AdamW's eps.
            weight_decay: Decoupled decay of the weights.

        Raises:
            ValueError: If Muon is to take a parameter with fewer than two dimensions.
        """
        defaults = {"lr": lr, "use_muon": True, "momentum": momentum, "betas": betas, "eps": eps}
        super().__init__(params, {**defaults, "weight_decay": weight_decay})
        muon = [p for group in self.param_groups if group["use_muon"] for p in group["params"]]
        if flat := [tuple(p.shape) for p in muon if p.ndim < 2]:
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
            parameters: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            if not group["use_muon"]:
                self._step_adamw(parameters, group)
                continue
            for parameter in parameters:
                self._step_muon(parameter, group)
        return loss

    def _step_muon(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        gradient = _gradient(parameter)
        momentum = state["momentum"].mul_(group["momentum"]).add_(gradient)
        direction = gradient.add(momentum, alpha=group["momentum"]).flatten(1)
        scale = RMS_OF_ADAMW * math.sqrt(max(direction.shape))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(
            orthogonalize(direction, fast_dtype(direction.device)).view_as(parameter), alpha=-group["lr"] * scale
        )

    def _step_adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[parameter] for parameter in parameters]
        for state, parameter in zip(states, parameters, strict=True):
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        adamw(
            parameters,
            [_gradient(parameter) for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],  # maxima of the second moment: only AMSGrad has them
            [state["step"] for state in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None, "only parameters with a gradient are updated"
    return parameter.grad
