"""Run a block piece by piece if that is faster: on a CPU, without gradients.

A block makes some ten times as much of its tokens as they are themselves. Pieces whose share fits in the processor's
cache run faster than all tokens at once, and take less memory. Tokens in different frames do not see each other in a
spatial block, nor do tokens at different places in a temporal one, so the result is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from arlon.attention import automatic
from arlon.grids import ceil_div
from arlon.models.layers import Modulation, STDiT3Block, TextKeys, TextTokens

CHUNK_VALUES = 400_000
"""Most values of the tokens in a piece (tokens times width): 1.6 MB in float32."""

Piece = tuple[slice, slice, slice]
"""Samples, frames and places of tokens (B, nT, S, D)."""


def run_block(
    block: STDiT3Block,
    x: Tensor,
    time: Tensor,
    text: TextTokens | TextKeys,
    *,
    rotation: Tensor | None = None,
    inject: Callable[[Tensor], Tensor] | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """Apply a block, in pieces if that is faster; arguments and result as of `STDiT3Block.forward`."""
    pieces = plan_pieces(x, temporal=block.temporal) if _runs_alone(block) else []
    if len(pieces) <= 1:
        return block(x, time, text, rotation=rotation, inject=inject, keep=keep)
    # Keys of the text and the modulation are the same for all pieces, so they are computed once.
    keys = text if isinstance(text, TextKeys) else block.read_text(text)
    modulation = block.modulation(time, keep)

    def attend(at: Piece) -> Tensor:
        return block.attend(x[at], _modulation_at(modulation, at), rotation)

    def finish(y: Tensor, at: Piece) -> Tensor:
        return block.finish(x[at], y, _modulation_at(modulation, at), keys.of(at[0]))

    if inject is None:
        return _collect(x.shape, pieces, lambda at: finish(attend(at), at))
    # An injection sees all tokens at once, so the two halves of the block run one after the other.
    y = inject(_collect(x.shape, pieces, attend).flatten(1, 2)).view(x.shape)
    return _collect(x.shape, pieces, lambda at: finish(y[at], at))


def _runs_alone(block: STDiT3Block) -> bool:
    """Whether no code outside counts on calls with all tokens: no hooks, no chosen kernels, no sharded weights."""
    has_hooks = any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())
    has_own_kernel = any(layer.kernel is not automatic for layer in (block.attn, block.cross_attn))
    return type(block) is STDiT3Block and not has_hooks and not has_own_kernel


def plan_pieces(x: Tensor, *, temporal: bool) -> list[Piece]:
    """Pieces of tokens that can run through a block one after the other.

    Args:
        x: Tokens, (B, nT, S, D).
        temporal: Whether tokens attend along time: pieces are then groups of places, otherwise groups of frames.

    Returns:
        Pieces of one sample each; a single piece of everything if x is small, off the CPU, or needs gradients.
    """
    everything = slice(None)
    if torch.is_grad_enabled() or x.device.type != "cpu" or x[:1].numel() <= CHUNK_VALUES:
        return [(everything, everything, everything)]
    rows, length = (x.shape[2], x.shape[1]) if temporal else (x.shape[1], x.shape[2])
    count = min(rows, ceil_div(rows * length * x.shape[3], CHUNK_VALUES))
    parts = [slice(*ends) for ends in pairwise(rows * i // count for i in range(count + 1))]
    return [
        (slice(b, b + 1), everything, part) if temporal else (slice(b, b + 1), part, everything)
        for b in range(x.shape[0])
        for part in parts
    ]


def _modulation_at(modulation: Modulation, at: Piece) -> Modulation:
    """The part of a modulation that belongs to a piece; one that holds for all frames has one frame."""
    samples, frames, _ = at
    return Modulation(*(m[samples, frames if m.shape[1] > 1 else slice(None)] for m in modulation))


def _collect(shape: torch.Size, pieces: list[Piece], run: Callable[[Piece], Tensor]) -> Tensor:
    """Results of all pieces at their places in one tensor."""
    first = run(pieces[0])
    out = first.new_empty(shape)  # the dtype of the results: under autocast it is not that of x
    out[pieces[0]] = first
    for at in pieces[1:]:
        out[at] = run(at)
    return out
