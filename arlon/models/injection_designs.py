"""Designs of semantic injection: how coarse features enter temporal blocks of the DiT.

    adaptive norm  y' = y + a (LN(y) (1 + g) + b),  (a, g, b) = Linear_i(c)
    MLP adapter    y' = y + MLP_i(c)
    ControlNet     h  = x + Linear(c),  h = temporal_i(spatial_i(h)),  y' = y + Linear_i(h)

y is the output of the temporal self-attention of block i, before its gate; c are the coarse features behind adapters
and uncertainty sampling; x are the tokens that the first block of the base is given; spatial_i and temporal_i are
trained copies of the base's blocks. In every design the last layers start at zero, so that a fresh injection is the
identity. A design from another package is added with `DESIGNS.register`.

Source: ARLON, arXiv:2410.20502 (figure 2, abstract; ablation of the injection). The paper names the designs; the
formulas are our reading. ControlNet: arXiv:2302.05543; there the copy adds to the skip connections, here it acts in the
place of the adaptive norm, so that only the designs differ.

Dimension key
    B  batch    N  DiT tokens, in t, h, w order    nT S  the same, by frame    D  width    k  repeats of B (guidance)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from arlon.models.layers import Mlp, STDiT3Block, layer_norm
from arlon.models.stdit import BlockInputs, Inject, Injection, STDiT3
from arlon.plugins import Registry

SMALLEST = {"in_channels": 1, "dim": 1, "num_blocks": 0, "first_block": 0, "num_adapters": 0, "num_heads": 1}
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
    design: str = "adaptive_norm"
    """Name of an `InjectionDesign`: how the features enter a block. The adaptive norm works best in the paper."""
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
            for name, least in SMALLEST.items()
            if getattr(self, name) < least
        ]
        try:
            problems += DESIGNS[self.design].problems(self)
        except ValueError as error:
            problems.append(str(error))
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


class InjectionDesign(nn.Module, ABC):
    """Turns the coarse features of a segment into what is injected.

    Attributes:
        name_in_injection: Name of this module in `SemanticInjection`, and so the prefix of its weights in files.
    """

    name_in_injection: ClassVar[str] = "added_design"

    def __init__(self, config: InjectionConfig) -> None:
        super().__init__()
        self.config = config

    @staticmethod
    def problems(config: InjectionConfig) -> list[str]:
        """Reasons why the design does not work with a config, one sentence each."""
        return []

    @abstractmethod
    def forward(self, features: Tensor) -> Inject | Injection:
        """Compute what is injected, independent of the flow time.

        Args:
            features: c, (B, N, D).

        Returns:
            A function (i, y (k B, N, D)) -> y for temporal block i, or an `Injection` that gives one in every pass.
        """

    @abstractmethod
    def output_layers(self) -> Iterable[nn.Linear]:
        """The layers through which the design acts on the base; they start at zero."""

    def init_from(self, dit: STDiT3) -> None:
        """Take over weights of the base, if the design uses any; the default takes none."""


DESIGNS: Registry[type[InjectionDesign]] = Registry("injection design")


@dataclass(frozen=True)
class Modulations:
    """The adaptive norm of one segment, an `Inject`: call it as (i, y) -> y in temporal block i.

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
        view = torch.addcmul(shift, layer_norm(batches), 1 + scale)  # LN(y) (1 + scale) + shift
        return torch.addcmul(batches, gate, view).flatten(0, 1).to(y.dtype)


@DESIGNS.register("adaptive_norm")
class AdaptiveNorm(InjectionDesign, nn.ModuleList):
    """The paper's design: one Linear per block gives gate, scale and shift of an adaptive norm."""

    name_in_injection = "to_modulation"

    def __init__(self, config: InjectionConfig) -> None:
        super().__init__(config)
        self.extend(nn.Linear(config.dim, 3 * config.dim) for _ in range(config.num_blocks))

    def forward(self, features: Tensor) -> Modulations:
        """Modulations of all blocks from features c (B, N, D)."""
        return Modulations(tuple(linear(features) for linear in self), self.config.first_block)

    def output_layers(self) -> Iterable[nn.Linear]:
        """The Linear of every block."""
        return [linear for linear in self if isinstance(linear, nn.Linear)]


@dataclass(frozen=True)
class Residuals:
    """Residuals of one segment, an `Inject`: (i, y) -> y plus the residual of temporal block i.

    Attributes:
        values: One tensor (B, N, D) a block.
        first_block: The first of these blocks.
    """

    values: tuple[Tensor, ...]
    first_block: int = 0

    def __call__(self, i: int, y: Tensor) -> Tensor:
        """Add to y (k B, N, D) of temporal block i; y itself where nothing is added.

        Raises:
            ValueError: If batch or tokens do not fit the coarse latent.
        """
        if not 0 <= i - self.first_block < len(self.values):
            return y
        values = self.values[i - self.first_block]
        return (y + _repeated(values, y.shape)).to(y.dtype)


