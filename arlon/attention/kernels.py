"""Attention kernels: softmax(q k^T / sqrt(d)) v, computed in different ways.

A kernel is a function (q, k, v, mask) -> output. `KERNELS` holds those that can be chosen by name.

Dimension key
    n  queries    m  keys    d  width of a head    ...  any leading axes, such as rows and heads
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from arlon.plugins import Registry

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(q (..., n, d), k (..., m, d), v (..., m, e), mask) -> (..., n, e).

The mask broadcasts to (..., n, m): bool (True = the query may see the key) or additive; None: it sees every key."""

KERNELS: Registry[Kernel] = Registry("attention kernel")

MAX_SCORES_KEYS = 1024
"""Most keys for which `automatic` writes the scores out: above, they would not fit in memory."""


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax weights (..., n, m) in float32: the attention map."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.float().softmax(dim=-1)


@KERNELS.register("sdpa")
def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """PyTorch's fused attention, which picks an implementation by device, precision and shape."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@KERNELS.register("written_out")
def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scores, softmax and weighted sum as three steps; all scores are in memory at once."""
    return attention_weights(q, k, mask).to(v.dtype) @ v


@KERNELS.register("auto")
def automatic(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The fastest of the two above for the inputs.

    On a CPU the backward pass of the fused kernel in bfloat16 is up to 12 times slower than that of the three steps
    (many short rows, measured in docs/log.md), so training there takes the steps.
    """
    trains_on_cpu = q.requires_grad and q.device.type == "cpu" and q.dtype == torch.bfloat16
    return (written_out if trains_on_cpu and k.shape[-2] <= MAX_SCORES_KEYS else sdpa)(q, k, v, mask)
