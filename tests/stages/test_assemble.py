"""A model folder of trained components: weights in bfloat16, and defaults that say how the stages were trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from arlon.checkpoint import CheckpointError, ModelFolder, component_config
from arlon.components import hash_component
from arlon.config import ConfigError, load_config
from stages.assemble import RUN_OF_COMPONENT, ModelFolderConfig, assemble
from stages.record import RECORD_NAME, TrainingFacts, read_facts, write_record
from stages.train import run_stage
from tests.stages.test_configs import FOLDER, model_of

STAGE_FILE = {"injection": "inject"}
FACTS = TrainingFacts(height=16, width=16, fps=13.0, text_length=24)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for name, run in RUN_OF_COMPONENT.items():
        model_of(STAGE_FILE.get(name, name), FOLDER / "tiny").save_pretrained(tmp_path / "runs" / run / "export")
    return tmp_path / "runs"


@pytest.fixture
def config() -> ModelFolderConfig:
    return load_config(ModelFolderConfig, [FOLDER / "tiny" / "model.yaml"])


@pytest.mark.slow
def test_exports_become_a_model_folder_in_bfloat16(runs: Path, tmp_path: Path, config: ModelFolderConfig) -> None:
    done = assemble(tmp_path / "model", runs, config)
    model = ModelFolder.open(tmp_path / "model")
    assert (model.defaults["segment"], done.changed) == (15, {}), "exports without a record state nothing"
    stored = load_file(model.component("dit") / "model.safetensors")
    assert stored["rope.freqs"].dtype == torch.float32
    assert stored["x_embedder.proj.weight"].dtype == torch.bfloat16


def test_defaults_follow_what_the_stages_were_trained_on(runs: Path, tmp_path: Path, config: ModelFolderConfig) -> None:
    before = hash_component(runs / "dit" / "export")
    write_record(runs / "ar", stage="ar", step=3, facts=FACTS)
    write_record(runs / "dit", stage="dit", step=5, facts=replace(FACTS, segment=10, overlap=5))
    assert hash_component(runs / "dit" / "export") == before, "the record is no part of the component"
    done = assemble(tmp_path / "model", runs, replace(config, text_encoder=replace(config.text_encoder, max_length=20)))
    assert done.changed == {"fps": (8, 13.0), "segment": (15, 10), "text_length": (20, 24)}
    defaults = json.loads((tmp_path / "model" / "model_index.json").read_text())["defaults"]
    assert (defaults["fps"], defaults["segment"], defaults["height"]) == (13.0, 10, 16)
    assert defaults["num_inference_steps"] == config.defaults["num_inference_steps"]
    assert component_config(tmp_path / "model" / "text_encoder")["max_length"] == 24


def test_stages_that_contradict_each_other_are_refused_by_name(
    runs: Path, tmp_path: Path, config: ModelFolderConfig
) -> None:
    assemble(tmp_path / "model", runs, config)
    before = {path: path.read_bytes() for path in (tmp_path / "model").rglob("*") if path.is_file()}
    write_record(runs / "dit", stage="dit", step=5, facts=replace(FACTS, segment=10))
    write_record(runs / "inject", stage="inject", step=5, facts=replace(FACTS, segment=15, fps=8.0))
    with pytest.raises(CheckpointError) as refused:
        assemble(tmp_path / "model", runs, config)
    lines = str(refused.value).splitlines()
    assert len([line for line in lines if "/inject'" in line and "/dit'" in line]) == 2
    assert any("fps 8.0" in line and "13.0" in line for line in lines)
    assert any("segment 15" in line and "10" in line for line in lines)
    assert {path: path.read_bytes() for path in before} == before
    assert not list(tmp_path.glob(".model.*"))


def test_a_model_that_cannot_be_is_refused_before_the_old_one_goes(
    runs: Path, tmp_path: Path, config: ModelFolderConfig
) -> None:
    assemble(tmp_path / "model", runs, config)
    before = {path: path.read_bytes() for path in (tmp_path / "model").rglob("*") if path.is_file()}
    write_record(runs / "ar", stage="ar", step=3, facts=TrainingFacts(height=64, width=64))
    with pytest.raises(CheckpointError, match="codes a frame"):
        assemble(tmp_path / "model", runs, config)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("text", ['{"format": 9, "trained_on": {}}', '{"format": 1, "trained_on": {"fbs": 8}}', "{"])
def test_a_damaged_record_is_named(runs: Path, text: str) -> None:
    (runs / "dit" / RECORD_NAME).write_text(text)
    with pytest.raises((ConfigError, CheckpointError), match=RECORD_NAME):
        read_facts(runs / "dit")


def test_released_components_need_no_training_and_fine_tuned_ones_are_preferred(
    runs: Path, tmp_path: Path, config: ModelFolderConfig
) -> None:
    (runs / "dit").rename(tmp_path / "released")
    config = replace(config, released={"dit": str(tmp_path / "released" / "export"), "vae": "nowhere"})
    assemble(tmp_path / "model", runs, config)
    weights = {
        place: load_file(place / "model.safetensors")
        for place in (tmp_path / "model" / "dit", tmp_path / "released" / "export")
    }
    one, two = (tensors["x_embedder.proj.weight"] for tensors in weights.values())
    assert torch.equal(one, two.bfloat16())


def test_missing_export_is_named(runs: Path, tmp_path: Path) -> None:
    (runs / "ar" / "export" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="ar/export"):
        assemble(tmp_path / "model", runs, ModelFolderConfig())
    assert not (tmp_path / "model").exists()


def test_a_folder_that_is_no_model_is_not_replaced(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "one.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="letters"):
        assemble(tmp_path / "letters", runs, ModelFolderConfig())
    assert (tmp_path / "letters" / "one.txt").read_text() == "dear"


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("vae", {}),
        ("vqvae", {"height": 16, "width": 16, "fps": 13.0}),
        ("dit", {"height": 16, "width": 16, "fps": 13.0, "segment": 10, "overlap": 5, "text_length": 24}),
    ],
)
def test_every_export_states_what_it_was_trained_on(
    stage: str, expected: dict[str, Any], stage_config: Any, tmp_path: Path
) -> None:
    data = ["data.shapes.fps=13", "data.shapes_val.fps=13"]
    windows = ["flow.windows.latent_frames=10"] if stage == "dit" else []
    run = ["train.max_steps=1", "train.val_steps=0", "train.sample_steps=0"]
    run_stage(stage, stage_config(stage, *data, *windows, *run), tmp_path)
    assert read_facts(tmp_path).stated() == expected
    record = json.loads((tmp_path / RECORD_NAME).read_text())
    assert (record["stage"], record["step"]) == (stage, 1)
