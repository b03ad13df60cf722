"""The plain formula is that of the model, and figures follow from the seconds."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from arlon.models.stdit import STDiT3Config
from benchmarks import stdit_forward as bench

SMALL = [
    "--width",
    "16",
    "--depth",
    "2",
    "--heads",
    "2",
    "--latent",
    "4x3x4x6",
    "--text",
    "5",
    "--caption-channels",
    "6",
]
QUICK = ["--rounds", "1", "--matmul", "64"]


def test_the_plain_formula_is_that_of_the_model() -> None:
    config = STDiT3Config(hidden_size=16, depth=2, num_heads=2, caption_channels=6, model_max_length=5)
    dit, inputs = bench.make_dit(config), bench.make_inputs(config, (3, 4, 6), 5)
    with torch.no_grad():
        expected = bench.plain_forward(dit, inputs)
        got = dit(inputs.latent, inputs.t, inputs.text, **inputs.sizes)
        halves = bench.guided_step(dit, inputs)()
    assert bench.relative_error(got, expected) < 1e-6
    assert bench.relative_error(halves[:1], expected) < 1e-6
    assert bench.relative_error(halves[1:], expected) > 1e-2


def test_shares_follow_from_seconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench.main([*SMALL, *QUICK, "--steps", "7", "--bfloat16", "always", "--json", str(tmp_path / "out.json")])
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    one, two = rows["prepared"], rows["guided step"]
    assert two["rate"] * two["seconds"] == pytest.approx(2 * one["rate"] * one["seconds"])
    assert one["share"] == pytest.approx(one["rate"] / rows["matmul"]["rate"])
    assert rows["matmul"]["rate"] * rows["matmul"]["seconds"] == pytest.approx(2 * 64**3)
    sample = rows["sample"]
    assert sample["seconds"] >= 7 * two["seconds"]
    assert sample["share_of_plain"] == pytest.approx(sample["seconds"] / (14 * rows["plain"]["seconds"]))
    assert one["error"] < 1e-5 < rows["prepared, bfloat16"]["error"] < 0.05
    assert "of 14 plain passes" in capsys.readouterr().out


@pytest.mark.parametrize("able", [False, True])
def test_bfloat16_is_left_out_where_the_cpu_does_not_compute_in_it(
    able: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "has_fast_bfloat16", lambda device: able)
    bench.main([*SMALL, *QUICK])
    printed = capsys.readouterr().out
    assert ("prepared, bfloat16" in printed) is able
    assert ("sample, bfloat16" in printed) is able
    assert ("bfloat16 not measured" in printed) is not able


def test_latents_are_read_or_refused() -> None:
    assert bench.parse_latent("4x3x32x16") == (4, 3, 32, 16)
    for wrong in ("4x3x32", "4x0x8x8", "axbxcxd"):
        with pytest.raises(argparse.ArgumentTypeError, match="CxTxHxW"):
            bench.parse_latent(wrong)
    with pytest.raises(argparse.ArgumentTypeError, match="whole patches"):
        bench.parse_latent("4x3x5x8")


def test_wrong_sizes_end_in_one_line() -> None:
    with pytest.raises(SystemExit, match="error: STDiT3Config: hidden_size"):
        bench.main(["--width", "18", "--heads", "4", "--rounds", "1"])
