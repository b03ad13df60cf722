"""Tiny stages: 16 x 16 frames, networks of some thousand weights, features of captions from a hash."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import stages.data
from arlon.checkpoint import save_component
from arlon.models.stdit import STDiT3
from arlon.models.video_vae import VideoVAE
from arlon.models.vqvae import LatentVQVAE
from stages.train import load_stage_config
from tests.hash_encoder import HashEncoder

CONFIGS = Path(__file__).parents[2] / "configs" / "shapes" / "tiny"
StageConfigs = Callable[..., Any]


@pytest.fixture
def hash_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captions are encoded by `HashEncoder`, 384 wide."""
    monkeypatch.setattr(stages.data, "make_text_encoder", lambda config: HashEncoder(384, config.text_length))


@pytest.fixture(scope="session")
def frozen_parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of random frozen components, by the config key that names them."""
    root = tmp_path_factory.mktemp("frozen")
    torch.manual_seed(0)
    for name, stage, model_class in (
        ("vae", "vae", VideoVAE),
        ("vqvae", "vqvae", LatentVQVAE),
        ("vqvae_coarser", "vqvae", LatentVQVAE),
        ("dit", "dit", STDiT3),
    ):
        config = load_stage_config(stage, [CONFIGS / f"{name}.yaml"], [])
        model = model_class(getattr(config, stage)).eval()
        _wake(model)
        save_component(model, root / name)
    return {name: str(root / name) for name in ("vae", "vqvae", "vqvae_coarser", "dit")}


@pytest.fixture
def stage_config(
    hash_text: None, frozen_parts: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> StageConfigs:
    """Makes the tiny configuration of a stage: stage_config("dit", "train.max_steps=3")."""
    cache = tmp_path_factory.getbasetemp() / "cache"

    def make(stage: str, *overrides: str) -> Any:
        paths = [f"data.cache_dir={cache}", f"data.vae={frozen_parts['vae']}"]
        wanted = {"ar": ("vqvae",), "inject": ("vqvae", "vqvae_coarser", "dit")}.get(stage, ())
        paths += [f"{name}={frozen_parts[name]}" for name in wanted]
        return load_stage_config(stage, [CONFIGS / f"{stage}.yaml"], [*paths, *overrides])

    return make


@torch.no_grad()
def _wake(model: nn.Module) -> None:
    """Give a fresh network what training gives: no branch at zero, and latents that spread."""
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(std=0.05)
    if isinstance(model, VideoVAE):
        model.scale.fill_(0.05)
