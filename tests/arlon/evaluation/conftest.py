"""A tiny CLIP with random weights, and frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from arlon.evaluation.vbench import networks as backbones

SIDE = 32


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    vision = sizes | {"image_size": SIDE, "patch_size": 16}
    config = CLIPConfig(text_config=sizes | {"vocab_size": 20}, vision_config=vision, projection_dim=12)
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    head = {"weight": torch.randn(1, 12), "bias": torch.randn(1)}
    safetensors.torch.save_file(head, folder / backbones.AESTHETIC_HEAD)
    return folder


def frames(count: int = 3, height: int = SIDE, width: int = 48) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
