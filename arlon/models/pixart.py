"""PixArt-Sigma as the start of an STDiT3: its blocks, made for pictures, become the spatial blocks.

Source: Open-Sora v1.2, whose training began with PixArt-Sigma (arXiv:2403.04692). What that does not have stays fresh:
temporal blocks, frame rate, rotary frequencies, norms of queries and keys. Fresh temporal blocks change nothing, so the
new model reads one frame as PixArt-Sigma does, but for those norms and for positions, which are not stored.

PixArt-Sigma predicts noise, an STDiT3 the way from noise to data. As in the original, the last layer is taken as it
is, and training turns it.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from arlon.errors import CheckpointError, one_line, shorten_list
from arlon.models.stdit import STDiT3
from arlon.stored_form import READ_PRECISIONS

SUFFIXES = (".safetensors", ".pth", ".pt")
WRAPPERS = ("state_dict", "state_dict_ema")
"""Keys that the weights of a training checkpoint lie under, beside the state of its optimizer; the first counts."""
DROPPED = "pos_embed"
"""The table of positions: an STDiT3 computes them."""
NULL_CAPTION = "y_embedder.y_embedding"
FLOATS = frozenset(getattr(torch, name) for name in READ_PRECISIONS.values())
_FRESH = re.compile(r"temporal_blocks\.|fps_embedder\.|rope\.|spatial_blocks\.\d+\.attn\.[qk]_norm\.")
"""Tensors of an STDiT3 that PixArt-Sigma does not have."""


@dataclass(frozen=True)
class LoadedPixArt:
    """Names of the tensors of an STDiT3 after `load_pixart`."""

    loaded: tuple[str, ...]
    """Those that came from the checkpoint."""
    fresh: tuple[str, ...]
    """Those that are as they were."""


def load_pixart(model: STDiT3, path: str | Path) -> LoadedPixArt:
    """Put the weights of PixArt-Sigma into an STDiT3, in place; all is checked before anything is changed.

    Args:
        model: A fresh model of the same width, depth and patches, with `pred_sigma`.
        path: A checkpoint as its authors write them, such as PixArt-Sigma-XL-2-2K-MS.pth, or its tensors as
            safetensors. Nothing in it is executed.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is damaged or holds more than tensors, or if tensors are missing, unknown or of
            another shape.
    """
    weights = map_weights(read_weights(path), null_tokens=model.config.model_max_length)
    state = model.state_dict()
    missing = [name for name in state if name not in weights and not _FRESH.match(name)]
    unknown = [name for name in weights if name not in state]
    wrong = [
        f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected floating-point {tuple(state[name].shape)}"
        for name, tensor in weights.items()
        if name in state and (tensor.shape != state[name].shape or tensor.dtype not in FLOATS)
    ]
    problems = [
        f"{what} tensors, {len(names)}: {shorten_list(names)}"
        for what, names in (("lacks", missing), ("has unknown", unknown), ("has unfit", wrong))
        if names
    ]
    if any(name.startswith("transformer_blocks.") for name in unknown):
        problems = ["is in the layout of diffusers; expected that of its authors, as in PixArt-Sigma-XL-2-2K-MS.pth"]
    if problems:
        raise CheckpointError("\n".join(f"{str(path)!r}, as an STDiT3, {problem}" for problem in problems))
    model.load_state_dict(weights, strict=False)
    return LoadedPixArt(loaded=tuple(weights), fresh=tuple(name for name in state if name not in weights))


def map_weights(weights: Mapping[str, Tensor], *, null_tokens: int) -> dict[str, Tensor]:
    """Tensors of PixArt-Sigma under the names and in the shapes of an STDiT3.

    Args:
        weights: Its state dict. Null captions (n, E) may have any n: they are cut, or their last row is repeated.
        null_tokens: Rows that the null caption gets.
    """
    mapped = {re.sub(r"^blocks\.", "spatial_blocks.", name): tensor for name, tensor in weights.items()}
    mapped.pop(DROPPED, None)
    patches = mapped.get("x_embedder.proj.weight")
    if patches is not None and patches.ndim == 4:
        mapped["x_embedder.proj.weight"] = patches.unsqueeze(2)  # (D, C, p, p) -> (D, C, 1, p, p)
    null = mapped.get(NULL_CAPTION)
    if null is not None and null.ndim == 2 and len(null):
        rows = torch.arange(null_tokens).clamp(max=len(null) - 1)
        mapped[NULL_CAPTION] = null[rows]
    return mapped


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint file, `.safetensors`, `.pth` or `.pt`, which may lie under one of `WRAPPERS`.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is damaged, or holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}: expected a checkpoint of PixArt-Sigma ({', '.join(SUFFIXES)})")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        values = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        reason = one_line(error, 120)
        raise CheckpointError(
            f"{str(path)!r} is damaged, or holds more than tensors, and is not loaded ({reason}): get it again, or "
            "store its tensors as safetensors"
        ) from error
    wrapper = next((key for key in WRAPPERS if isinstance(values, Mapping) and key in values), None)
    weights = values if wrapper is None else values[wrapper]
    if not isinstance(weights, Mapping) or not _are_tensors(weights.values()):
        raise CheckpointError(
            f"{str(path)!r} holds no state dict: expected names and tensors, alone or under {' or '.join(WRAPPERS)}"
        )
    return dict(weights)


def _are_tensors(values: Iterable[object]) -> bool:
    return all(isinstance(value, Tensor) for value in values)
