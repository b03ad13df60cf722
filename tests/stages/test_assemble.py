from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from arlon.checkpoint import ModelFolder
from arlon.config import load_config
from stages.assemble import RUN_OF_COMPONENT, ModelFolderConfig, assemble
from tests.stages.test_configs import FOLDER, model_of

STAGE_FILE = {"injection": "inject"}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for name, run in RUN_OF_COMPONENT.items():
        model_of(STAGE_FILE.get(name, name), FOLDER / "tiny").save_pretrained(tmp_path / "runs" / run / "export")
    return tmp_path / "runs"


@pytest.mark.slow
def test_exports_become_a_model_folder_in_bfloat16(runs: Path, tmp_path: Path) -> None:
    config = load_config(ModelFolderConfig, [FOLDER / "tiny" / "model.yaml"])
    assemble(tmp_path / "model", runs, config)
    model = ModelFolder.open(tmp_path / "model")
    assert model.defaults["segment"] == 15
    stored = load_file(model.component("dit") / "model.safetensors")
    assert stored["rope.freqs"].dtype == torch.float32
    assert stored["x_embedder.proj.weight"].dtype == torch.bfloat16


def test_missing_export_is_named(runs: Path, tmp_path: Path) -> None:
    (runs / "ar" / "export" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="ar/export"):
        assemble(tmp_path / "model", runs, ModelFolderConfig())
