"""The DiT on one's own clips in buckets: learns, resumes exactly, says its loss for each bucket; and fine-tuning."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from arlon.checkpoint import load_component, save_component
from arlon.config import load_config, save_config
from arlon.data.buckets import Bucket
from arlon.data.manifest import Clip, build_manifest, read_manifest, write_manifest
from arlon.data.video_io import VideoWriter
from arlon.models.stdit import STDiT3
from stages import data
from stages.callbacks import LAST_CHECKPOINT
from stages.dit import DiTStageConfig, build
from stages.flow_matching import flow_losses
from stages.train import run_stage

BUCKETS = """
data:
  val_clips: 4
  buckets:
    - {resolution: 20x32, num_frames: 34, keep_prob: 0.5, batch_size: 1}
    - {resolution: 16x16, num_frames: 17, batch_size: 2}
"""


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight clips: four of 36 frames of 20 x 32, four of 20 frames of 16 x 16; two of each for validation."""
    folder, clips = tmp_path_factory.mktemp("own"), []
    rng = np.random.default_rng(0)
    for number in range(8):
        frames, height, width = ((36, 20, 32), (20, 16, 16))[number % 2]
        path = folder / f"{number}.mp4"
        with VideoWriter(path, fps=12, preset="ultrafast") as writer:
            writer.append(rng.integers(0, 256, (frames, height, width, 3), dtype=np.uint8))
        clips.append(Clip(path=path, text=f"noise {number}", num_frames=frames, height=height, width=width, fps=12.0))
    write_manifest(clips, folder / "clips.jsonl")
    return folder / "clips.jsonl"


def bucket_config(stage_config: Any, manifest: Path, tmp_path: Path, *overrides: str) -> DiTStageConfig:
    """The tiny configuration of `dit` with buckets."""
    save_config(stage_config("dit", f"data.manifest={manifest}", *overrides), tmp_path / "base.yaml")
    (tmp_path / "buckets.yaml").write_text(BUCKETS)
    return load_config(DiTStageConfig, [tmp_path / "base.yaml", tmp_path / "buckets.yaml"], [])


@pytest.mark.slow
def test_training_in_buckets_resumes_exactly_and_validates_each(
    stage_config: Any, manifest: Path, tmp_path: Path
) -> None:
    settings = ("gradient_checkpointing=true", "train.val_batches=2", "optim.schedule=constant")
    run_stage("dit", bucket_config(stage_config, manifest, tmp_path, *settings), tmp_path / "a")
    for steps in (3, 6):
        config = bucket_config(stage_config, manifest, tmp_path, *settings, f"train.max_steps={steps}")
        run_stage("dit", config, tmp_path / "b")
    whole, halves = (torch.load(tmp_path / n / LAST_CHECKPOINT, weights_only=True)["state_dict"] for n in "ab")
    assert all(torch.equal(halves[name], tensor) for name, tensor in whole.items())

    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    figures = next(line for line in lines if "val/loss" in line)
    assert {name for name in figures if name.startswith("val/")} == {
        "val/loss",
        "val/loss_20x32_34",
        "val/loss_16x16_17",
    }


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_folder_of_pictures_is_trained_on(
    stage_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """From files to a step: pictures of two sizes, in a bucket of pictures, told to the DiT at 120 frames a second."""
    rng = np.random.default_rng(0)
    for number in range(6):
        height, width = ((20, 32), (24, 24))[number % 2]
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.{suffix}")
        (tmp_path / f"{number}.txt").write_text(f"noise {number}")
    write_manifest(build_manifest(tmp_path), tmp_path / "clips.jsonl")
    bucket = Bucket(resolution="16x16", num_frames=1, batch_size=2)
    config = stage_config("dit", f"data.manifest={tmp_path / 'clips.jsonl'}", "data.val_clips=2")
    parts = build(replace(config, data=replace(config.data, buckets=(bucket,))))
    batch = parts.train.batch(0)
    assert batch["latent"].shape[2:] == (1, 4, 4)
    assert batch["fps"].tolist() == [120.0, 120.0]
    monkeypatch.setattr(parts.stage, "log_figures", lambda **figures: None)  # there is no trainer
    loss = parts.stage.training_step(batch, 0)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in parts.stage.model.parameters() if p.grad is not None)
    with torch.no_grad():
        figures = parts.stage.validation_metrics(next(iter(parts.val)), 0)
    assert set(figures) == {"loss", "loss_16x16_1"}


def test_validation_is_the_mean_over_ten_unshifted_times(stage_config: Any, manifest: Path, tmp_path: Path) -> None:
    parts = build(bucket_config(stage_config, manifest, tmp_path))
    stage = parts.stage
    stage.model.eval()
    batch = next(iter(parts.val))
    with torch.no_grad():
        found = stage.validation_metrics(batch, 3)
        generators = stage.validation_generators(3, len(batch["latent"]))
        expected = [
            flow_losses(stage.model, batch, torch.full((len(generators),), k / 11), generators=generators).mean()
            for k in range(1, 11)
        ]
    assert found["loss"] == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)
    assert found["loss"] == found["loss_20x32_34"]
    assert (float(batch["height"][0]), float(batch["width"][0])) == (20.0, 32.0)


