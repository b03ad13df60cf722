"""Schedule, average and optimizers against closed forms."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from arlon.models.stdit import STDiT3, STDiT3Config
from arlon.models.video_vae import VideoVAE
from stages.callbacks import WeightAverage, lr_factor
from stages.config import OptimConfig, RunConfig
from stages.muon import Muon
from stages.optim import OptimizerPair, hidden_matrices, make_optimizer
from stages.train import load_stage_config

SHAPES = Path(__file__).parents[2] / "configs" / "shapes"


def test_learning_rate_follows_its_closed_form() -> None:
    optim = OptimConfig(warmup_steps=3, min_lr_ratio=0.1)
    assert [lr_factor(optim, step=s, progress=0.0) for s in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    for progress in (0.0, 0.25, 0.5, 1.0):
        expected = 0.1 + 0.9 * math.cos(math.pi * progress / 2) ** 2
        assert lr_factor(optim, step=99, progress=progress) == pytest.approx(expected)
    constant = OptimConfig(warmup_steps=0, schedule="constant")
    assert lr_factor(constant, step=0, progress=0.9) == 1


def test_average_equals_the_sum_it_stands_for() -> None:
    module = SimpleNamespace(model=nn.Linear(2, 1, bias=False))
    weight, average, values = module.model.weight, WeightAverage(0.9), [1.0, -2.0, 5.0, 0.5]
    with torch.no_grad():
        weight.fill_(3.0)
        average.on_train_start(None, module)
        expected = 3.0
        for step, value in enumerate(values, start=1):
            weight.fill_(value)
            average.on_train_batch_end(SimpleNamespace(global_step=step), module, None, None, 0)
            decay = min(0.9, (1 + step) / (10 + step))
            expected = decay * expected + (1 - decay) * value
    with average.applied(module.model):
        torch.testing.assert_close(weight.detach(), torch.full((1, 2), expected))
        assert not module.model.training
    assert weight.tolist() == [[0.5, 0.5]]
    assert module.model.training


def test_muon_takes_hidden_matrices_only() -> None:
    dit = STDiT3(STDiT3Config(in_channels=2, hidden_size=16, depth=1, num_heads=2, caption_channels=4))
    chosen = {id(p) for p in hidden_matrices(dit)}
    names = {name for name, p in dit.named_parameters() if id(p) in chosen}
    inner = (
        "attn.qkv",
        "attn.proj",
        "cross_attn.q_linear",
        "cross_attn.kv_linear",
        "cross_attn.proj",
        "mlp.fc1",
        "mlp.fc2",
    )
    assert names == {f"{kind}_blocks.0.{layer}.weight" for kind in ("spatial", "temporal") for layer in inner}


def test_muon_takes_the_kernels_of_the_vae_but_not_its_ends() -> None:
    vae = VideoVAE(load_stage_config("vae", [SHAPES / "vae.yaml"], []).vae)
    chosen = {id(p) for p in hidden_matrices(vae)}
    names = {name for name, p in vae.named_parameters() if id(p) in chosen}
    assert "temporal_vae.decoder.res_blocks.0.conv1.conv.weight" in names
    assert "spatial_vae.module.encoder.down_blocks.0.resnets.0.conv1.weight" in names
    assert not any("conv_in" in name or name.endswith("bias") for name in names)
    assert "spatial_vae.module.decoder.conv_out.weight" not in names


def test_pair_steps_as_its_parts_would_alone() -> None:
    def make() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 20), nn.Linear(20, 16))

    config = OptimConfig(name="muon", lr=1e-2, muon_lr=3e-2, weight_decay=0.1)
    together, apart = make(), make()
    pair = make_optimizer(together, config)
    assert isinstance(pair, OptimizerPair)
    matrices = [layer.weight for layer in apart]
    vectors = [layer.bias for layer in apart]
    parts = [
        Muon(matrices, lr=3e-2, weight_decay=0.1),
        torch.optim.AdamW(vectors, lr=1e-2, betas=config.betas, eps=config.eps, weight_decay=0.0),
    ]
    x = torch.randn(5, 16)
    for step in range(4):
        for model, optimizers in ((together, [pair]), (apart, parts)):
            model.zero_grad()
            (model(x) - x).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
        if step == 1:
            state = pair.state_dict()
            pair = make_optimizer(together, config)
            pair.load_state_dict(state)
    for a, b in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_every_parameter_has_one_optimizer() -> None:
    model = STDiT3(STDiT3Config(in_channels=2, hidden_size=16, depth=1, num_heads=2, caption_channels=4))
    groups = make_optimizer(model, OptimConfig(name="muon")).param_groups
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert all("peak_lr" in group for group in groups)


def test_settings_out_of_range_are_listed_together() -> None:
    with pytest.raises(ValueError, match=r"batch_size.*\ntrain\.ema_decay"):
        RunConfig(batch_size=0, ema_decay=1.5)
