"""The benchmark of given frames: they pass the real path, and the figures are of the right frames."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from arlon.evaluation import cases as suite
from benchmarks import given_frames as bench
from benchmarks.prompt_accuracy import load_model


def test_psnr_is_of_pixels_in_their_range() -> None:
    frames = np.zeros((1, 4, 4, 3), dtype=np.uint8)
    assert bench._psnr(frames + 51, frames) == pytest.approx(-20 * math.log10(0.2), abs=1e-4)


@pytest.mark.slow
def test_the_first_frames_are_those_given_as_the_vae_shows_them(tiny_model: Path, tmp_path: Path) -> None:
    model = load_model(str(tiny_model), num_inference_steps=1, settings={"num_threads": 1})
    defaults, grid = model.geometry.defaults, model.geometry.grid
    seconds = [grid.segment_frames / defaults.fps]
    case = suite.sample_cases(1, seconds=seconds, aspect=defaults.width / defaults.height)[0]
    made = bench.make_case(case, "video", model, tmp_path)
    assert len(made.frames) == grid.segment_frames
    assert made.psnr == pytest.approx(made.vae_psnr, abs=0.05)


@pytest.mark.slow
def test_the_command_writes_its_figures(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    places = ["--json", str(out), "--sheet", str(tmp_path / "sheet.png")]
    bench.main(["--model", str(tiny_model), "--cases", "1", "--modes", "image", *places])
    assert json.loads(out.read_text())["image"][0]["psnr"] > 0
    assert (tmp_path / "sheet.png").exists()
    assert "| image |" in capsys.readouterr().out
