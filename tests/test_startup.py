"""The command line answers `--help` without loading the libraries that compute."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from pipelines.cli import COMMANDS

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "numpy", "scipy", "transformers", "diffusers", "lightning", "ray", "av"}

# The loaded modules are looked at, not the clock: this fails on every machine or on none.
PROBE = """
import json, sys
from pipelines.cli import main

loaded = {}
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["arlon", *arguments]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, stop.code
    loaded[" ".join(arguments)] = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps(loaded), file=sys.stderr)
"""


def test_help_loads_no_heavy_library(tmp_path: Path) -> None:
    questions = [["--help"], ["--version"], *([command.__name__, "--help"] for command in COMMANDS)]
    result = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(questions)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Usage: arlon") == len(questions) - 1
    loaded = json.loads(result.stderr)
    found = {question: sorted(HEAVY & set(modules)) for question, modules in loaded.items()}
    assert found == {question: [] for question in loaded}
