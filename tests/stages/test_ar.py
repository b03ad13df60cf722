"""What the stage of the code transformer shows its model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from arlon.data.manifest import Clip, write_manifest
from arlon.data.samples import FixedBatches, MixedBatches
from arlon.data.video_io import VideoWriter
from stages.ar import ARStageConfig, build, replace_codes
from stages.data import load_data
from tests.stages.conftest import StageConfigs


def test_the_asked_share_of_codes_is_replaced_by_codes_of_the_codebook():
    codes = torch.full((64, 128), 7)
    noisy = replace_codes(codes, 0.25, 32, torch.Generator().manual_seed(0))
    again = replace_codes(codes, 0.25, 32, torch.Generator().manual_seed(0))
    assert torch.equal(noisy, again)
    assert (noisy != codes).float().mean() == pytest.approx(0.25 * 31 / 32, abs=0.02)  # one in 32 is drawn as it was
    assert set(noisy.unique().tolist()) == set(range(32))
    assert (codes == 7).all()


def test_without_code_noise_codes_stay_and_nothing_is_drawn():
    codes, generator = torch.arange(12).reshape(3, 4), torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert replace_codes(codes, 0.0, 12, generator) is codes
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_an_impossible_share_is_refused(share):
    with pytest.raises(ValueError, match=r"code_noise must be in \[0, 1\)"):
        ARStageConfig(code_noise=share)


LONG_TAKES = "{num_takes: 4, num_frames: 85, height: 16, width: 16, switch_prob: 1.0, seed: 7}"
LONG = f"extra_takes=[{{shapes: {LONG_TAKES}, share: 0.5}}]"


@pytest.mark.slow
def test_a_share_of_the_steps_is_made_with_the_other_takes(stage_config: StageConfigs) -> None:
    parts = build(stage_config("ar", LONG))
    plain = build(stage_config("ar"))
    assert isinstance(parts.train, MixedBatches)
    ours = [parts.train.batch(number) for number in range(24)]
    same = [
        all(torch.equal(batch[name], other[name]) for name in batch)
        for batch, other in ((batch, plain.train.batch(number)) for number, batch in enumerate(ours))
    ]
    assert 6 <= sum(same) <= 18, "half of the steps are those of the takes of data"
    assert {batch["codes"].shape[1] for batch in ours} == {6 * 4}


def test_extra_takes_must_leave_steps_for_the_takes_of_data(stage_config: StageConfigs) -> None:
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\)"):
        stage_config("ar", "extra_takes=[{share: 1.0}]")
    with pytest.raises(ValueError, match="must be below 1"):
        stage_config("ar", "extra_takes=[{share: 0.5}, {share: 0.5}]")


EXTRA = "data.extra_shapes=[{num_takes: 3, num_frames: 51, height: 16, width: 16, more_colours: true, seed: 7}]"


@pytest.mark.slow
def test_takes_of_another_palette_are_trained_on_beside_the_others(stage_config: StageConfigs) -> None:
    config = stage_config("ar", EXTRA)
    plain, joined = load_data(stage_config("ar").data, with_text=True), load_data(config.data, with_text=True)
    assert (len(plain.train), len(joined.train), len(joined.val)) == (6, 9, len(plain.val))
    assert all(joined.train.latent(i).equal(plain.train.latent(i)) for i in range(6))
    others = load_data(replace(config.data, extra_shapes=(), shapes=config.data.extra_shapes[0]), with_text=True)
    assert all(joined.train.latent(6 + i).equal(others.train.latent(i)) for i in range(3))
    assert joined.train.spans(7) == others.train.spans(1)
    assert joined.train.key not in (plain.train.key, others.train.key)
    assert set(joined.train.all_captions()) == {*plain.train.all_captions(), *others.train.all_captions()}
    build(stage_config("ar", EXTRA, LONG)).train.batch(0)  # extra takes may have another length
    with pytest.raises(ValueError, match="must have one latent shape"):
        load_data(stage_config("ar", EXTRA.replace("51", "34")).data, with_text=True)


@pytest.mark.slow
def test_own_clips_replace_all_rendered_takes_unless_asked_otherwise(
    stage_config: StageConfigs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clips, rng = [], np.random.default_rng(0)
    for number in range(3):
        path = tmp_path / f"{number}.mp4"
        with VideoWriter(path, fps=12, preset="ultrafast") as writer:
            writer.append(rng.integers(0, 256, (80, 16, 16, 3), dtype=np.uint8))
        clips.append(Clip(path=path, text=f"noise {number}", num_frames=80, height=16, width=16, fps=12.0))
    write_manifest(clips, tmp_path / "clips.jsonl")
    settings = (f"data.manifest={tmp_path / 'clips.jsonl'}", "data.val_clips=1", "data.shapes.num_frames=51")
    clips_alone, mixed = (
        stage_config("ar", EXTRA, LONG, *settings, f"data.mix_rendered={mix}") for mix in ("false", "true")
    )
    found = load_data(clips_alone.data, with_text=True)
    assert (len(found.train), len(found.val)) == (2, 1)
    assert set(found.train.all_captions()) == {"noise 0", "noise 1"}
    assert len(load_data(mixed.data, with_text=True).train) == 2 + 3

    with caplog.at_level("INFO", logger="stages"):
        assert isinstance(build(clips_alone).train, FixedBatches), "no step is made with rendered takes"
    assert "extra_takes" in caplog.text
    assert "data.extra_shapes" in caplog.text
    assert isinstance(build(mixed).train, MixedBatches)
