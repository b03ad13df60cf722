"""Interface of text encoders: features, protocol, config, and the registry of kinds.

A model folder names the kind of its encoder in `text_encoder/config.json`. Two kinds come with Arlon (see
`arlon.text.encoders`). Another package adds one with `register_text_encoder` in a plugin module (`arlon.plugins`),
which the command line and Ray workers find too.

Dimension key
    B  prompts    L  text tokens (`max_length`)    E  width of the encoder
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from arlon.errors import did_you_mean
from arlon.plugins import load_plugins

MINILM_DIM = 384


@dataclass(frozen=True)
class TextFeatures:
    """Features of prompts, as a text encoder gives them.

    Attributes:
        tokens: Last hidden state, (B, L, E), zero at padding.
        mask: (B, L) bool, True = real token. Every prompt has at least one.
        pooled: Mean over the real tokens, (B, E).
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> TextFeatures:
        """Some of the prompts; the batch axis stays, also for a single integer."""
        if isinstance(index, int):
            index = [index]
        return TextFeatures(self.tokens[index], self.mask[index], self.pooled[index])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TextFeatures:
        """Move the features to another device or floating-point type; the mask stays bool."""
        return TextFeatures(
            self.tokens.to(device=device, dtype=dtype),
            self.mask.to(device=device),
            self.pooled.to(device=device, dtype=dtype),
        )

    @staticmethod
    def cat(parts: Sequence[TextFeatures]) -> TextFeatures:
        """Join along the batch axis."""
        return TextFeatures(
            torch.cat([part.tokens for part in parts]),
            torch.cat([part.mask for part in parts]),
            torch.cat([part.pooled for part in parts]),
        )


class TextEncoder(Protocol):
    """Anything that turns prompts into features of a fixed width and length."""

    dim: int
    max_length: int

    def encode(self, prompts: Sequence[str], *, batch_size: int = 1) -> TextFeatures:
        """Encode B prompts; a prompt of more than `max_length` tokens is cut."""


TextEncoderLoader = Callable[..., TextEncoder]
"""Makes an encoder: called as `load(source, max_length=..., clean=..., device=..., dtype=...)` with the values of a
`TextEncoderConfig`; usually the class itself. If it has an attribute `network`, a function from the config to the class
and the config of a transformers network, then `arlon plan` and `arlon doctor` can tell what the encoder costs."""
_LOADERS: dict[str, TextEncoderLoader | str] = {
    "minilm": "arlon.text.encoders:MiniLMEncoder",
    "t5": "arlon.text.encoders:T5Encoder",
}


def register_text_encoder(kind: str, load: TextEncoderLoader) -> None:
    """Let models name a text encoder that is defined elsewhere.

    Args:
        kind: The name that `text_encoder/config.json` states as `kind`.
        load: The class of the encoder, or a function that makes one; see `TextEncoderLoader`.

    Raises:
        ValueError: If another encoder has that name.
    """
    if _LOADERS.get(kind, load) is not load:
        raise ValueError(f"there is a text encoder of the kind {kind!r} already: choose another name")
    _LOADERS[kind] = load


def text_encoder_loader(kind: str) -> TextEncoderLoader:
    """Loader of a kind; its module is imported now.

    Raises:
        ValueError: If no encoder of that kind is registered, plugins included; the message names the closest.
    """
    if kind not in _LOADERS:
        load_plugins()
    if kind not in _LOADERS:
        raise ValueError(f"unknown kind of text encoder {kind!r}, {did_you_mean(kind, _LOADERS)}")
    found = _LOADERS[kind]
    if isinstance(found, str):
        module, _, name = found.partition(":")
        _LOADERS[kind] = found = getattr(importlib.import_module(module), name)
    return found


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """Contents of `text_encoder/config.json`: which encoder a model was trained with."""

    kind: str = "minilm"
    """`minilm`, `t5` or a kind that another package has registered."""
    source: str | None = None
    """Folder (absolute, or inside the component folder) or hub id; None stands for the usual place of the kind."""
    max_length: int = 48
    """Tokens that prompts are padded or cut to, 2 to 512."""
    dim: int = MINILM_DIM
    """Width of the features."""
    clean: bool = False
    """Whether prompts are cleaned first (`arlon.text.cleaning`), as in the training of the released base."""

    def __post_init__(self) -> None:
        if self.kind not in _LOADERS:
            text_encoder_loader(self.kind)
        if not 2 <= self.max_length <= 512:
            raise ValueError(f"max_length must be from 2 to 512 tokens, got {self.max_length}")
