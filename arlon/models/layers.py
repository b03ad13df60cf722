"""Layers of STDiT3: attention, MLP, blocks. Names of parameters are those of the released weights.

Source: Open-Sora v1.2 (PixArt blocks, rotary time attention, RMS norm of queries and keys).

Positions, times and rotations are computed in float32 whatever the precision of the weights.

Dimension key
    B  batch    T H W  latent grid    nT nH nW  patch grid    S  nH * nW    N  nT * S    L  text tokens
    D  width    A  heads    d  width of a head, D / A    E  width of text features    M  rows attended in
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arlon.attention import AttentionLayer
from arlon.models.embeddings import ROPE_BASE

NORM_EPS = 1e-6
GELU_SLOPE = 2 * math.sqrt(2 / math.pi)
GELU_CUBE = 0.044715
GELU_VALUES = 2**17
"""Values that `gelu_` passes over together."""
SHORT = 2**14
"""Values up to which a call costs more than the work in it."""


def layer_norm(x: Tensor) -> Tensor:
    """Normalise the last axis of x (..., D) to mean 0 and variance 1, without affine parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


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

    y_embedding: Tensor

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


class SelfAttention(AttentionLayer):
    """Attention within a frame, or of every place along time, with RMS-normalised queries and keys.

    Tokens keep their order in memory: heads, frames and places are views of what the Linear wrote.
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
        """Attend over the S tokens of each frame, or over the nT frames of each place if temporal.

        Args:
            x: Tokens, (B, nT, S, D).
            rotation: Turns queries and keys after the norm, (nT, 1, 1, d / 2); see `RotaryTime`.

        Returns:
            (B, nT, S, D).
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)  # (B, nT, S, A, d) each
        q = normalise_and_rotate(q, self.q_norm, rotation).to(v.dtype)
        k = normalise_and_rotate(k, self.k_norm, rotation).to(v.dtype)
        # One sample needs no fold: places become rows, heads stay heads.
        if self.temporal and x.shape[0] == 1 and not torch.is_grad_enabled():
            q, k, v = (one[0].permute(1, 2, 0, 3) for one in (q, k, v))  # (S, A, nT, d)
            return self.proj(self.kernel(q, k, v, None).permute(2, 0, 1, 3).reshape(x.shape))
        # Spatial: (B nT, A, S, d). Temporal: (B, S A, nT, d), since only (S, A), not (B, S), folds without a copy.
        fold = (2, 3) if self.temporal else (0, 1)
        q, k, v = (one.flatten(*fold).transpose(1, 2) for one in (q, k, v))
        return self.proj(self.kernel(q, k, v, None).transpose(1, 2).reshape(x.shape))


def normalise_and_rotate(x: Tensor, norm: nn.RMSNorm | None, rotation: Tensor | None) -> Tensor:
    """RMS norm over d, then the rotation of frames, in float32; without gradients a float32 x is overwritten.

    Args:
        x: Queries or keys, (B, nT, S, A, d).
        norm: RMS norm over d; None: none.
        rotation: Unit complex numbers (nT, 1, 1, d / 2); None: none.

    Returns:
        (B, nT, S, A, d), float32 if anything was applied.
    """
    if x.dtype == torch.float32 and not torch.is_grad_enabled():
        if norm is not None:
            # Squares through the norm: one pass, and no tensor of squares in memory.
            mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
            x.mul_(mean_square.add_(NORM_EPS).rsqrt_())
            # One multiplication of rows A d long is faster than one of rows d long.
            x.flatten(-2).mul_(norm.weight.float().repeat(x.shape[-2]))
        if rotation is not None:
            torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(rotation)
        return x
    if norm is not None:
        x = x.float()
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square()
        x = x * (torch.rsqrt(square / x.shape[-1] + NORM_EPS) * norm.weight.float())
    return x if rotation is None else rotate_pairs(x.float(), rotation)


@dataclass(frozen=True)
class TextTokens:
    """Projected text tokens, not yet turned into keys and values."""

    tokens: Tensor
    """(B, L, D)."""
    mask: Tensor | None
    """True where a token counts, (B, L). All count if None."""


