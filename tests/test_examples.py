"""The scripts in examples/ run from top to bottom and write pictures that show something."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
PICTURES = {
    "make_a_film.py": ["make_a_film/film.png", "make_a_film/segments.png", "make_a_film/solvers.png"],
    "look_inside.py": ["look_inside/codes.png", "look_inside/words.png", "look_inside/heads.png"],
}


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*PICTURES, "moving_picture.py"}


def run_example(name: str, *arguments: Path, folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, EXAMPLES / name, *arguments]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def num_colours(picture: Path) -> int:
    return len(np.unique(np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3), axis=0))


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_an_example_runs_and_draws(name: str, tmp_path: Path) -> None:
    run_example(name, folder=tmp_path)
    for picture in PICTURES[name]:
        assert num_colours(tmp_path / "outputs" / picture) > 50


@pytest.mark.slow
def test_a_moving_picture_is_made_with_any_model(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "picture.webp"
    run_example("moving_picture.py", path, tiny_model, folder=tmp_path)
    assert num_colours(path) > 50
    with Image.open(path) as picture:
        assert picture.n_frames > 10


def test_the_moving_picture_of_the_readme_is_small_and_moves() -> None:
    path = ROOT / "docs" / "demo.webp"
    assert path.stat().st_size < 1_500_000
    with Image.open(path) as picture:
        assert picture.n_frames > 100
