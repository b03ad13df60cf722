"""Semantic injection: the coarse latent steers temporal blocks of the DiT.

    c   = adapters(patches(coarse_latent))          (B, N, D), aligned with the DiT tokens
    c~  = SiLU(uncertainty(c))                      uncertainty sampling in training only
    y'  = design(c~) applied to y                   y: output of the temporal self-attention of a block

The paper's design is a gated adaptive norm; `injection_designs` has it and those it is compared with. Each starts as
the identity, so that the frozen base starts unchanged.

Source: ARLON, arXiv:2410.20502 (figure 2, abstract).

Dimension key
    B  batch    C T H W  coarse latent    N  DiT tokens, in t, h, w order    D  width of the DiT
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arlon.components import Component
from arlon.models.embeddings import PatchEmbed
from arlon.models.injection_designs import DESIGNS, InjectionConfig, InjectionDesign
from arlon.models.layers import Mlp
from arlon.models.stdit import Inject, Injection, STDiT3
from arlon.models.uncertainty import LearnedUncertainty, StatisticsUncertainty


class SemanticInjection(Component):
    """Turns a coarse latent into what is injected into temporal blocks of an STDiT3."""

    config_class = InjectionConfig

    def __init__(self, config: InjectionConfig) -> None:
        super().__init__()
        self.config = config
        hidden = int(config.dim * config.adapter_ratio)
        self.projection = PatchEmbed(config.in_channels, config.patch_size, config.dim)
        self.adapters = nn.ModuleList(Mlp(config.dim, hidden, config.dim) for _ in range(config.num_adapters))
        self.uncertainty = _make_uncertainty(config)
        design = DESIGNS[config.design]
        self.add_module(design.name_in_injection, design(config))
        self._init_weights()

    @torch.no_grad()
    def init_from(self, dit: STDiT3) -> None:
        """Copy the patch embedding of a DiT into the projection, since coarse latents are like latents.

        A design may take over more; a ControlNet becomes a copy of the base's blocks.

        Args:
            dit: The base.

        Raises:
            ValueError: If its patch embedding, or its blocks, have another shape.
        """
        theirs, ours = dit.x_embedder.proj, self.projection.proj
        if theirs.weight.shape != ours.weight.shape:
            raise ValueError(
                "the DiT must have the injection's dim, in_channels and patch_size: expected a patch "
                f"embedding {tuple(ours.weight.shape)}, got {tuple(theirs.weight.shape)}"
            )
        ours.load_state_dict(theirs.state_dict())
        self.design.init_from(dit)

    @property
    def design(self) -> InjectionDesign:
        """The part that acts on the base."""
        design = self.get_submodule(DESIGNS[self.config.design].name_in_injection)
        assert isinstance(design, InjectionDesign)
        return design

    def condition(self, coarse_latent: Tensor, generator: torch.Generator | None = None) -> Inject | Injection:
        """Compute what is injected; it does not depend on the flow time, so one call serves all steps.

        Args:
            coarse_latent: What the VQ-VAE decoder makes of codes, (B, C, T, H, W) like the noisy latent.
            generator: Draws the uncertainty, in training only. The global one if None.

        Returns:
            What the `inject` argument of STDiT3 takes: a function (i, y) -> y, or an `Injection` that gives one in
            every pass.

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
        injected: Inject | Injection = self.design(c)
        return injected

    def forward(self, coarse_latent: Tensor, generator: torch.Generator | None = None) -> Inject | Injection:
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
        for linear in self.design.output_layers():
            nn.init.zeros_(linear.weight)
        if isinstance(self.uncertainty, LearnedUncertainty):
            nn.init.eye_(self.uncertainty.to_mean.weight)
            nn.init.zeros_(self.uncertainty.to_logvar.weight)
            nn.init.constant_(self.uncertainty.to_logvar.bias, 2 * math.log(0.3))


def _make_uncertainty(config: InjectionConfig) -> StatisticsUncertainty | LearnedUncertainty | None:
    if config.uncertainty == "none":
        return None
    return StatisticsUncertainty(config.dim) if config.uncertainty == "dsu" else LearnedUncertainty(config.dim)


def _uniform(generator: torch.Generator | None) -> float:
    """A number in [0, 1) from the generator, wherever it lives, or the global CPU one."""
    device = None if generator is None else generator.device
    return float(torch.rand((), generator=generator, device=device))
