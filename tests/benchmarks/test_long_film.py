"""The arithmetic of `benchmarks/long_film.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.long_film import Film, descendants, halves, tree_bytes, verdicts, window_difference
from pipelines.runs.generate import generate
from tests.pipelines.films import prepared_film
from tests.pipelines.tiny_model import make_tiny_model

SHORT = Film(
    minutes=1,
    num_segments=12,
    total_s=60,
    peak_bytes=1000,
    first_half_s=5.0,
    second_half_s=5.0,
    window_difference=0.0,
)
LONG = replace(SHORT, minutes=10, peak_bytes=1040, second_half_s=5.2, window_difference=None)


def test_halves_are_means_from_commit_to_commit() -> None:
    assert halves([10, 11, 12, 15, 18]) == (1, 3)
    assert halves([0, 2, 3]) == (2, 1)
    with pytest.raises(ValueError, match="need three segments, got 2"):
        halves([0, 1])


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        ({}, None),
        ({"peak_bytes": 1051}, "flat memory"),
        ({"second_half_s": 5.3}, "linear time"),
        ({"window_difference": 0.1}, "equal windows"),
    ],
)
def test_verdicts(change: dict, failed: str | None) -> None:
    found = verdicts([replace(LONG, **change), SHORT])
    assert [name for name, holds in found.items() if not holds] == ([failed] if failed else [])


def test_whole_tree_of_processes_counts() -> None:
    assert descendants({2: 1, 3: 2, 4: 3, 5: 9}, 2) == {2, 3, 4}
    before = tree_bytes(os.getpid())
    code = "x = bytearray(b'a' * 50_000_000); print('ready', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout.readline()
        assert tree_bytes(os.getpid()) - before > 45_000_000
        child.communicate(b"\n")


@pytest.mark.slow
def test_windows_are_compared_with_the_whole_take(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "tiny")
    shots = [{"prompt": "a red circle", "duration": "153f"}]
    film = generate(prepared_film(model, tmp_path / "film.mp4", *shots))
    assert window_difference(film.run_dir, 400) < 1e-5
    assert window_difference(film.run_dir, 40) is None
