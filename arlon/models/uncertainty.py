"""Uncertainty sampling: noise on the coarse features in training, so that the DiT tolerates wrong codes.

Source: ARLON, arXiv:2410.20502, noise-resilient training, names the part and where it sits; the formulas are our
reading of it.

Dimension key
    B  batch    N  tokens    D  width
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

DSU_EPS = 1e-6
STATISTICS_MOMENTUM = 0.99
LOGVAR_RANGE = (-6.0, 2.0)
"""Bounds of the learned log-variance; the floor keeps the training noise from being learned away."""


class StatisticsUncertainty(nn.Module):
    """Shift mean and spread of the features at random, as much as they differ between samples (DSU).

    Per channel, over the N positions of sample n:

        mu_n, sg_n = mean, standard deviation        S_mu, S_sg = their standard deviations between samples
        out_n      = (sg_n + e2 S_sg) (c_n - mu_n) / sg_n + mu_n + e1 S_mu          e1, e2 ~ N(0, 1)

    S comes from the batch. A batch of one has none: running statistics of the training steps take its place.

    Source: arXiv:2202.03958 (uncertainty of feature statistics) and its official code.
    """

    running_mean: Tensor
    running_var: Tensor
    num_updates: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(2, dim))
        self.register_buffer("running_var", torch.zeros(2, dim))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    def forward(self, c: Tensor, generator: torch.Generator | None) -> Tensor:
        """Perturb features c (B, N, D); noise comes from the generator, the global CPU one if None."""
        mean = c.mean(dim=1)
        spread = (_variance(c, dim=1) + DSU_EPS).sqrt()
        between = (_variance(torch.stack((mean, spread)), dim=1) + DSU_EPS).sqrt()  # (2, D)
        self.update(mean.detach(), spread.detach())
        if c.shape[0] == 1:
            between = (self.running_var + DSU_EPS).sqrt().to(c.dtype)
        shift_mean, shift_spread = _normal((2, *mean.shape), c, generator) * between.unsqueeze(1)
        factor = 1 + shift_spread / spread
        return (c - mean[:, None]) * factor[:, None] + (mean + shift_mean)[:, None]

    @torch.no_grad()
    def update(self, mean: Tensor, spread: Tensor) -> None:
        """Move the running statistics by those of a batch, (B, D) each: a plain, later a moving average."""
        for sample in torch.stack((mean, spread), dim=1).to(self.running_mean.dtype):  # (2, D) each
            self.num_updates += 1
            weight = torch.clamp(1 / self.num_updates, min=1 - STATISTICS_MOMENTUM)
            step = sample - self.running_mean
            self.running_mean += weight * step
            self.running_var.copy_((1 - weight) * (self.running_var + weight * step.square()))


class LearnedUncertainty(nn.Module):
    """Draw the features from a normal distribution with learned mean and log-variance, by reparametrisation.

    The mean starts as the identity. Without noise (in evaluation) the mean itself is used.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.to_mean = nn.Linear(dim, dim)
        self.to_logvar = nn.Linear(dim, dim)

    def forward(self, c: Tensor, generator: torch.Generator | None) -> Tensor:
        """Sample features like c (B, N, D); noise comes from the generator, the global CPU one if None."""
        logvar = self.to_logvar(c).clamp(*LOGVAR_RANGE)
        return self.to_mean(c) + torch.exp(logvar / 2) * _normal(c.shape, c, generator)


def _variance(x: Tensor, dim: int) -> Tensor:
    """Unbiased variance along an axis; 0 if the axis holds one value."""
    return x.var(dim=dim, correction=min(1, x.shape[dim] - 1))


def _normal(shape: tuple[int, ...] | torch.Size, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers from the generator or the global CPU one, moved to where `like` is."""
    source = torch.device("cpu") if generator is None else generator.device
    return torch.randn(*shape, generator=generator, device=source).to(like)
