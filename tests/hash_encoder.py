"""Stand-in for a text encoder: no weights, and features that depend on the words of a prompt alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from arlon.text.encoders import TextFeatures


class HashEncoder:
    """Encoder whose every word is a random vector, seeded by the word's hash.

    Args:
        dim: Width of the features.
        max_length: Words that a prompt may have; the others are left out.
    """

    def __init__(self, dim: int, max_length: int) -> None:
        self.dim, self.max_length = dim, max_length

    def encode(self, prompts: Sequence[str], *, batch_size: int = 1) -> TextFeatures:
        """Features of prompts: tokens (B, max_length, dim), their mask (B, max_length) and their mean (B, dim)."""
        tokens = torch.zeros(len(prompts), self.max_length, self.dim)
        mask = torch.zeros(len(prompts), self.max_length, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            for place, word in enumerate(prompt.split()[: self.max_length]):
                seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big")
                tokens[row, place] = torch.randn(self.dim, generator=torch.Generator().manual_seed(seed))
                mask[row, place] = True
        return TextFeatures(
            tokens=tokens, mask=mask, pooled=tokens.sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)
        )
