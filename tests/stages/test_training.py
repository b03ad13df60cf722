"""Every stage: learns, resumes exactly, survives Ctrl-C, exports what it learned."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner

from arlon.config import save_config
from arlon.data.samples import FixedBatches
from arlon.models.video_vae import VideoVAE
from stages import common, data
from stages.callbacks import LAST_CHECKPOINT
from stages.dit import DiTStage
from stages.train import fit, main, read_progress, run_stage

STAGES = ("vae", "vqvae", "ar", "dit", "inject")


def build(stage: str, config: Any) -> common.StageParts:
    return importlib.import_module(f"stages.{stage}").build(config)


def weights_of(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "export" / "model.safetensors")


class Interrupt(L.Callback):
    """Raises KeyboardInterrupt at the end of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "stage", [stage if stage == "ar" else pytest.param(stage, marks=pytest.mark.slow) for stage in STAGES]
)
def test_resumed_training_equals_uninterrupted(stage: str, stage_config: Any, tmp_path: Path) -> None:
    config = stage_config(stage)
    run_stage(stage, config, tmp_path / "whole")

    parts = build(stage, config)
    training = common.make_training(parts, config.train, config.optim, tmp_path / "halves", extra=[Interrupt(4)])
    assert fit(training, parts, None)
    early = torch.load(tmp_path / "halves" / LAST_CHECKPOINT, weights_only=True)
    assert early["global_step"] == 4
    result = run_stage(stage, config, tmp_path / "halves", resume="auto")

    assert (result.step, result.interrupted) == (6, False)
    whole, halves = (torch.load(tmp_path / name / LAST_CHECKPOINT, weights_only=True) for name in ("whole", "halves"))
    assert whole["global_step"] == halves["global_step"] == 6
    for name, tensor in whole["state_dict"].items():
        torch.testing.assert_close(halves["state_dict"][name], tensor, rtol=0, atol=0, msg=name)
    assert any(not torch.equal(early["state_dict"][name], t) for name, t in whole["state_dict"].items())
    exported, resumed = weights_of(tmp_path / "whole"), weights_of(tmp_path / "halves")
    assert all(torch.equal(exported[name], resumed[name]) for name in exported)


OVERFIT = {"vae": (20, 0.35), "vqvae": (60, 0.5), "ar": (60, 0.07), "dit": (60, 0.15), "inject": (40, 0.85)}
"""Steps on one batch with the same draws, and the share of the first loss that is left at most. The injection cannot go
far, as the base that it steers is frozen and random."""


@pytest.mark.parametrize(
    "stage", [stage if stage == "ar" else pytest.param(stage, marks=pytest.mark.slow) for stage in STAGES]
)
def test_one_batch_is_learned_by_heart(stage: str, stage_config: Any) -> None:
    parts = build(stage, stage_config(stage))
    batch = FixedBatches(parts.train.samples, 2).batch(0)
    module = parts.stage
    module.log_figures = lambda **figures: None
    module.step_generator = lambda: torch.Generator().manual_seed(1)
    module.row_generators = lambda count: [torch.Generator().manual_seed(1 + row) for row in range(count)]
    optimizer = module.configure_optimizers()["optimizer"]
    steps, share = OVERFIT[stage]
    losses = []
    for _ in range(steps):
        torch.manual_seed(0)
        loss = module.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < share * losses[0], losses
    if stage == "ar":
        assert losses[0] == pytest.approx(math.log(16), rel=0.05), "an untrained model knows nothing of 16 codes"


@pytest.mark.slow
def test_run_folder_holds_figures_pictures_and_export(stage_config: Any, tmp_path: Path) -> None:
    run_stage("dit", stage_config("dit"), tmp_path, export_to=tmp_path / "model" / "dit")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    logged = {name for line in lines for name in line}
    assert {"train/loss", "train/samples_per_s", "train/lr", "val/loss"} <= logged
    assert (tmp_path / "samples" / "step_000003.png").exists()
    assert list((tmp_path / "tensorboard").glob("events.*"))
    assert (tmp_path / "config.yaml").exists()
    half = load_file(tmp_path / "model" / "dit" / "model.safetensors")
    assert half["x_embedder.proj.weight"].dtype == torch.bfloat16
    assert not list(tmp_path.rglob("*.tmp*"))


@pytest.mark.slow
def test_checkpoint_holds_nothing_frozen(stage_config: Any, tmp_path: Path) -> None:
    run_stage("inject", stage_config("inject"), tmp_path)
    state = torch.load(tmp_path / LAST_CHECKPOINT, weights_only=True)["state_dict"]
    assert {name.split(".")[0] for name in state} == {"model"}
    exported = weights_of(tmp_path)
    assert set(exported) == {name.removeprefix("model.") for name in state}


