"""Layers of STDiT3: attention, MLP, blocks. Names of parameters are those of the released weights.

Source: Open-Sora v1.2 (PixArt blocks, rotary time attention, RMS norm of queries and keys).

Positions, times and rotations are computed in float32 whatever the precision of the weights.

Dimension key
    B  batch    T H W  latent grid    nT nH nW  patch grid    S  nH * nW    N  nT * S    L  text tokens
    D  width    A  heads    d  width of a head, D / A    E  width of text features    M  rows attended in
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arlon.grids import ceil_div
from arlon.models.embeddings import ROPE_BASE

NORM_EPS = 1e-6
LONGEST_WRITTEN_OUT = 1024
"""Keys up to which `attention` may hold all scores in memory."""
CHUNK_VALUES = 400_000
"""Values of the tokens that pass a block together on a CPU without gradients: all that a block makes of them, some ten
times as much, stays in the cache."""
GELU_SLOPE = 2 * math.sqrt(2 / math.pi)
GELU_CUBE = 0.044715
GELU_VALUES = 2**17
"""Values that `gelu_` passes over together."""
SHORT = 2**14
"""Values up to which a call costs more than the work in it."""


Piece = tuple[slice, slice, slice]
"""Samples, frames and places of tokens (B, nT, S, D)."""


def layer_norm(x: Tensor) -> Tensor:
    """Normalise the last axis of x (..., D) to mean 0 and variance 1, without affine parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of q (..., n, d) over k, v (..., m, d), scaled by 1 / sqrt(d).

    On a CPU the backward pass of PyTorch's fused kernel in bfloat16 is up to 12 times slower than the three steps
    written out (many short rows, measured in docs/log.md), so training there takes the steps.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        mask: Broadcastable to (..., n, m): bool (True = may see) or additive. None: sees all keys.
    """
    short = k.shape[-2] <= LONGEST_WRITTEN_OUT
    if not (q.requires_grad and short and q.device.type == "cpu" and q.dtype == torch.bfloat16):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.float().softmax(dim=-1).to(v.dtype) @ v


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive norm: LN(x) (1 + scale) + shift; shift and scale broadcast against x (..., D)."""
    one_vector = scale.numel() == shift.numel() == x.shape[-1] and scale.dtype == shift.dtype == x.dtype
    if one_vector and not torch.is_grad_enabled():  # the same in one pass
        return F.layer_norm(x, x.shape[-1:], (1 + scale).flatten(), shift.flatten(), eps=NORM_EPS)
    return torch.addcmul(shift, layer_norm(x), 1 + scale)


def gelu_(x: Tensor) -> Tensor:
    """Tanh-GELU in place, without gradients: x (1 + tanh u) / 2 = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).

    In float32 on a CPU four simple passes over what is in the cache take half the time of PyTorch's kernel, whose
    tanh is slow. Elsewhere that kernel is taken.

    Args:
        x: Values, (..., D).

    Returns:
        x itself.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.numel() <= SHORT or not x.is_contiguous():
        return torch.ops.aten.gelu_(x, approximate="tanh")
    slope = x.new_tensor(GELU_SLOPE)
    for part in x.view(-1).split(GELU_VALUES):
        twice_u = torch.addcmul(slope, part, part, value=GELU_SLOPE * GELU_CUBE).mul_(part)
        part.mul_(twice_u.sigmoid_())
    return x


class Mlp(nn.Module):
    """Linear, tanh-GELU, Linear."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in_dim) to (..., out_dim)."""
        hidden = self.fc1(x)
        if torch.is_grad_enabled():
            return self.fc2(F.gelu(hidden, approximate="tanh"))
        return self.fc2(gelu_(hidden))  # in place: it is the widest tensor of a block


class CaptionEmbedder(nn.Module):
    """Text features to the width of the model, and the null caption that stands for "no prompt".

    `y_embedding` is a buffer: it is stored with the weights but not trained.
    """

    def __init__(self, in_dim: int, dim: int, max_length: int) -> None:
        super().__init__()
        self.register_buffer("y_embedding", torch.randn(max_length, in_dim) / math.sqrt(in_dim))
        self.y_proj = Mlp(in_dim, dim, dim)

    def forward(self, text: Tensor) -> Tensor:
        """Project text (B, L, E) to (B, L, D)."""
        return self.y_proj(text)