@DESIGNS.register("mlp_adapter")
class MlpAdapters(InjectionDesign):
    """An MLP per block adds to the output of the self-attention, from the coarse features alone."""

    name_in_injection = "to_residual"

    def __init__(self, config: InjectionConfig) -> None:
        super().__init__(config)
        dim = config.dim
        self.blocks = nn.ModuleList(Mlp(dim, dim, dim) for _ in range(config.num_blocks))

    def forward(self, features: Tensor) -> Residuals:
        """Residuals of all blocks from features c (B, N, D)."""
        return Residuals(tuple(mlp(features) for mlp in self.blocks), self.config.first_block)

    def output_layers(self) -> Iterable[nn.Linear]:
        """The second layer of every MLP."""
        return [mlp.fc2 for mlp in self.blocks if isinstance(mlp, Mlp)]


@DESIGNS.register("controlnet")
class ControlBranch(InjectionDesign):
    """A trained copy of some blocks of the base, which sees the noisy tokens, the text and the coarse features."""

    name_in_injection = "control"

    def __init__(self, config: InjectionConfig) -> None:
        super().__init__(config)
        dim, count = config.dim, config.num_blocks
        block = partial(STDiT3Block, dim, config.num_heads, mlp_ratio=config.mlp_ratio, qk_norm=config.qk_norm)
        self.enter = nn.Linear(dim, dim)
        self.spatial_blocks = nn.ModuleList(block(temporal=False) for _ in range(count))
        self.temporal_blocks = nn.ModuleList(block(temporal=True) for _ in range(count))
        self.leave = nn.ModuleList(nn.Linear(dim, dim) for _ in range(count))
        for copied in (*self.spatial_blocks, *self.temporal_blocks):
            nn.init.normal_(copied.scale_shift_table, std=dim**-0.5)

    @staticmethod
    def problems(config: InjectionConfig) -> list[str]:
        """A width that the heads do not divide."""
        if config.num_heads < 1 or config.dim % (2 * config.num_heads) == 0:
            return []
        return [f"dim ({config.dim}) must be a multiple of 2 num_heads ({2 * config.num_heads})"]

    def forward(self, features: Tensor) -> Controlled:
        """The branch with features c (B, N, D)."""
        return Controlled(self, self.enter(features))

    @torch.no_grad()
    def init_from(self, dit: STDiT3) -> None:
        """Copy the base's blocks.

        Raises:
            ValueError: If it has other blocks, or too few.
        """
        first = self.config.first_block
        stop = first + len(self.leave)
        if stop > len(dit.temporal_blocks):
            raise ValueError(
                f"a copy of blocks {first} to {stop - 1} needs a DiT of {stop} blocks at least, got "
                f"{len(dit.temporal_blocks)}: lower num_blocks or first_block"
            )
        for ours, theirs in ((self.spatial_blocks, dit.spatial_blocks), (self.temporal_blocks, dit.temporal_blocks)):
            try:
                ours.load_state_dict(theirs[first:stop].state_dict())
            except RuntimeError as error:
                raise ValueError(
                    "the injection must have dim, num_heads, mlp_ratio and qk_norm of the DiT whose blocks it copies: "
                    f"{error}"
                ) from error

    def output_layers(self) -> Iterable[nn.Linear]:
        """The layers through which features enter the branch, and the branch the base."""
        return [layer for layer in (self.enter, *self.leave) if isinstance(layer, nn.Linear)]


@dataclass(frozen=True)
class Controlled:
    """A ControlNet branch with its coarse features; an `Injection`, since the branch sees the inputs of every pass."""

    branch: ControlBranch
    entered: Tensor

    def begin(self, inputs: BlockInputs) -> Inject:
        """Run the branch on the inputs of the base's first block.

        Raises:
            ValueError: If batch or tokens do not fit the coarse latent.
        """
        x = inputs.tokens
        flat = (x.shape[0], x.shape[1] * x.shape[2], x.shape[3])
        h = x + _repeated(self.entered, flat).view(x.shape)
        values = []
        blocks = zip(self.branch.spatial_blocks, self.branch.temporal_blocks, self.branch.leave, strict=True)
        for spatial, temporal, leave in blocks:
            h = spatial(h, inputs.time, inputs.text)
            h = temporal(h, inputs.time, inputs.text, rotation=inputs.rotation)
            values.append(leave(h.flatten(1, 2)))
        return Residuals(tuple(values), self.branch.config.first_block)


def _repeated(values: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Values (B, N, D) as (k B, N, D) of the shape of the tokens."""
    if shape[0] % values.shape[0] or tuple(values.shape[1:]) != tuple(shape[1:]):
        raise ValueError(
            "the coarse latent must be aligned with the DiT tokens: expected (B, N, D) = "
            f"{tuple(values.shape)} or a multiple of B, got {tuple(shape)}. "
            "Give a coarse latent of the size of the noisy latent."
        )
    return values.repeat(shape[0] // values.shape[0], 1, 1)
