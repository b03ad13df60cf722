"""The designs of semantic injection that the adaptive norm is compared with; their place and features are its own.

    MLP adapter    y' = y + MLP_i(c)                                         y: output of the temporal self-attention
    ControlNet     h  = x + Linear(c),  h = temporal_i(spatial_i(h)),  y' = y + Linear_i(h)

c are the coarse features behind adapters and uncertainty, x the tokens that the blocks of the base begin with,
spatial_i and temporal_i trained copies of its blocks. The last layer of an MLP and the linear layers of the ControlNet
start at zero.

Source: ARLON, arXiv:2410.20502 (ablation of the injection), names them without formulas. ControlNet: arXiv:2302.05543;
there the copy adds to the skip connections, here to where the adaptive norm acts, so that only the designs differ.

Dimension key
    B  batch    N  DiT tokens, in t, h, w order    nT S  the same, by frame    D  width    k  repeats of B (guidance)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from arlon.models.layers import Mlp, STDiT3Block
from arlon.models.stdit import BlockInputs, Inject, STDiT3


@dataclass(frozen=True)
class Residuals:
    """What is added in some temporal blocks: call it as (i, y) -> y.

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


class MlpAdapters(nn.Module):
    """An MLP a block, of the coarse features alone."""

    def __init__(self, dim: int, first_block: int, num_blocks: int) -> None:
        super().__init__()
        self.first_block = first_block
        self.blocks = nn.ModuleList(Mlp(dim, dim, dim) for _ in range(num_blocks))

    def forward(self, c: Tensor) -> Residuals:
        """Residuals of all blocks from features c (B, N, D)."""
        return Residuals(tuple(mlp(c) for mlp in self.blocks), self.first_block)

    def last_linears(self) -> Iterable[nn.Linear]:
        """The layers whose outputs enter the base."""
        return [mlp.fc2 for mlp in self.blocks]


class ControlBranch(nn.Module):
    """A trained copy of some blocks of the base, which sees the noisy tokens, the text and the coarse features."""

    def __init__(
        self, dim: int, num_heads: int, *, first_block: int, num_blocks: int, mlp_ratio: float, qk_norm: bool
    ) -> None:
        super().__init__()
        self.first_block = first_block
        block = partial(STDiT3Block, dim, num_heads, mlp_ratio=mlp_ratio, qk_norm=qk_norm)
        self.enter = nn.Linear(dim, dim)
        self.spatial_blocks = nn.ModuleList(block(temporal=False) for _ in range(num_blocks))
        self.temporal_blocks = nn.ModuleList(block(temporal=True) for _ in range(num_blocks))
        self.leave = nn.ModuleList(nn.Linear(dim, dim) for _ in range(num_blocks))
        for copy in (*self.spatial_blocks, *self.temporal_blocks):
            nn.init.normal_(copy.scale_shift_table, std=dim**-0.5)

    @torch.no_grad()
    def copy_blocks(self, dit: STDiT3) -> None:
        """Take the weights of the blocks of a base.

        Raises:
            ValueError: If it has other blocks, or too few.
        """
        stop = self.first_block + len(self.leave)
        if stop > len(dit.temporal_blocks):
            raise ValueError(
                f"a copy of blocks {self.first_block} to {stop - 1} needs a DiT of {stop} blocks at least, got "
                f"{len(dit.temporal_blocks)}: lower num_blocks or first_block"
            )
        for ours, theirs in ((self.spatial_blocks, dit.spatial_blocks), (self.temporal_blocks, dit.temporal_blocks)):
            try:
                ours.load_state_dict(theirs[self.first_block : stop].state_dict())
            except RuntimeError as error:
                raise ValueError(
                    "the injection must have dim, num_heads, mlp_ratio and qk_norm of the DiT whose blocks it copies: "
                    f"{error}"
                ) from error

    def with_features(self, c: Tensor) -> Controlled:
        """The branch for features c (B, N, D)."""
        return Controlled(self, self.enter(c))

    def last_linears(self) -> Iterable[nn.Linear]:
        """The layers through which features enter the branch, and the branch the base."""
        return [self.enter, *self.leave]


@dataclass(frozen=True)
class Controlled:
    """A branch and its features entered, (B, N, D); STDiT3 starts it in every pass."""

    branch: ControlBranch
    entered: Tensor

    def start(self, inputs: BlockInputs) -> Inject:
        """Run the branch on what the blocks of the base begin with.

        Raises:
            ValueError: If batch or tokens do not fit the coarse latent.
        """
        x = inputs.tokens
        flat = (x.shape[0], x.shape[1] * x.shape[2], x.shape[3])
        h = x + _repeated(self.entered, flat).view(x.shape)
        values = []
        blocks = zip(self.branch.spatial_blocks, self.branch.temporal_blocks, self.branch.leave, strict=True)
        for spatial, temporal, leave in blocks:
            h = spatial(h, inputs.time, inputs.text, inputs.text_mask)
            h = temporal(h, inputs.time, inputs.text, inputs.text_mask, rotation=inputs.rotation)
            values.append(leave(h.flatten(1, 2)))
        return Residuals(tuple(values), self.branch.first_block)


def _repeated(values: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Values (B, N, D) as (k B, N, D) of the shape of the tokens."""
    if shape[0] % values.shape[0] or tuple(values.shape[1:]) != tuple(shape[1:]):
        raise ValueError(
            "the coarse latent must be aligned with the DiT tokens: expected (B, N, D) = "
            f"{tuple(values.shape)} or a multiple of B, got {tuple(shape)}. "
            "Give a coarse latent of the size of the noisy latent."
        )
    return values.repeat(shape[0] // values.shape[0], 1, 1)