class RotaryTime(nn.Module):
    """Angles of the temporal attention: latent frame p turns the pair i of a head by p 10000^(-2i/d).

    `freqs` is a parameter without gradient because released weights hold it. It stays in float32 when the
    module is converted: rounded to bfloat16, a rotated component would be off by up to 0.17 after 120 frames.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        self.freqs = nn.Parameter(1.0 / ROPE_BASE**exponent, requires_grad=False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> RotaryTime:
        before = self.freqs.detach()
        super()._apply(fn, recurse)
        if self.freqs.dtype != before.dtype and not before.is_meta:
            self.freqs.data = before.to(self.freqs.device)
        return self

    def forward(self, num_frames: int) -> Tensor:
        """Rotations of frames 0..num_frames-1 as unit complex64 numbers, (num_frames, 1, 1, d / 2)."""
        places = torch.arange(num_frames, device=self.freqs.device, dtype=torch.float32)
        angles = torch.outer(places, self.freqs.float())[:, None, None, :]
        return torch.complex(angles.cos(), angles.sin())


def rotate_pairs(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn the adjacent pairs (a, b) of x (..., d) to (a cos - b sin, b cos + a sin) in float32.

    Args:
        x: Values, (..., d), float32.
        rotation: Unit complex numbers that broadcast against (..., d / 2).
    """
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2)


