"""Semantic injection: the coarse latent modulates temporal blocks of the DiT through a gated adaptive norm.

    c        = adapters(patches(coarse_latent))                      (B, N, D), aligned with the DiT tokens
    c~       = uncertainty(c)                                        in training only
    a, g, b  = Linear_i(SiLU(c~))                                    of block i, each (B, N, D)
    y'       = y + a (LN(y) (1 + g) + b)                             y: output of the temporal self-attention

Linear_i starts at zero, so that a fresh injection is the identity and the frozen base starts unchanged.

Source: ARLON, arXiv:2410.20502 (figure 2, abstract). The paper names the parts and where they sit; the
formulas of the adaptive norm and of the uncertainty sampling are our reading of it.

Dimension key
    B  batch    C T H W  coarse latent    N  DiT tokens, in t, h, w order    D  width of the DiT
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arlon.models.embeddings import PatchEmbed
from arlon.models.layers import Mlp, layer_norm

DSU_EPS = 1e-6
STATISTICS_MOMENTUM = 0.99
LOGVAR_RANGE = (-6.0, 2.0)
"""Bounds of the learned log-variance; the floor keeps the training noise from being learned away."""


@dataclass(frozen=True, kw_only=True)
class InjectionConfig:
    """Shape of the injection; the defaults fit STDiT3-XL/2.

    Raises:
        ValueError: If a value is out of range; all problems are listed.
    """

    in_channels: int = 4
    """Channels C of the coarse latent."""
    patch_size: tuple[int, int, int] = (1, 2, 2)
    """Patch of the DiT."""
    dim: int = 1152
    """Width D of the DiT."""
    num_blocks: int = 14
    """Temporal blocks that are modulated, from the first on; half of them works best in the paper."""
    num_adapters: int = 2
    """Residual adapters after the projection."""
    adapter_ratio: float = 1.0
    """Hidden width of an adapter over D."""
    uncertainty: Literal["none", "dsu", "learned"] = "dsu"
    """Noise on the coarse features in training: none, by feature statistics, or with a learned variance."""
    uncertainty_prob: float = 0.5
    """Probability of that noise in a training step."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        problems = [
            f"{name} ({getattr(self, name)}) must be at least {least}"
            for name, least in (("in_channels", 1), ("dim", 1), ("num_blocks", 0), ("num_adapters", 0))
            if getattr(self, name) < least
        ]
        if self.adapter_ratio <= 0:
            problems.append(f"adapter_ratio ({self.adapter_ratio}) must be positive")
        if self.uncertainty not in ("none", "dsu", "learned"):
            problems.append(f"unknown uncertainty {self.uncertainty!r}, choose from 'none', 'dsu', 'learned'")
        if not 0 <= self.uncertainty_prob <= 1:
            problems.append(f"uncertainty_prob ({self.uncertainty_prob}) is a probability in [0, 1]")
        if problems:
            raise ValueError("InjectionConfig: " + "; ".join(problems))


class StatisticsUncertainty(nn.Module):
    """Shift mean and spread of the features at random, as much as they differ between samples (DSU).

    Per channel, over the N positions of sample n:

        mu_n, sg_n = mean, standard deviation        S_mu, S_sg = their standard deviations between samples
        out_n      = (sg_n + e2 S_sg) (c_n - mu_n) / sg_n + mu_n + e1 S_mu          e1, e2 ~ N(0, 1)

    S comes from the batch. A batch of one has none: running statistics of the training steps take its place.

    Source: arXiv:2202.03958 (uncertainty of feature statistics) and its official code.
    """

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


@dataclass(frozen=True)
class Modulations:
    """What `SemanticInjection.condition` returns: call it as (i, y) -> y in temporal block i.

    Attributes:
        gate_scale_shift: One tensor (B, N, 3 D) a modulated block.
    """

    gate_scale_shift: tuple[Tensor, ...]

    def __call__(self, i: int, y: Tensor) -> Tensor:
        """Modulate y (k B, N, D) of temporal block i; k repeats of the batch (guidance) share the features.

        Returns:
            Like y, in its dtype; y itself where block i is not modulated.

        Raises:
            ValueError: If batch or tokens do not fit the coarse latent.
        """
        if i >= len(self.gate_scale_shift):
            return y
        values = self.gate_scale_shift[i]
        if y.shape[0] % values.shape[0] or y.shape[1] != values.shape[1] or 3 * y.shape[2] != values.shape[2]:
            raise ValueError(
                "the coarse latent must be aligned with the DiT tokens: expected (B, N, D) = "
                f"{(*values.shape[:2], values.shape[2] // 3)} or a multiple of B, got {tuple(y.shape)}. "
                "Give a coarse latent of the size of the noisy latent."
            )
        gate, scale, shift = values.chunk(3, dim=-1)
        batches = y.unflatten(0, (-1, values.shape[0]))  # (k, B, N, D)
        view = torch.addcmul(shift, layer_norm(batches), 1 + scale)
        return torch.addcmul(batches, gate, view).flatten(0, 1).to(y.dtype)