def test_a_base_with_other_training_settings_is_fine_tuned(stage_config: Any, tmp_path: Path) -> None:
    settings = ("dit.drop_path=0.2", "dit.class_dropout_prob=0.3", "dit.freeze_y_embedder=true")
    save_component(STDiT3(stage_config("dit", *settings).dit), tmp_path / "released", torch.bfloat16)
    tuned = build(stage_config("dit", f"train.init_from={tmp_path / 'released'}")).stage.model
    assert tuned.config.class_dropout_prob == 0.1
    expected = load_component(STDiT3, tmp_path / "released").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tuned.state_dict().items())
    assert all(p.requires_grad for p in tuned.y_embedder.parameters())
    tuned.save_pretrained(tmp_path / "tuned")
    assert load_component(STDiT3, tmp_path / "tuned").config == tuned.config
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("released", "tuned")]
    assert weights[0] == weights[1], "as it was stored, and not in float32"
    with pytest.raises(ValueError, match=r"train\.init_from"):
        build(stage_config("dit", f"train.init_from={tmp_path / 'released'}", "dit.depth=1"))


def test_training_starts_from_pixart(
    stage_config: Any, manifest: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Everything but the temporal blocks, the frame rate, the rotary frequencies and the norms of queries and keys."""
    fresh = STDiT3(stage_config("dit", "dit.pred_sigma=true").dit).state_dict()
    weights = {
        name.replace("spatial_blocks.", "blocks."): torch.randn(tensor.shape) / 10
        for name, tensor in fresh.items()
        if not name.startswith(("temporal_blocks", "fps_embedder", "rope")) and "_norm." not in name
    }
    weights["x_embedder.proj.weight"] = weights["x_embedder.proj.weight"].squeeze(2)
    torch.save({"state_dict": weights | {"pos_embed": torch.zeros(1, 4, 32)}}, tmp_path / "PixArt-Sigma.pth")
    settings = (f"train.init_from={tmp_path / 'PixArt-Sigma.pth'}", "dit.pred_sigma=true", "dit.freeze_y_embedder=true")
    config = bucket_config(stage_config, manifest, tmp_path, *settings, "train.max_steps=2", "train.ema_decay=0")
    with caplog.at_level("INFO", logger="stages"):
        run_stage("dit", config, tmp_path / "run")
    loaded, left = len(weights), len(fresh) - len(weights)
    assert f"PixArt-Sigma.pth: {loaded} tensors loaded, {left} are fresh" in caplog.text
    trained = load_component(STDiT3, tmp_path / "run" / "export").state_dict()
    assert torch.equal(trained["y_embedder.y_proj.fc1.weight"], weights["y_embedder.y_proj.fc1.weight"])
    name = "mlp.fc1.weight"
    change = (trained[f"spatial_blocks.1.{name}"] - weights[f"blocks.1.{name}"]).norm()
    assert 0 < change < 0.5 * weights[f"blocks.1.{name}"].norm()
    with pytest.raises(ValueError, match=r"final_layer\.linear\.weight"):
        build(replace(config, dit=replace(config.dit, pred_sigma=False)))


def test_buckets_without_what_they_need_are_refused(stage_config: Any, manifest: Path, tmp_path: Path) -> None:
    config = bucket_config(stage_config, manifest, tmp_path)
    with pytest.raises(ValueError, match=r"set data\.manifest"):
        build(replace(config, data=replace(config.data, manifest=None)))
    with pytest.raises(ValueError, match=r"has 8 clips, of which data\.val_clips = 8"):
        build(replace(config, data=replace(config.data, val_clips=8)))
    with pytest.raises(ValueError, match=r"data\.buckets is read by the stage dit only"):
        data.make_sources(config.data)
    with pytest.raises(ValueError, match=r"data\.val_clips must be at least 1, got 0"):
        replace(config.data, val_clips=0)


def test_clips_that_fit_no_bucket_are_refused_before_captions_are_encoded(
    stage_config: Any, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(config: Any) -> Any:
        raise AssertionError("the text encoder is loaded")

    monkeypatch.setattr(data, "make_text_encoder", refuse)
    config = bucket_config(stage_config, manifest, tmp_path, f"data.cache_dir={tmp_path}")
    pictures = replace(config.data.buckets[0], num_frames=1)
    with pytest.raises(ValueError, match=r"(?s)clips\.jsonl.* 4 clips.*4 videos"):
        build(replace(config, data=replace(config.data, buckets=(pictures,))))
    clips = read_manifest(manifest)
    order = [clips[0], clips[2], clips[1], clips[3], clips[5], clips[7]]
    write_manifest(order, tmp_path / "uneven.jsonl")
    uneven = replace(config.data, manifest=str(tmp_path / "uneven.jsonl"), buckets=config.data.buckets[:1], val_clips=2)
    with pytest.raises(
        ValueError, match=r"clips for validation .*: none of 2 clips .*(?s:.*)  2 too small: the largest"
    ):
        build(replace(config, data=uneven))
