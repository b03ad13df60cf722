"""Layers whose attention kernel can be chosen, and context managers that change it for a while."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from arlon.attention.kernels import KERNELS, Kernel, attention_weights, automatic


class AttentionLayer(nn.Module):
    """Base class of modules that attend through `self.kernel`.

    Attributes:
        num_heads: Attention heads.
        kernel: Function that attends, see `arlon.attention.kernels.Kernel`. It is no part of the state dict.
    """

    num_heads: int

    def __init__(self) -> None:
        super().__init__()
        self.kernel: Kernel = automatic


def attention_layers(model: nn.Module, layers: str = "*") -> dict[str, AttentionLayer]:
    """Attention layers of a model by their module path.

    Args:
        model: Any module.
        layers: Pattern of module paths, such as "spatial_blocks.*.attn" or "*"; a path above them stands for all below.

    Raises:
        ValueError: If no attention layer matches; the message lists some that there are.
    """
    known = {name: module for name, module in model.named_modules() if isinstance(module, AttentionLayer)}
    matching = {
        name: module
        for name, module in known.items()
        if fnmatch.fnmatchcase(name, layers) or fnmatch.fnmatchcase(name, f"{layers}.*")
    }
    if not matching:
        examples = ", ".join(list(known)[:4]) or "none"
        raise ValueError(f"no attention layer of {type(model).__name__} matches {layers!r}: it has {examples} ...")
    return matching


def set_kernel(model: nn.Module, kernel: str | Kernel, layers: str = "*") -> list[str]:
    """Choose the attention kernel of some layers.

    Args:
        model: Any module.
        kernel: Name of a registered kernel, or a function like one.
        layers: Pattern of module paths, as for `attention_layers`.

    Returns:
        Module paths of the layers that attend with it now.

    Raises:
        ValueError: If the kernel is unknown or no layer matches.
    """
    chosen = KERNELS[kernel] if isinstance(kernel, str) else kernel
    found = attention_layers(model, layers)
    for layer in found.values():
        layer.kernel = chosen
    return list(found)


@contextmanager
def wrapped_kernels(model: nn.Module, wrap: Callable[[str, Kernel], Kernel], layers: str = "*") -> Iterator[None]:
    """Replace the kernels of some layers inside a `with` block, and put the old ones back at its end.

    Args:
        model: Any module.
        wrap: Makes the new kernel from the module path of a layer and its present kernel.
        layers: Pattern of module paths, as for `attention_layers`.

    Raises:
        ValueError: If no layer matches.
    """
    found = attention_layers(model, layers)
    before = {name: layer.kernel for name, layer in found.items()}
    for name, layer in found.items():
        layer.kernel = wrap(name, layer.kernel)
    try:
        yield
    finally:
        for name, layer in found.items():
            layer.kernel = before[name]


@contextmanager
def attention_maps(model: nn.Module, layers: str = "*") -> Iterator[dict[str, list[Tensor]]]:
    """Record the attention maps of some layers inside a `with` block; what the model computes does not change.

    Args:
        model: Any module.
        layers: Pattern of module paths, as for `attention_layers`. A map is large: name few layers.

    Yields:
        By module path, one map (rows, heads, n, m) float32 on the CPU for every call of the layer. Rows are what is
        attended in apart: frames in a spatial layer, places in a temporal one, samples in a cross-attention.
    """
    maps: dict[str, list[Tensor]] = {name: [] for name in attention_layers(model, layers)}
    heads = {name: layer.num_heads for name, layer in attention_layers(model, layers).items()}

    def recording(name: str, kernel: Kernel) -> Kernel:
        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
            weights = attention_weights(q.detach(), k.detach(), mask).cpu()
            # Batches of temporal attention reach the kernel with places and heads in one axis: take them apart.
            maps[name].append(weights.unflatten(1, (-1, heads[name])).flatten(0, 1))
            return kernel(q, k, v, mask)

        return attend

    with wrapped_kernels(model, recording, layers):
        yield maps