def command_line(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_tells_how_to_resume(
    sent: signal.Signals, stage_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_config(stage_config("dit", "train.val_steps=0", "train.sample_steps=0"), tmp_path / "dit.yaml")
    arguments = ("dit", "--config", str(tmp_path / "dit.yaml"), "--output", str(tmp_path / "run"))
    original = DiTStage.training_step

    def interrupted_step(self: DiTStage, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.global_step == 2:
            os.kill(os.getpid(), sent)
        return original(self, batch, batch_idx)

    before = signal.getsignal(sent)
    monkeypatch.setattr(DiTStage, "training_step", interrupted_step)
    stopped = command_line(*arguments)
    assert stopped.exit_code == 130, stopped.output
    assert "interrupted at step 3; to resume: python -m stages.train" in stopped.output
    assert signal.getsignal(sent) is before

    monkeypatch.setattr(DiTStage, "training_step", original)
    resumed = command_line(*arguments)
    assert resumed.exit_code == 0, resumed.output
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert max(steps) == 6


def test_time_budget_ends_the_run_and_the_schedule(
    stage_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = itertools.count()
    monkeypatch.setattr("stages.callbacks.monotonic", lambda: float(next(seconds)))
    config = stage_config(
        "vqvae", "train.max_steps=1000", "train.max_minutes=1", "train.val_steps=0", "train.sample_steps=0"
    )
    result = run_stage("vqvae", config, tmp_path)
    assert not result.interrupted
    assert 5 < result.step < 60
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = [line["train/lr"] for line in lines if "train/lr" in line]
    assert rates[1] > 0.9 * config.optim.lr
    assert rates[-1] < 0.1 * config.optim.lr
    again = run_stage("vqvae", config, tmp_path)
    assert (again.step, again.was_finished) == (result.step, True), "the minutes of the first run count in the second"


def test_fine_tuning_starts_from_exported_weights(stage_config: Any, tmp_path: Path) -> None:
    run_stage("vae", stage_config("vae", "train.max_steps=1"), tmp_path)
    parts = build("vae", stage_config("vae", f"train.init_from={tmp_path / 'export'}", "part=temporal"))
    exported = weights_of(tmp_path)
    assert all(torch.equal(t, exported[name]) for name, t in parts.stage.model.state_dict().items())
    trainable = {name.split(".")[0] for name, p in parts.stage.model.named_parameters() if p.requires_grad}
    assert trainable == {"temporal_vae"}


@pytest.mark.slow
def test_a_fine_tuned_vae_keeps_its_shift_and_scale(stage_config: Any, tmp_path: Path) -> None:
    """In every digit, and with the rest of its config.json; measured anew only if that is asked for."""
    torch.manual_seed(0)
    start = VideoVAE(replace(stage_config("vae").vae, shift=(-0.1, 0.34, 0.27, 0.98), scale=(3.85, 2.32, 2.33, 3.06)))
    start.save_pretrained(tmp_path / "start")
    source = f"train.init_from={tmp_path / 'start'}"
    for name, options in (("all", []), ("decoder", ["part=decoder"]), ("measured", ["statistics=measure"])):
        run_stage("vae", stage_config("vae", source, "train.max_steps=1", *options), tmp_path / name)
    config, *exported = (tmp_path / name / "config.json" for name in ("start", "all/export", "decoder/export"))
    assert [path.read_bytes() for path in exported] == [config.read_bytes()] * 2
    kept, measured = (VideoVAE.from_pretrained(tmp_path / name / "export") for name in ("all", "measured"))
    assert torch.equal(kept.shift, start.shift)
    assert torch.equal(kept.scale, start.scale)
    assert not torch.isclose(measured.scale, start.scale).any()
    assert torch.equal(measured.scale.flatten(), torch.tensor(measured.config.scale))
    assert stage_config("vae").measures_statistics, "a new VAE has none to keep"
    with pytest.raises(ValueError, match=r"decoder.*statistics.*keep"):
        stage_config("vae", source, "part=decoder", "statistics=measure")


@pytest.mark.slow
def test_training_of_the_decoders_leaves_every_latent_as_it_is(stage_config: Any, tmp_path: Path) -> None:
    run_stage("vae", stage_config("vae", "train.max_steps=1"), tmp_path / "all")
    start = f"train.init_from={tmp_path / 'all' / 'export'}"
    noise = "loss.latent_noise=0.5"
    some = "loss_frames=3"
    run_stage("vae", stage_config("vae", "train.max_steps=2", "part=decoder", start, noise, some), tmp_path / "decoder")
    before, after = (VideoVAE.from_pretrained(tmp_path / name / "export") for name in ("all", "decoder"))
    video = torch.rand(1, 3, 17, 16, 16) * 2 - 1
    with torch.inference_mode():
        latent = before.encode(video)
        assert torch.equal(after.encode(video), latent)
        assert not torch.equal(after.decode(latent, 17), before.decode(latent, 17))


@pytest.mark.slow
def test_the_loss_of_some_frames_is_that_of_all_on_average(stage_config: Any, tmp_path: Path) -> None:
    run_stage("vae", stage_config("vae", "train.max_steps=1"), tmp_path)
    start = f"train.init_from={tmp_path / 'export'}"

    def errors(*overrides: str) -> list[float]:
        parts = build("vae", stage_config("vae", "part=decoder", start, *overrides))
        stage, logged = parts.stage, []
        stage.log_figures = lambda **terms: logged.append(terms["mse"].item())
        stage.step_generator = lambda: torch.Generator().manual_seed(len(logged))
        video = torch.rand(2, 3, 17, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
        for _ in range(24):
            stage.training_step({"video": video}, 0)
        return logged

    some, every = errors("loss_frames=3"), errors()
    assert np.mean(some) == pytest.approx(np.mean(every), rel=0.03)
    assert np.std(some) > 2 * np.std(every), "other frames at each step"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("dit", "dit.dept=3"), 2, "dit.dept"),
        (("vae", "loss_frames=3"), 2, "loss_frames is for part=decoder, got part=all"),
        (("vae", "part=decoder", "loss_frames=18"), 2, "loss_frames (18) must be 1..17"),
        (("dit", "dit.depth=deep"), 2, "dit.depth"),
        (("dit", "train.max_steps=0"), 2, "max_steps"),
        (("dit", "train.num_threads=0"), 2, "train.num_threads must be at least 1, got 0"),
        (("dit", "optim.lr=.nan"), 2, "optim.lr and optim.muon_lr must be positive"),
        (("dit", "--config", "nowhere.yaml"), 2, "no configuration file 'nowhere.yaml'"),
        (("dit", "data.vae=nowhere"), 1, "data.vae = 'nowhere' holds no VideoVAE"),
        (("dit", "data.manifest=nowhere.jsonl"), 1, "no such manifest: 'nowhere.jsonl'"),
        (("dit", "--export-to", "pyproject.toml/dit"), 1, "pyproject.toml' is not a folder"),
        (("dit", "--resume", "nowhere.ckpt"), 1, "no checkpoint 'nowhere.ckpt'"),
    ],
)
def test_bad_input_is_one_readable_line(
    arguments: tuple[str, ...], code: int, message: str, tmp_path: Path, hash_text: None
) -> None:
    config = Path("configs/shapes/tiny") / f"{arguments[0]}.yaml"
    result = command_line(*arguments, "--config", str(config), "--output", str(tmp_path))
    assert result.exit_code == code
    assert result.output.startswith("error: ")
    assert message in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", "foreign"])
def test_a_damaged_or_foreign_checkpoint_is_refused(content: bytes | str, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    if isinstance(content, str):
        torch.save({"weights": torch.zeros(2)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"last\.ckpt.*remove it to start afresh"):
        read_progress(path)


@pytest.mark.parametrize("stage", ["ar", "dit"])
def test_trimmed_padding_changes_nothing(stage: str, stage_config: Any) -> None:
    parts = build(stage, stage_config(stage))
    batch = next(iter(parts.val))
    batch["text_mask"][:, 16:] = False  # however long the captions are
    trimmed = data.trim_text(batch)
    assert trimmed["text"].shape[1] == trimmed["text_mask"].shape[1] < batch["text"].shape[1]
    assert torch.equal(trimmed["text_mask"].sum(dim=1), batch["text_mask"].sum(dim=1))
    parts.stage.model.eval()
    with torch.no_grad():
        full, short = parts.stage.validate([batch]), parts.stage.validate([trimmed])
    assert short["loss"] == pytest.approx(full["loss"], rel=1e-5)


def test_ar_that_does_not_fit_its_codes_is_refused(stage_config: Any) -> None:
    with pytest.raises(ValueError, match=r"(?s)ar\.codebook_size.*8.*16.*ar\.grid.*4, 4"):
        build("ar", stage_config("ar", "ar.codebook_size=8", "ar.grid=[4,4]"))
