"""Wheels of this project."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("arlon", "stages", "pipelines", "configs")


def build_wheel(source: Path, target: Path) -> Path:
    """Build the wheel from a copy, so that the source tree stays clean; nothing is downloaded.

    Args:
        source: An empty folder for the copy.
        target: Folder of the wheel.
    """
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns(".*", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    result = subprocess.run(
        [*command, "--wheel-dir", str(target), str(source)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return next(target.glob("arlon-*.whl"))
