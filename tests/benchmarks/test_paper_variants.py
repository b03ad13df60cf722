"""Variants of the injection: what a training is told, and the model folder that it becomes."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from arlon.checkpoint import ModelFolder, write_model_index
from arlon.film.geometry import open_model
from arlon.models.injection import SemanticInjection
from arlon.models.stdit import STDiT3, STDiT3Config
from benchmarks.paper import variants
from benchmarks.paper.__main__ import main as run_experiment
from benchmarks.paper.experiments import EXPERIMENTS
from stages.train import load_stage_config

pytestmark = pytest.mark.slow

DIT = STDiT3Config(hidden_size=192, depth=6, num_heads=6, mlp_ratio=3.0, patch_size=(1, 2, 2), in_channels=16)


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_a_variant_differs_from_the_config_in_what_its_name_says(name: str) -> None:
    config = load_stage_config("inject", [variants.CONFIG], variants.VARIANTS[name].overrides(DIT))
    injection = config.injection
    place = {(0, 3): "first half", (3, 3): "last half", (0, 6): "all"}[injection.first_block, injection.num_blocks]
    assert ("half" not in name and "all" not in name) or place in name
    assert ("controlnet" in name, "mlp adapter" in name) == (
        injection.design == "controlnet",
        injection.design == "mlp_adapter",
    )
    if "codes" in name:
        source, noise = name.split(" codes, ")
        assert (config.coarse_source, variants.NOISES[injection.uncertainty]) == (source, noise)
    dit, model = STDiT3(DIT), SemanticInjection(injection)
    model.init_from(dit)
    latent, text = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 3, 4096)
    sizes = {"fps": 8.0, "height": 32.0, "width": 32.0}
    with torch.no_grad():
        plain = dit(latent, torch.ones(1), text, **sizes)
        torch.testing.assert_close(dit(latent, torch.ones(1), text, inject=model.condition(latent), **sizes), plain)


def fake_training(command: tuple[str, ...], check: bool) -> None:
    """Export a random injection of the config that the command asks for."""
    stage, config, output = command[3], command[5], Path(command[7])
    settings = load_stage_config(stage, [Path(config)], list(command[8:]))
    torch.manual_seed(settings.train.max_steps)
    model = SemanticInjection(settings.injection)
    model.init_from(STDiT3.from_pretrained(settings.dit))
    for linear in model.design.output_layers():
        torch.nn.init.normal_(linear.weight, std=0.1)
    model.save_pretrained(output / "export")


def test_trained_variants_become_models_that_the_experiment_compares(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = []
    monkeypatch.setattr(subprocess, "run", lambda *args, **kw: trained.append(args) or fake_training(*args, **kw))
    config = STDiT3.from_pretrained(tiny_model / "dit").config
    sizes = [f"injection.dim={config.hidden_size}", f"injection.in_channels={config.in_channels}"]
    names = ["mlp adapter, first half", "controlnet, first half"]
    out = tmp_path / "variants"

    def train(model: Path = tiny_model, steps: int = 7, only: Sequence[str] = names) -> None:
        places = ["--model", str(model), "--output", str(out)]
        variants.main([*places, "--steps", str(steps), "--only", *only, "--", *sizes])

    train()
    assert len(trained) == 2
    train()
    assert len(trained) == 2, "what is trained already is left alone"
    base = ModelFolder.open(tiny_model)
    models = [open_model(str(variants.variant_model(out, name, base)))[1]["hash"] for name in names]
    assert len({*models, open_model(str(tiny_model))[1]["hash"]}) == 3

    places = ["--model", str(tiny_model), "--variants", str(out), "--work", str(tmp_path / "work")]
    with pytest.raises(SystemExit, match=r"'adaptive norm, first half' is not trained"):
        run_experiment(["injection", "--films", "1", "--output", str(tmp_path / "tables"), *places])
    assert not (tmp_path / "work").exists(), "nothing is made before all models are there"
    run_experiment(["injection", "--films", "1", "--only", "none", *names, "--output", str(tmp_path), *places])
    table = (tmp_path / "injection.md").read_text()
    assert all(f"| {name} |" in table for name in ("none", *names))
    command = f"python -m benchmarks.paper.variants --steps 7 --only injection -- {' '.join(sizes)}"
    assert f"Each injection trained for 7 steps: `{command}`." in table
    shared = {"steps": 7, "settings": [], "config": ""}
    assert variants.training_command(shared, "injection") == command.partition(" -- ")[0]
    assert json.loads((tmp_path / "injection.json").read_text())["training"]["steps"] == 7

    with pytest.raises(SystemExit, match=r"holds another training .* differs in steps"):
        train(steps=8)
    third = "adaptive norm, all"
    train(steps=8, only=[third])
    with pytest.raises(SystemExit, match=r"steps 8 and 7"):
        run_experiment(["injection", "--films", "1", "--only", names[0], third, "--output", str(tmp_path), *places])

    other_ar, other_dit = tmp_path / "other_ar", tmp_path / "other_dit"
    for folder, name in ((other_ar, "ar"), (other_dit, "dit")):
        shutil.copytree(tiny_model, folder)
        weights = folder / name / "model.safetensors"
        tensors = {key: value * 2 for key, value in load_file(weights).items()}
        save_file(tensors, weights)
        write_model_index(folder, base.defaults)
    with pytest.raises(ValueError, match=r"another base.*dit"):
        variants.variant_model(out, names[0], ModelFolder.open(other_dit))
    with pytest.raises(SystemExit, match=r"differs in base"):
        train(model=other_dit)
    with pytest.raises(ValueError, match="has another ar than"):
        variants.variant_model(out, names[0], ModelFolder.open(other_ar))
    before = len(trained)
    train(model=other_ar)
    assert len(trained) == before, "the AR model is no part of the training"
    assert variants.variant_model(out, names[0], ModelFolder.open(other_ar))
    (variants.variant_folder(out, names[0]) / variants.TRAINING_NAME).unlink()
    with pytest.raises(SystemExit, match=r"has no training\.json"):
        train()


def test_bad_options_end_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        variants.parse_args(["--only", "everything"])
    assert "known are injection, resilience, adaptive norm, first half" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="error: unknown model"):
        variants.main(["--model", "nothing"])


def test_the_variants_of_an_experiment_are_named_together() -> None:
    names = {name: variants.parse_args(["--only", name]).only for name in ("injection", "resilience")}
    assert names == {
        name: list(dict.fromkeys(c.variant for c in EXPERIMENTS[name].conditions if c.variant)) for name in names
    }
    both = variants.parse_args(["--only", "controlnet, all", "injection"]).only
    assert sorted(both) == sorted(names["injection"])
    assert variants.parse_args([]).only == list(variants.VARIANTS)


def test_every_condition_of_a_variant_can_be_trained() -> None:
    asked: set[Any] = {c.variant for name in ("injection", "resilience") for c in EXPERIMENTS[name].conditions}
    assert asked - {None} == set(variants.VARIANTS)
