"""ViCLIP: frames and text in one space; VBench's network of overall consistency.

Source: Wang et al., "InternVid", arXiv:2307.06942. Two transformers as in CLIP (arXiv:2103.00020): one reads all
patches of all frames at once, with an embedding of their time added, the other the text. Weights are named as its
authors name theirs; every size but that of a head is read from their shapes.

Dimension key: N videos or texts, T frames, P patches of a frame, L tokens, D width, E embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

HEAD_WIDTH = 64
"""Of every CLIP."""


class ViCLIP(nn.Module):
    """Both towers.

    Args:
        weights: Tensors by name.

    Raises:
        ValueError: If they are not those of such a network.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        try:
            patches = weights["vision_encoder.conv1.weight"]
            place = weights["vision_encoder.positional_embedding"]
            time = weights["vision_encoder.temporal_positional_embedding"]
            words = weights["text_encoder.token_embedding.weight"]
            context = weights["text_encoder.positional_embedding"]
            (_, embedding), (_, embedding_of_text) = (
                weights[name].shape for name in ("vision_encoder.proj", "text_encoder.text_projection")
            )
            (width, _, depth, patch, _), (num_places, _), (_, num_frames, _) = patches.shape, place.shape, time.shape
            (num_words, text_width), (num_tokens, _) = words.shape, context.shape
        except (KeyError, ValueError) as error:
            raise ValueError(f"these are not the weights of ViCLIP ({error})") from error
        grid = math.isqrt(max(num_places - 1, 0))
        if depth != 1 or embedding != embedding_of_text or grid * grid != num_places - 1:
            raise ValueError("these are not the weights of ViCLIP: its sizes do not fit each other")
        self.image_size, self.num_frames, self.num_tokens, self.num_words = (
            grid * patch,
            num_frames,
            num_tokens,
            num_words,
        )
        layers = [_count_layers(weights, tower) for tower in ("vision_encoder", "text_encoder")]
        self.vision_encoder = _VideoTower(width, patch, grid, num_frames, layers[0], embedding)
        self.text_encoder = _TextTower(text_width, num_words, num_tokens, layers[1], embedding)
        tensors = {name: tensor for name, tensor in weights.items() if name != "temp"}  # the temperature of its loss
        try:
            self.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"these are not the weights of ViCLIP: {' '.join(str(error).split())[:200]}") from error

    def embed_videos(self, frames: Tensor) -> Tensor:
        """Embeddings (N, E) of normalised frames (N, 3, T, side, side), T = `num_frames`, side = `image_size`."""
        return self.vision_encoder(frames)

    def embed_texts(self, tokens: Tensor) -> Tensor:
        """Embeddings (N, E) of tokens (N, L) with L = `num_tokens`; the end of a text is its highest token."""
        return self.text_encoder(tokens)


def _count_layers(weights: Mapping[str, Tensor], tower: str) -> int:
    prefix = f"{tower}.transformer.resblocks."
    return len({name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)})


class _VideoTower(nn.Module):
    def __init__(self, width: int, patch: int, grid: int, num_frames: int, num_layers: int, embedding: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(3, width, (1, patch, patch), (1, patch, patch), bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(grid**2 + 1, width))
        self.temporal_positional_embedding = nn.Parameter(torch.zeros(1, num_frames, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = _Transformer(width, num_layers)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.zeros(width, embedding))

    def forward(self, frames: Tensor) -> Tensor:
        patches = self.conv1(frames).flatten(3).permute(0, 3, 2, 1)  # (N, P, T, D)
        patches = patches + self.positional_embedding[1:, None] + self.temporal_positional_embedding
        first = (self.class_embedding + self.positional_embedding[0]).expand(len(patches), 1, -1)
        tokens = self.transformer(self.ln_pre(torch.cat([first, patches.flatten(1, 2)], dim=1)))
        return self.ln_post(tokens[:, 0]) @ self.proj


class _TextTower(nn.Module):
    def __init__(self, width: int, num_words: int, num_tokens: int, num_layers: int, embedding: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(num_words, width)
        self.positional_embedding = nn.Parameter(torch.zeros(num_tokens, width))
        self.transformer = _Transformer(width, num_layers)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, embedding))

    def forward(self, tokens: Tensor) -> Tensor:
        later = torch.full((tokens.shape[1],) * 2, -math.inf, device=tokens.device).triu(1)
        states = self.transformer(self.token_embedding(tokens) + self.positional_embedding, later)
        ends = states[torch.arange(len(tokens)), tokens.argmax(1)]
        return self.ln_final(ends) @ self.text_projection


class _Transformer(nn.Module):
    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(_Block(width) for _ in range(num_layers))

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            tokens = block(tokens, mask)
        return tokens


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, max(1, width // HEAD_WIDTH), batch_first=True)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        asked = self.ln_1(tokens)
        tokens = tokens + self.attn(asked, asked, asked, need_weights=False, attn_mask=mask)[0]
        hidden = self.mlp["c_fc"](self.ln_2(tokens))
        return tokens + self.mlp["c_proj"](hidden * torch.sigmoid(1.702 * hidden))
