"""The Makefile refuses what it would otherwise ignore."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def dry_run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What `make` says it would do, without doing it and without the variables of an outer `make`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "--dry-run", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("option", ["steps=3", "train.max_steps=3", "args=--quiet"])
def test_unknown_variable_is_refused(option: str) -> None:
    result = dry_run("dit", option)
    assert result.returncode != 0
    assert result.stdout == ""
    name = option.partition("=")[0]
    assert all(word in result.stderr for word in (name, "ARGS", "CONFIG")), result.stderr


def test_known_variables_reach_the_command() -> None:
    result = dry_run("ar", "ARGS=train.max_steps=3 train.seed=1", "CONFIG=configs/other")
    assert result.returncode == 0, result.stderr
    assert "--config configs/other/ar.yaml train.max_steps=3 train.seed=1" in result.stdout


def test_known_variables_reach_every_part_of_a_training() -> None:
    result = dry_run("train", "ARGS=train.max_steps=3")
    assert result.returncode == 0, result.stderr
    trained = [line for line in result.stdout.splitlines() if " -m stages.train " in line]
    assert len(trained) == 11
    assert all(line.endswith(" train.max_steps=3") for line in trained)
