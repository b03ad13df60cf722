"""The same command given again: a finished run is left as it is, and what it lacks is written from its checkpoint."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner

from arlon.config import save_config
from stages.callbacks import LAST_CHECKPOINT
from stages.record import locked
from stages.train import main, run_stage

QUIET = ("train.val_steps=0", "train.sample_steps=0")


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time and bytes of every file below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def command_line(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize("limits", [("train.max_steps=1000", "train.max_minutes=1"), ("train.max_steps=2",)])
def test_a_finished_run_says_so_and_writes_nothing(
    limits: tuple[str, ...], stage_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = itertools.count(step=4.0)
    monkeypatch.setattr("stages.callbacks.monotonic", lambda: next(seconds))
    save_config(stage_config("vqvae", *limits, *QUIET), tmp_path / "vqvae.yaml")
    arguments = ("vqvae", "--config", str(tmp_path / "vqvae.yaml"), "--output", str(tmp_path / "run"))
    first = command_line(*arguments)
    assert first.exit_code == 0, first.output
    assert "exported" in first.output
    before = contents(tmp_path / "run")
    for _ in range(2):
        again = command_line(*arguments)
        assert again.exit_code == 0, again.output
        assert "is finished at step" in again.output
        assert contents(tmp_path / "run") == before


def test_a_larger_limit_trains_a_finished_run_further(stage_config: Any, tmp_path: Path) -> None:
    run_stage("vqvae", stage_config("vqvae", "train.max_steps=1", *QUIET), tmp_path)
    result = run_stage("vqvae", stage_config("vqvae", "train.max_steps=3", *QUIET), tmp_path)
    assert (result.step, result.was_finished) == (3, False)


@pytest.mark.parametrize("stage", ["vqvae", pytest.param("vae", marks=pytest.mark.slow)])
def test_a_removed_export_is_written_again(stage: str, stage_config: Any, tmp_path: Path) -> None:
    config = stage_config(stage, "train.max_steps=2", *QUIET)
    run_stage(stage, config, tmp_path)
    before = {name: data for name, (_, data) in contents(tmp_path).items()}
    shutil.rmtree(tmp_path / "export")
    (tmp_path / "export.json").unlink()
    assert run_stage(stage, config, tmp_path).was_finished
    assert {name: data for name, (_, data) in contents(tmp_path).items()} == before


def test_a_finished_run_still_fills_a_further_folder(stage_config: Any, tmp_path: Path) -> None:
    config = stage_config("dit", "train.max_steps=2", *QUIET)
    run_stage("dit", config, tmp_path / "run", export_to=tmp_path / "one")
    run_stage("dit", config, tmp_path / "run", export_to=tmp_path / "two")
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    assert load_file(tmp_path / "two" / "model.safetensors")["x_embedder.proj.weight"].dtype == torch.bfloat16


def test_a_run_that_ends_between_export_and_checkpoint_is_finished_by_the_same_command(
    stage_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is killed there: a checkpoint that says it is finished never stands beside an older export."""
    config = stage_config("vqvae", "train.max_steps=4", "train.checkpoint_steps=2", *QUIET)
    run_stage("vqvae", config, tmp_path / "whole")
    original = L.Trainer.save_checkpoint

    def fail_at_the_end(trainer: L.Trainer, *arguments: Any, **options: Any) -> None:
        if trainer.global_step == 4:
            raise OSError(28, "No space left on device")
        original(trainer, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(L.Trainer, "save_checkpoint", fail_at_the_end)
        with pytest.raises(OSError, match="No space left"):
            run_stage("vqvae", config, tmp_path / "cut")
    assert torch.load(tmp_path / "cut" / LAST_CHECKPOINT, weights_only=True)["global_step"] == 2
    assert run_stage("vqvae", config, tmp_path / "cut").step == 4
    exports = [(tmp_path / name / "export" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert exports[0] == exports[1]


def test_another_runs_finished_checkpoint_is_refused(stage_config: Any, tmp_path: Path) -> None:
    config = stage_config("vqvae", "train.max_steps=1", *QUIET)
    run_stage("vqvae", config, tmp_path / "one")
    with pytest.raises(ValueError, match=r"one/checkpoints/last\.ckpt' .* nothing to train"):
        run_stage("vqvae", config, tmp_path / "two", resume=str(tmp_path / "one" / LAST_CHECKPOINT))
    assert not (tmp_path / "two").exists()


def test_settings_that_may_change_are_applied_and_noted(stage_config: Any, tmp_path: Path) -> None:
    run_stage("vqvae", stage_config("vqvae", "train.max_steps=2", "optim.schedule=constant", *QUIET), tmp_path)
    changed = ("train.max_steps=4", "optim.schedule=constant", "optim.lr=0.5", "optim.betas=[0.5,0.6]")
    run_stage("vqvae", stage_config("vqvae", *changed, *QUIET), tmp_path)
    (group, *_) = torch.load(tmp_path / LAST_CHECKPOINT, weights_only=True)["optimizer_states"][0]["param_groups"]
    assert (group["lr"], tuple(group["betas"])) == (0.5, (0.5, 0.6))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["train/lr"] for line in lines if "train/lr" in line][2:] == [0.5, 0.5]
    (line,) = (json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines())
    assert line["step"] == 2
    assert set(line["changed"]) == {"train.max_steps", "optim.lr", "optim.betas"}
    assert line["changed"]["optim.lr"] == [3e-3, 0.5]


@pytest.mark.parametrize("setting", ["optim.name=muon", "train.seed=1", "vqvae.hidden_dim=8"])
def test_settings_that_must_stay_are_refused_before_anything_is_touched(
    setting: str, stage_config: Any, tmp_path: Path
) -> None:
    run_stage("vqvae", stage_config("vqvae", "train.max_steps=1", *QUIET), tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=setting.split("=")[0]) as refused:
        run_stage("vqvae", stage_config("vqvae", "train.max_steps=2", setting, *QUIET), tmp_path)
    assert "\n" not in str(refused.value)
    assert contents(tmp_path) == before


def test_a_second_training_in_one_folder_is_refused(stage_config: Any, tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(OSError, match="another training"):
        run_stage("vqvae", stage_config("vqvae", "train.max_steps=1", *QUIET), tmp_path)
    assert run_stage("vqvae", stage_config("vqvae", "train.max_steps=1", *QUIET), tmp_path).step == 1