class SemanticInjection(nn.Module):
    """Coarse latent to modulations of the first temporal blocks of an STDiT3."""

    config_class = InjectionConfig

    def __init__(self, config: InjectionConfig) -> None:
        super().__init__()
        self.config = config
        hidden = int(config.dim * config.adapter_ratio)
        self.projection = PatchEmbed(config.in_channels, config.patch_size, config.dim)
        self.adapters = nn.ModuleList(Mlp(config.dim, hidden, config.dim) for _ in range(config.num_adapters))
        self.uncertainty = _make_uncertainty(config)
        self.to_modulation = nn.ModuleList(nn.Linear(config.dim, 3 * config.dim) for _ in range(config.num_blocks))
        self._init_weights()

    @classmethod
    def from_pretrained(cls, folder: str | Path, **config_overrides: Any) -> SemanticInjection:
        """Load a component folder strictly; see `arlon.checkpoint.load_component`."""
        from arlon.checkpoint import load_component

        return load_component(cls, folder, **config_overrides)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a component folder; see `arlon.checkpoint.save_component`."""
        from arlon.checkpoint import save_component

        save_component(self, folder, dtype=dtype)

    @torch.no_grad()
    def init_from(self, dit: nn.Module) -> None:
        """Copy the patch embedding of a DiT into the projection: a coarse latent lives in the latent space.

        Args:
            dit: Model with an `x_embedder` (STDiT3).

        Raises:
            ValueError: If its patch embedding has another shape.
        """
        theirs, ours = dit.x_embedder.proj, self.projection.proj
        if theirs.weight.shape != ours.weight.shape:
            raise ValueError(
                "the DiT must have the injection's dim, in_channels and patch_size: expected a patch "
                f"embedding {tuple(ours.weight.shape)}, got {tuple(theirs.weight.shape)}"
            )
        ours.weight.copy_(theirs.weight)
        ours.bias.copy_(theirs.bias)

    def condition(self, coarse_latent: Tensor, generator: torch.Generator | None = None) -> Modulations:
        """Compute the modulations of all blocks once; they do not depend on the flow time.

        Args:
            coarse_latent: What the VQ-VAE decoder makes of codes, (B, C, T, H, W) like the noisy latent.
            generator: Draws the uncertainty, in training only. The global one if None.

        Returns:
            A callable (i, y) -> y for the `inject` argument of STDiT3.

        Raises:
            ValueError: If the coarse latent has not C channels.
        """
        if coarse_latent.ndim != 5 or coarse_latent.shape[1] != self.config.in_channels:
            raise ValueError(
                f"coarse_latent must be (B, {self.config.in_channels}, T, H, W), got {tuple(coarse_latent.shape)}"
            )
        c = self.projection(coarse_latent.to(self.projection.proj.weight.dtype)).flatten(1, 2)  # (B, N, D)
        for adapter in self.adapters:
            c = c + adapter(c)
        c = F.silu(self._perturb(c, generator))
        return Modulations(tuple(linear(c) for linear in self.to_modulation))

    def forward(self, coarse_latent: Tensor, generator: torch.Generator | None = None) -> Modulations:
        """Same as `condition`, so that wrappers which hook the forward pass work."""
        return self.condition(coarse_latent, generator)

    def _perturb(self, c: Tensor, generator: torch.Generator | None) -> Tensor:
        """Uncertainty sampling of c (B, N, D): in training, with the configured probability a step."""
        if self.uncertainty is None:
            return c
        if self.training and _uniform(generator) < self.config.uncertainty_prob:
            return self.uncertainty(c, generator)
        return self.uncertainty.to_mean(c) if isinstance(self.uncertainty, LearnedUncertainty) else c

    def _init_weights(self) -> None:
        """Xavier everywhere, modulations at zero, the learned mean at the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for linear in self.to_modulation:
            nn.init.zeros_(linear.weight)
        if isinstance(self.uncertainty, LearnedUncertainty):
            nn.init.eye_(self.uncertainty.to_mean.weight)
            nn.init.zeros_(self.uncertainty.to_logvar.weight)
            nn.init.constant_(self.uncertainty.to_logvar.bias, 2 * math.log(0.3))


def _make_uncertainty(config: InjectionConfig) -> StatisticsUncertainty | LearnedUncertainty | None:
    if config.uncertainty == "none":
        return None
    kinds = {"dsu": StatisticsUncertainty, "learned": LearnedUncertainty}
    return kinds[config.uncertainty](config.dim)


def _variance(x: Tensor, dim: int) -> Tensor:
    """Unbiased variance along an axis; 0 where the axis holds one value."""
    return x.var(dim=dim, correction=min(1, x.shape[dim] - 1))


def _uniform(generator: torch.Generator | None) -> float:
    """A number in [0, 1) from the generator, wherever it lives, or the global CPU one."""
    device = None if generator is None else generator.device
    return float(torch.rand((), generator=generator, device=device))


def _normal(shape: tuple[int, ...] | torch.Size, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers from the generator or the global CPU one, moved to where `like` is."""
    source = torch.device("cpu") if generator is None else generator.device
    return torch.randn(*shape, generator=generator, device=source).to(like)