@dataclass(frozen=True)
class TextKeys:
    """Keys and values that one cross-attention makes of a text; the same for every noisy latent and flow time."""

    keys: Tensor
    """(B, A, L, d)."""
    values: Tensor
    """(B, A, L, d); zero for a sample without text."""
    mask: Tensor | None
    """True where a key counts, (B, 1, 1, L). All count if None."""

    def of(self, samples: slice) -> TextKeys:
        """Keys and values of some samples of the batch."""
        mask = None if self.mask is None else self.mask[samples]
        return TextKeys(self.keys[samples], self.values[samples], mask)


class CrossAttention(AttentionLayer):
    """Attention of the tokens to the text; every sample sees only its own text tokens that count."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def read(self, text: TextTokens) -> TextKeys:
        """Compute keys and values. A sample without any text token attends to nothing: its values are zero."""
        keys_values = self.kv_linear(text.tokens).unflatten(-1, (2, self.num_heads, -1))
        keys, values = keys_values.transpose(1, 3).unbind(2)
        if text.mask is None:
            return TextKeys(keys, values, None)
        has_text = text.mask.any(dim=1)[:, None]
        mask = text.mask | ~has_text  # softmax over no key at all would be 0 / 0
        return TextKeys(keys, values * has_text[:, :, None, None], mask[:, None, None])

    def forward(self, x: Tensor, text: TextTokens | TextKeys) -> Tensor:
        """Attend from tokens x (B, N, D) to a text: (B, N, D)."""
        keys = text if isinstance(text, TextKeys) else self.read(text)
        q = self.q_linear(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, A, N, d)
        y = self.kernel(q, keys.keys, keys.values, keys.mask)
        return self.proj(y.transpose(1, 2).flatten(2))


class Modulation(NamedTuple):
    """Shift, scale and gate of the two branches of a block, (B, nT or 1, 1, D) each."""

    shift_attn: Tensor
    scale_attn: Tensor
    gate_attn: Tensor
    shift_mlp: Tensor
    scale_mlp: Tensor
    gate_mlp: Tensor


class STDiT3Block(nn.Module):
    """Self-attention within a frame or along time, cross-attention to text, MLP; modulated by the flow time.

    `forward` is `attend`, the injection, then `finish`; `arlon.models.chunking` runs the two halves piece by piece.
    """

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
        text: TextTokens | TextKeys,
        *,
        rotation: Tensor | None = None,
        inject: Callable[[Tensor], Tensor] | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Apply the block.

        Args:
            x: Tokens, (B, nT, S, D).
            time: Six vectors of the flow time, (B, nT or 1, 6, D).
            text: Projected text, or the keys and values that `cross_attn.read` made of it.
            rotation: Rotations of the frames for the temporal attention; see `RotaryTime`.
            inject: Replaces the output of the self-attention, (B, N, D) -> (B, N, D), before its gate.
            keep: Factors of stochastic depth for the two gated branches, (2, B); 1 if None.

        Returns:
            (B, nT, S, D).
        """
        modulation = self.modulation(time, keep)
        y = self.attend(x, modulation, rotation)
        if inject is not None:
            y = inject(y.flatten(1, 2)).view(x.shape)
        return self.finish(x, y, modulation, text)

    def modulation(self, time: Tensor, keep: Tensor | None = None) -> Modulation:
        """Modulation of the block from the flow time; arguments as of `forward`."""
        m = Modulation(*(self.scale_shift_table + time).unsqueeze(2).unbind(-2))
        if keep is None:
            return m
        attn, mlp = keep.view(2, -1, 1, 1, 1)
        return m._replace(gate_attn=m.gate_attn * attn, gate_mlp=m.gate_mlp * mlp)

    def read_text(self, text: TextTokens) -> TextKeys:
        """Keys and values of the cross-attention; they serve any number of passes."""
        return self.cross_attn.read(text)

    def attend(self, x: Tensor, m: Modulation, rotation: Tensor | None) -> Tensor:
        """Output of the self-attention, (B, nT, S, D)."""
        return self.attn(modulate(x, m.shift_attn, m.scale_attn), rotation)

    def finish(self, x: Tensor, y: Tensor, m: Modulation, text: TextTokens | TextKeys) -> Tensor:
        """Add the self-attention's output y to x, then apply cross-attention and MLP."""
        x = torch.addcmul(x, m.gate_attn, y)  # x + gate y
        x = x + self.cross_attn(x.flatten(1, 2), text).view(x.shape)
        return torch.addcmul(x, m.gate_mlp, self.mlp(modulate(x, m.shift_mlp, m.scale_mlp)))


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
