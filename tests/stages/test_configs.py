"""Every configuration file loads, and the small model fits in the repository."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stages.train import load_stage_config

FOLDER = Path(__file__).parents[2] / "configs" / "shapes"
FILES = {
    "vae": "vae",
    "vqvae": "vqvae",
    "vqvae_coarser": "vqvae",
    "ar": "ar",
    "dit": "dit",
    "inject": "inject",
}
MODELS = {"vae": "VideoVAE", "vqvae": "LatentVQVAE", "ar": "CodeTransformer", "dit": "STDiT3"}


def model_of(name: str, folder: Path) -> torch.nn.Module:
    import importlib

    stage = FILES[name]
    config = load_stage_config(stage, [folder / f"{name}.yaml"], [])
    module = importlib.import_module(f"stages.{stage}")
    if stage == "inject":
        return module.SemanticInjection(config.injection)
    return getattr(module, MODELS[stage])(getattr(config, stage))


@pytest.mark.parametrize("name", FILES)
def test_tiny_variant_builds(name: str) -> None:
    assert sum(p.numel() for p in model_of(name, FOLDER / "tiny").parameters()) < 250_000


def test_small_model_is_at_most_32_megabytes_in_bfloat16() -> None:
    sizes = {name: 2 * sum(t.numel() for t in model_of(name, FOLDER).state_dict().values()) for name in FILES}
    assert sum(sizes.values()) <= 32e6, sizes