class SelfAttention(nn.Module):
    """Attention within a frame, or of every place along time, with RMS-normalised queries and keys.

    Tokens are never brought in another order: heads and places are views of what the Linear wrote.
    """

    def __init__(self, dim: int, num_heads: int, qk_norm: bool, *, temporal: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.temporal = temporal
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.q_norm = nn.RMSNorm(dim // num_heads, eps=NORM_EPS) if qk_norm else None
        self.k_norm = nn.RMSNorm(dim // num_heads, eps=NORM_EPS) if qk_norm else None

    def forward(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        """Attend over S, or over nT if temporal.

        Args:
            x: Tokens, (B, nT, S, D).
            rotation: Turns queries and keys after the norm, (nT, 1, 1, d / 2); see `RotaryTime`.

        Returns:
            (B, nT, S, D).
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)  # (B, nT, S, A, d) each
        q, k = (self._turn(one, norm, rotation).to(v.dtype) for one, norm in ((q, self.q_norm), (k, self.k_norm)))
        if self.temporal and x.shape[0] == 1 and not torch.is_grad_enabled():
            q, k, v = (one[0].permute(1, 2, 0, 3) for one in (q, k, v))  # (S, A, nT, d)
            return self.proj(attention(q, k, v).permute(2, 0, 1, 3).reshape(x.shape))
        # (B nT, A, S, d), or (B, S A, nT, d): to the kernel, all places of the temporal attention are heads
        fold = (2, 3) if self.temporal else (0, 1)
        q, k, v = (one.flatten(*fold).transpose(1, 2) for one in (q, k, v))
        return self.proj(attention(q, k, v).transpose(1, 2).reshape(x.shape))

    @staticmethod
    def _turn(x: Tensor, norm: nn.RMSNorm | None, rotation: Tensor | None) -> Tensor:
        """RMS norm of x (B, nT, S, A, d) over d, then its rotation, in float32; in place without gradients."""
        if x.dtype == torch.float32 and not torch.is_grad_enabled():
            return _turn_in_place(x, norm, rotation)
        if norm is not None:
            x = x.float()
            square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square()
            x = x * (torch.rsqrt(square / x.shape[-1] + NORM_EPS) * norm.weight.float())
        return x if rotation is None else rotate_pairs(x.float(), rotation)


def _turn_in_place(x: Tensor, norm: nn.RMSNorm | None, rotation: Tensor | None) -> Tensor:
    """What `SelfAttention._turn` does, of a float32 view that nobody else reads."""
    if norm is not None:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        x.mul_(mean_square.add_(NORM_EPS).rsqrt_())
        x.flatten(-2).mul_(norm.weight.float().repeat(x.shape[-2]))  # one long row is faster than many short ones
    if rotation is not None:
        torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(rotation)
    return x


@dataclass(frozen=True)
class TextKeys:
    """What a cross-attention reads of a text. It does not depend on what attends, so it serves every step."""

    keys: Tensor
    """(B, A, L, d)."""
    values: Tensor
    """(B, A, L, d); zero for a sample without text."""
    mask: Tensor | None
    """True where a key counts, (B, 1, 1, L). All count if None."""

    def of(self, samples: slice) -> TextKeys:
        """Those of some samples."""
        return TextKeys(*(part if part is None else part[samples] for part in (self.keys, self.values, self.mask)))


class CrossAttention(nn.Module):
    """Attention of the tokens to the text; every sample sees only its own kept text tokens."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def read(self, text: Tensor, text_mask: Tensor | None = None) -> TextKeys:
        """Compute keys and values.

        Args:
            text: Projected text, (B, L, D).
            text_mask: True where a text token counts, (B, L). All count if None. A sample without any text
                token attends to nothing: its values are zero.
        """
        keys_values = self.kv_linear(text).unflatten(-1, (2, self.num_heads, -1))
        keys, values = keys_values.transpose(1, 3).unbind(2)
        if text_mask is None:
            return TextKeys(keys, values, None)
        has_text = text_mask.any(dim=1)[:, None]
        mask = text_mask | ~has_text  # a row without any key would be 0 / 0
        return TextKeys(keys, values * has_text[:, :, None, None], mask[:, None, None])

    def forward(self, x: Tensor, text: Tensor | TextKeys, text_mask: Tensor | None = None) -> Tensor:
        """Attend from tokens x (B, N, D) to a text, given as for `read` or as read before: (B, N, D)."""
        if isinstance(text, Tensor):
            text = self.read(text, text_mask)
        q = self.q_linear(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, A, N, d)
        y = attention(q, text.keys, text.values, text.mask)
        return self.proj(y.transpose(1, 2).flatten(2))


class STDiT3Block(nn.Module):
    """Self-attention within a frame or along time, cross-attention to text, MLP; gated by the flow time."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        qk_norm: bool = True,
        temporal: bool = False,
    ) -> None:
        super().__init__()
        self.temporal = temporal
        self.scale_shift_table = nn.Parameter(torch.empty(6, dim))
        self.attn = SelfAttention(dim, num_heads, qk_norm, temporal=temporal)
        self.cross_attn = CrossAttention(dim, num_heads)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), dim)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        text: Tensor | TextKeys,
        text_mask: Tensor | None = None,
        *,
        rotation: Tensor | None = None,
        inject: Callable[[Tensor], Tensor] | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Apply the block.

        Args:
            x: Tokens, (B, nT, S, D).
            time: Six vectors of the flow time, (B, nT or 1, 6, D).
            text: Projected text, (B, L, D), or what `cross_attn.read` made of it.
            text_mask: True where a text token counts, (B, L).
            rotation: Rotations of the frames for the temporal attention; see `RotaryTime`.
            inject: Replaces the output of the self-attention, (B, N, D) -> (B, N, D), before its gate.
            keep: Factors of stochastic depth for the two gated branches, (2, B); 1 if None.

        Returns:
            (B, nT, S, D).
        """
        six = (self.scale_shift_table + time).unsqueeze(2).unbind(-2)  # (B, nT or 1, 1, D) each
        if keep is not None:
            factors = (1, 1, keep[0].view(-1, 1, 1, 1), 1, 1, keep[1].view(-1, 1, 1, 1))
            six = tuple(one * factor for one, factor in zip(six, factors, strict=True))
        if isinstance(text, Tensor):
            text = self.cross_attn.read(text, text_mask)
        attend = partial(self._attend, x, six, rotation)
        go_on = partial(self._go_on, x, six, text)
        pieces = self._pieces(x)
        if inject is None:
            return _join(x, pieces, lambda at: go_on(attend(at), at))
        y = _join(x, pieces, attend)
        y = inject(y.flatten(1, 2)).view(x.shape)
        return _join(x, pieces, lambda at: go_on(y[at], at))

    def _attend(self, x: Tensor, six: Sequence[Tensor], rotation: Tensor | None, at: Piece) -> Tensor:
        """Output of the self-attention for a piece of x."""
        shift, scale, *_ = _vectors(six, at)
        return self.attn(modulate(x[at], shift, scale), rotation)

    def _go_on(self, x: Tensor, six: Sequence[Tensor], text: TextKeys, y: Tensor, at: Piece) -> Tensor:
        """What the block makes of a piece of x whose self-attention gave y."""
        _, _, gate_a, shift, scale, gate_m = _vectors(six, at)
        x = torch.addcmul(x[at], gate_a, y)
        crossed = self.cross_attn(x.flatten(1, 2), text.of(at[0])).view(x.shape)
        if torch.is_grad_enabled():
            x = x + crossed
            return torch.addcmul(x, gate_m, self.mlp(modulate(x, shift, scale)))
        x += crossed
        return x.addcmul_(gate_m, self.mlp(modulate(x, shift, scale)))

    def _pieces(self, x: Tensor) -> list[Piece]:
        """Pieces of x (B, nT, S, D) that do not see each other: some frames, or places if temporal, of one sample.

        All of x is one piece where it is small, off the CPU, and with gradients.
        """
        everything = slice(None)
        if torch.is_grad_enabled() or x.device.type != "cpu" or x[:1].numel() <= CHUNK_VALUES:
            return [(everything, everything, everything)]
        rows, length = (x.shape[2], x.shape[1]) if self.temporal else (x.shape[1], x.shape[2])
        count = min(rows, ceil_div(rows * length * x.shape[3], CHUNK_VALUES))
        starts = [rows * i // count for i in range(count + 1)]
        parts = [slice(*ends) for ends in pairwise(starts)]
        return [
            (slice(b, b + 1), everything, part) if self.temporal else (slice(b, b + 1), part, everything)
            for b in range(x.shape[0])
            for part in parts
        ]


def _vectors(six: Sequence[Tensor], at: Piece) -> list[Tensor]:
    """The six vectors of the flow time, (B, nT or 1, 1, D) each, that belong to a piece."""
    samples, frames, _ = at
    return [one[samples, frames if one.shape[1] > 1 else slice(None)] for one in six]


def _join(x: Tensor, pieces: list[Piece], run: Callable[[Piece], Tensor]) -> Tensor:
    """Results of all pieces in the places that the pieces have in x."""
    if len(pieces) == 1:
        return run(pieces[0])
    first = run(pieces[0])
    out = first.new_empty(x.shape)
    out[pieces[0]] = first
    for at in pieces[1:]:
        out[at] = run(at)
    return out


class FinalLayer(nn.Module):
    """Adaptive norm by the embedded time, then a Linear to the values of a patch."""

    def __init__(self, dim: int, num_values: int) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.empty(2, dim))
        self.linear = nn.Linear(dim, num_values)

    def forward(self, x: Tensor, time: Tensor, clean_time: Tensor | None, frame_mask: Tensor | None) -> Tensor:
        """Map tokens (B, nT, S, D) to patches (B, nT, S, patch values).

        Released weights were trained with clean frames normalised twice: by the noisy time, then by time 0.

        Args:
            x: Tokens, (B, nT, S, D).
            time: Embedded flow time, (B, D).
            clean_time: Embedded time 0, (B, D); needed with a frame mask.
            frame_mask: True = noisy frame, (B, nT).
        """
        out = self._modulate(x, time)
        if frame_mask is not None and clean_time is not None:
            out = torch.where(frame_mask[:, :, None, None], out, self._modulate(out, clean_time))
        return self.linear(out)

    def _modulate(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + time[:, None])[:, None, None].unbind(-2)  # (B, 1, 1, D) each
        return modulate(x, shift, scale)
