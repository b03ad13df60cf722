"""Semantic injection: the coarse latent modulates temporal blocks of the DiT through a gated adaptive norm.

    c        = adapters(patches(coarse_latent))                      (B, N, D), aligned with the DiT tokens
    c~       = uncertainty(c)                                        in training only
    a, g, b  = Linear_i(SiLU(c~))                                    of block i, each (B, N, D)
    y'       = y + a (LN(y) (1 + g) + b)                             y: output of the temporal self-attention

Linear_i starts at zero, so that a fresh injection is the identity and the frozen base starts unchanged. The two designs
that the paper compares with this one, an MLP adapter and a ControlNet, are in `injection_designs`.

Source: ARLON, arXiv:2410.20502 (figure 2, abstract). The paper names the parts and where they sit; the
formula of the adaptive norm is our reading of it.

Dimension key
    B  batch    C T H W  coarse latent    N  DiT tokens, in t, h, w order    D  width of the DiT
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arlon.components import Component
from arlon.models.embeddings import PatchEmbed
from arlon.models.injection_designs import ControlBranch, MlpAdapters
from arlon.models.layers import Mlp, layer_norm
from arlon.models.stdit import Inject, StartedInject
from arlon.models.uncertainty import LearnedUncertainty, StatisticsUncertainty

Design = Literal["adaptive_norm", "mlp_adapter", "controlnet"]
DESIGNS: tuple[Design, ...] = get_args(Design)
LEAST = {"in_channels": 1, "dim": 1, "num_blocks": 0, "first_block": 0, "num_adapters": 0, "num_heads": 1}
"""Smallest values of the fields of the config that count something."""


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
    design: Design = "adaptive_norm"
    """How the features enter a block; the adaptive norm works best in the paper."""
    num_blocks: int = 14
    """Temporal blocks that are modulated; the first half of them works best in the paper."""
    first_block: int = 0
    """The first of these blocks."""
    num_adapters: int = 2
    """Residual adapters after the projection."""
    adapter_ratio: float = 1.0
    """Hidden width of an adapter over D."""
    uncertainty: Literal["none", "dsu", "learned"] = "dsu"
    """Noise on the coarse features in training: none, by feature statistics, or with a learned variance."""
    uncertainty_prob: float = 0.5
    """Probability of that noise in a training step."""
    num_heads: int = 16
    """Attention heads of the DiT, for `controlnet`, whose branch is a copy of its blocks."""
    mlp_ratio: float = 4.0
    """Width of an MLP of the DiT over D, for `controlnet`."""
    qk_norm: bool = True
    """Whether the DiT normalises queries and keys, for `controlnet`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        problems = [
            f"{name} ({getattr(self, name)}) must be at least {least}"
            for name, least in LEAST.items()
            if getattr(self, name) < least
        ]
        if self.design not in DESIGNS:
            problems.append(f"unknown design {self.design!r}, choose from {', '.join(map(repr, DESIGNS))}")
        elif self.design == "controlnet" and self.num_heads > 0 and self.dim % (2 * self.num_heads):
            problems.append(f"dim ({self.dim}) must be a multiple of 2 num_heads ({2 * self.num_heads})")
        if self.mlp_ratio <= 0:
            problems.append(f"mlp_ratio ({self.mlp_ratio}) must be positive")
        if self.adapter_ratio <= 0:
            problems.append(f"adapter_ratio ({self.adapter_ratio}) must be positive")
        if self.uncertainty not in ("none", "dsu", "learned"):
            problems.append(f"unknown uncertainty {self.uncertainty!r}, choose from 'none', 'dsu', 'learned'")
        if not 0 <= self.uncertainty_prob <= 1:
            problems.append(f"uncertainty_prob ({self.uncertainty_prob}) is a probability in [0, 1]")
        if problems:
            raise ValueError("InjectionConfig: " + "; ".join(problems))


@dataclass(frozen=True)
class Modulations:
    """What `SemanticInjection.condition` returns for the adaptive norm: call it as (i, y) -> y in temporal block i.

    Attributes:
        gate_scale_shift: One tensor (B, N, 3 D) a modulated block.
        first_block: The first of these blocks.
    """

    gate_scale_shift: tuple[Tensor, ...]
    first_block: int = 0

    def __call__(self, i: int, y: Tensor) -> Tensor:
        """Modulate y (k B, N, D) of temporal block i; k repeats of the batch (guidance) share the features.

        Returns:
            Like y, in its dtype; y itself where block i is not modulated.

        Raises:
            ValueError: If batch or tokens do not fit the coarse latent.
        """
        if not 0 <= i - self.first_block < len(self.gate_scale_shift):
            return y
        values = self.gate_scale_shift[i - self.first_block]
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


