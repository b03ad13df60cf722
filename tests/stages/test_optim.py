"""Which parameters of every model Muon takes, and the optimizer of both kinds against the two that it combines."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from stages.ar import ARStage
from stages.config import OptimConfig
from stages.dit import DiTStage
from stages.inject import InjectStage, InjectStageConfig
from stages.muon import MuonWithAdamW
from stages.optim import hidden_matrices, make_optimizer
from stages.train import load_stage_config
from stages.vae import VAEStage
from stages.vqvae import VQVAEStage
from tests.stages.test_configs import FOLDER, model_of

BLOCK = (
    "attn.qkv",
    "attn.proj",
    "cross_attn.q_linear",
    "cross_attn.kv_linear",
    "cross_attn.proj",
    "mlp.fc1",
    "mlp.fc2",
)
HALVES = ("encoder", "decoder")
MUON = {
    "dit": {f"{kind}_blocks.#.{layer}" for kind in ("spatial", "temporal") for layer in BLOCK},
    "ar": {f"blocks.#.{layer}" for layer in ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")},
    "inject": {"adapters.#.fc1", "adapters.#.fc2"},
    "vqvae": {"encoder.#", "decoder.#", "encoder.#.linear", "decoder.#.linear"}
    | {f"{half}.#.{layer}" for half in HALVES for layer in ("spatial", "temporal")},
    "vae": {
        f"spatial_vae.module.{place}.{layer}"
        for place in ("encoder.down_blocks.#.resnets.#", "decoder.up_blocks.#.resnets.#")
        for layer in ("conv1", "conv2", "conv_shortcut")
    }
    | {f"spatial_vae.module.{half}.mid_block.resnets.#.{conv}" for half in HALVES for conv in ("conv1", "conv2")}
    | {
        "spatial_vae.module.encoder.down_blocks.#.downsamplers.#.conv",
        "spatial_vae.module.decoder.up_blocks.#.upsamplers.#.conv",
        "spatial_vae.module.encoder.conv_out",
        "spatial_vae.module.quant_conv",
        "spatial_vae.module.post_quant_conv",
    }
    | {f"temporal_vae.{half}.block_res_blocks.#.#.conv{number}.conv" for half in HALVES for number in (1, 2, 3)}
    | {f"temporal_vae.{half}.res_blocks.#.conv{number}.conv" for half in HALVES for number in (1, 2)}
    | {f"temporal_vae.{half}.conv_blocks.#.conv" for half in HALVES}
    | {
        f"temporal_vae.{layer}.conv"
        for layer in ("encoder.conv2", "quant_conv", "post_quant_conv", "decoder.conv1", "decoder.conv_out")
    },
}
"""Layers whose weight Muon takes, `#` for any number."""
ADAMW = {
    "dit": {"x_embedder.proj", "t_embedder.mlp.#", "fps_embedder.mlp.#", "t_block.#"}
    | {"y_embedder.y_proj.fc1", "y_embedder.y_proj.fc2", "final_layer.linear"},
    "ar": {"text_proj", "head"},
    "inject": {"projection.proj", "to_modulation.#"},
    "vqvae": set(),
    "vae": {f"spatial_vae.module.{half}.conv_in" for half in HALVES}
    | {"spatial_vae.module.decoder.conv_out", "temporal_vae.encoder.conv_in.conv"},
}
"""Layers whose weight, a matrix or kernel too, AdamW takes."""


def adamw_layers(name: str, model: nn.Module) -> tuple[str, ...]:
    """What the stage of a model leaves to AdamW."""
    if name == "inject":
        config = InjectStageConfig(injection=model.config)
        return InjectStage(config, model, dit=None, vae=None, vqvaes={}, take_latents=1, examples={}).adamw_layers
    return {"dit": DiTStage, "ar": ARStage, "vae": VAEStage, "vqvae": VQVAEStage}[name].adamw_layers


def groups_of(name: str, folder: Path = FOLDER) -> tuple[set[str], set[str]]:
    """Layers whose matrix or kernel Muon takes and those whose AdamW takes, without numbers."""
    with torch.device("meta"):
        model = model_of(name, folder)
    hidden = {id(weight) for weight in hidden_matrices(model, adamw_layers(name, model))}
    kinds: tuple[set[str], set[str]] = set(), set()
    for layer, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            kinds[id(module.weight) not in hidden].add(re.sub(r"(?<=\.)\d+(?=\.|$)", "#", layer))
    return kinds


@pytest.mark.parametrize("name", MUON)
def test_every_layer_of_every_model_has_the_optimizer_that_is_listed(name: str) -> None:
    muon, adamw = groups_of(name)
    assert muon == MUON[name]
    assert adamw == ADAMW[name]


@pytest.mark.parametrize("name", ["dit", "ar", "inject"])
def test_the_full_size_has_the_same_groups(name: str) -> None:
    assert groups_of(name, FOLDER.parent / "opensora_v1_2") == groups_of(name)


@pytest.mark.parametrize("design", ["mlp_adapter", "controlnet"])
def test_injections_of_other_designs_have_groups_too(design: str) -> None:
    config = load_stage_config("inject", [FOLDER / "inject.yaml"], [f"injection.design={design}"])
    from stages.inject import SemanticInjection

    with torch.device("meta"):
        model = SemanticInjection(config.injection)
    optimizer = make_optimizer(model, OptimConfig(name="muon"), adamw_layers("inject", model))
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_a_name_that_is_no_module_is_refused() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(ValueError, match=r"Sequential has no module 'heads_proj'"):
        make_optimizer(model, OptimConfig(name="muon"), ["0", "heads_proj"])
    assert hidden_matrices(model, ["0"]) == []


def test_one_optimizer_steps_as_the_two_would_alone() -> None:
    def make() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 20), nn.Linear(20, 16))

    config = OptimConfig(name="muon", lr=1e-2, muon_lr=3e-2, weight_decay=0.1)
    together, apart = make(), make()
    both = make_optimizer(together, config)
    assert isinstance(both, MuonWithAdamW)
    matrices = [layer.weight for layer in apart]
    vectors = [layer.bias for layer in apart]
    parts = [
        MuonWithAdamW(matrices, lr=3e-2, weight_decay=0.1),
        torch.optim.AdamW(vectors, lr=1e-2, betas=config.betas, eps=config.eps, weight_decay=0.0),
    ]
    x = torch.randn(5, 16)
    for step in range(4):
        for model, optimizers in ((together, [both]), (apart, parts)):
            model.zero_grad()
            (model(x) - x).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
        if step == 1:
            state = both.state_dict()
            both = make_optimizer(together, config)
            both.load_state_dict(state)
    for a, b in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_is_in_one_group_with_its_rate_and_decay(name: str) -> None:
    model = model_of("dit", FOLDER / "tiny")
    config = OptimConfig(name=name, lr=1e-3, muon_lr=1e-2, weight_decay=0.1)
    groups = make_optimizer(model, config, DiTStage.adamw_layers).param_groups
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    for group in groups:
        is_muon = group.get("use_muon", False)
        assert group["lr"] == (1e-2 if is_muon else 1e-3)
        assert all(p.ndim >= 2 for p in group["params"]) == (group["weight_decay"] == 0.1)
