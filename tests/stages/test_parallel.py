"""Two processes with batches of two do what one does with a batch of four, resumed half-way too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from arlon.config import save_config
from stages.callbacks import LAST_CHECKPOINT
from stages.config import OptimConfig, RunConfig
from stages.dit import build
from stages.parallel import make_strategy
from stages.train import run_stage
from tests.closeness import assert_close_to_scale

ROOT = Path(__file__).parents[2]
# Adam's first steps are signs of gradients: with its usual eps those that are only rounding would decide.
OPTIM = ("optim.name=adamw", "optim.lr=1e-3", "optim.eps=1e-4", "optim.schedule=constant", "optim.warmup_steps=0")
RUN = ("train.val_steps=2", "train.sample_steps=2", "train.ema_decay=0.5", "train.num_threads=1")


def train_in_processes(config: Any, folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """`python -m stages.train`, which starts the other process by itself."""
    save_config(config, folder / "dit.yaml")
    command = [sys.executable, "-m", "stages.train", "dit", "--config", str(folder / "dit.yaml")]
    return subprocess.run(
        [*command, "--output", str(folder / "run"), *overrides],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_equal_one_with_twice_the_batch(strategy: str, stage_config: Any, tmp_path: Path) -> None:
    alone = stage_config("dit", *OPTIM, *RUN, "train.batch_size=4", "train.max_steps=4")
    run_stage("dit", alone, tmp_path / "alone")

    shared = stage_config(
        "dit", *OPTIM, *RUN, "train.batch_size=2", f"train.strategy={strategy}", "train.devices=2", "train.max_steps=2"
    )
    (tmp_path / "shared").mkdir()
    for steps in (2, 4):
        done = train_in_processes(shared, tmp_path / "shared", f"train.max_steps={steps}")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("exported") == 1, done.stdout

    run = tmp_path / "shared" / "run"
    one, two = (
        torch.load(path / LAST_CHECKPOINT, weights_only=True, map_location="cpu") for path in (tmp_path / "alone", run)
    )
    assert one["global_step"] == two["global_step"] == 4
    torch.manual_seed(0)
    start = build(alone).stage.state_dict()
    assert one["state_dict"].keys() == two["state_dict"].keys()
    moved = max(float((tensor - start[name]).abs().max()) for name, tensor in one["state_dict"].items())
    assert moved > 1e-3
    for name, tensor in one["state_dict"].items():
        assert_close_to_scale(two["state_dict"][name], tensor, name=name)
    exported, expected = (load_file(p / "export" / "model.safetensors") for p in (run, tmp_path / "alone"))
    assert exported.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_close_to_scale(exported[name], tensor, name=name)
    assert not list(run.rglob("*.tmp*"))
    assert len((run / "metrics.jsonl").read_text().splitlines()) == len(
        (tmp_path / "alone" / "metrics.jsonl").read_text().splitlines()
    )


def test_what_cannot_be_shared_is_refused(stage_config: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs optim\.name=adamw, got muon"):
        make_strategy(RunConfig(strategy="fsdp", devices=2), OptimConfig(name="muon"))
    with pytest.raises(ValueError, match=r"several processes need train\.strategy=ddp"):
        RunConfig(devices=2)
    with pytest.raises(ValueError, match="fsdp shards the DiT; the stage vqvae"):
        run_stage("vqvae", stage_config("vqvae", "train.strategy=fsdp"), tmp_path)