class SemanticInjection(Component):
    """Coarse latent to what it does in some temporal blocks of an STDiT3."""

    config_class = InjectionConfig

    def __init__(self, config: InjectionConfig) -> None:
        super().__init__()
        self.config = config
        hidden = int(config.dim * config.adapter_ratio)
        self.projection = PatchEmbed(config.in_channels, config.patch_size, config.dim)
        self.adapters = nn.ModuleList(Mlp(config.dim, hidden, config.dim) for _ in range(config.num_adapters))
        self.uncertainty = _make_uncertainty(config)
        if config.design == "adaptive_norm":
            self.to_modulation = nn.ModuleList(nn.Linear(config.dim, 3 * config.dim) for _ in range(config.num_blocks))
        elif config.design == "mlp_adapter":
            self.to_residual = MlpAdapters(config.dim, config.first_block, config.num_blocks)
        else:
            self.control = ControlBranch(
                config.dim,
                config.num_heads,
                first_block=config.first_block,
                num_blocks=config.num_blocks,
                mlp_ratio=config.mlp_ratio,
                qk_norm=config.qk_norm,
            )
        self._init_weights()

    @torch.no_grad()
    def init_from(self, dit: nn.Module) -> None:
        """Copy the patch embedding of a DiT into the projection: a coarse latent lives in the latent space.

        A ControlNet becomes a copy of its blocks, too.

        Args:
            dit: Model with an `x_embedder` (STDiT3).

        Raises:
            ValueError: If its patch embedding, or its blocks, have another shape.
        """
        theirs, ours = dit.x_embedder.proj, self.projection.proj
        if theirs.weight.shape != ours.weight.shape:
            raise ValueError(
                "the DiT must have the injection's dim, in_channels and patch_size: expected a patch "
                f"embedding {tuple(ours.weight.shape)}, got {tuple(theirs.weight.shape)}"
            )
        ours.weight.copy_(theirs.weight)
        ours.bias.copy_(theirs.bias)
        if self.config.design == "controlnet":
            self.control.copy_blocks(dit)

    def condition(self, coarse_latent: Tensor, generator: torch.Generator | None = None) -> Inject | StartedInject:
        """Compute what does not depend on the flow time once: the modulations of all blocks, or residuals.

        Args:
            coarse_latent: What the VQ-VAE decoder makes of codes, (B, C, T, H, W) like the noisy latent.
            generator: Draws the uncertainty, in training only. The global one if None.

        Returns:
            What the `inject` argument of STDiT3 takes: a callable (i, y) -> y such as `Modulations`, or, for a
            ControlNet, an object that gives one in every pass.

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
        if self.config.design == "mlp_adapter":
            return self.to_residual(c)
        if self.config.design == "controlnet":
            return self.control.with_features(c)
        return Modulations(tuple(linear(c) for linear in self.to_modulation), self.config.first_block)

    def forward(self, coarse_latent: Tensor, generator: torch.Generator | None = None) -> Inject | StartedInject:
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
        """Xavier everywhere, what enters the base at zero, the learned mean at the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for linear in self._last_linears():
            nn.init.zeros_(linear.weight)
        if isinstance(self.uncertainty, LearnedUncertainty):
            nn.init.eye_(self.uncertainty.to_mean.weight)
            nn.init.zeros_(self.uncertainty.to_logvar.weight)
            nn.init.constant_(self.uncertainty.to_logvar.bias, 2 * math.log(0.3))

    def _last_linears(self) -> Iterable[nn.Linear]:
        """The layers whose outputs enter the base."""
        if self.config.design == "adaptive_norm":
            return self.to_modulation
        return self.to_residual.last_linears() if self.config.design == "mlp_adapter" else self.control.last_linears()


def _make_uncertainty(config: InjectionConfig) -> StatisticsUncertainty | LearnedUncertainty | None:
    if config.uncertainty == "none":
        return None
    kinds = {"dsu": StatisticsUncertainty, "learned": LearnedUncertainty}
    return kinds[config.uncertainty](config.dim)


def _uniform(generator: torch.Generator | None) -> float:
    """A number in [0, 1) from the generator, wherever it lives, or the global CPU one."""
    device = None if generator is None else generator.device
    return float(torch.rand((), generator=generator, device=device))
