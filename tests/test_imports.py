"""Who imports whom, and that importing does nothing."""

from __future__ import annotations

import ast
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "arlon": {"stages", "pipelines", "lightning", "ray", "typer"},
    "stages": {"pipelines", "ray"},
    "pipelines": {"stages", "lightning"},
}
ONLY_IN = {
    "ray": {"pipelines/executors/ray_graph.py"},
    "omegaconf": {"arlon/config.py"},
    "av": {"arlon/data/video_io.py"},
}
HEAVY = {"lightning", "ray", "typer", "transformers", "diffusers", "tensorboard"}
"""Packages that no module of `arlon` may load when it is imported."""

PROBE = """
import importlib, json, os, random, sys
import torch

def state():
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    randomness = torch.random.get_rng_state().tolist(), random.getstate()
    # torch's compiler notes its cache folder in the environment when vector_quantize_pytorch loads it.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TORCHINDUCTOR_")}
    return {"threads": threads, "dtype": dtype, "random state": randomness,
            "environment": environment, "files": sorted(os.listdir("."))}

found = []
for name in sys.argv[1:]:
    before = state()
    importlib.import_module(name)
    after = state()
    found += [name + " changes " + what for what in before if after[what] != before[what]]
    found += [name + " loads " + heavy for heavy in HEAVY if heavy in sys.modules]
print(json.dumps(found))
"""


def modules(package: str) -> list[str]:
    files = sorted((ROOT / package).rglob("*.py"))
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    return [name.removesuffix(".__init__") for name in names]


def imported_packages(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.relative_to(ROOT)} has a relative import"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_package_imports_only_what_it_may(package: str) -> None:
    found = {
        f"{file.relative_to(ROOT)} imports {name}"
        for file in (ROOT / package).rglob("*.py")
        for name in imported_packages(file) & FORBIDDEN[package]
    }
    assert not found, "\n".join(sorted(found))


@pytest.mark.parametrize("library", ONLY_IN)
def test_library_is_imported_in_one_place(library: str) -> None:
    found = {
        file.relative_to(ROOT).as_posix()
        for package in FORBIDDEN
        for file in (ROOT / package).rglob("*.py")
        if library in imported_packages(file)
    }
    assert found <= ONLY_IN[library], f"{library} is imported in {sorted(found - ONLY_IN[library])}"


@pytest.mark.slow
def test_modules_of_arlon_import_without_side_effects(tmp_path: Path) -> None:
    code = f"HEAVY = {sorted(HEAVY)!r}\n{PROBE}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code, *modules("arlon")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 1, f"an import prints: {result.stdout!r}"
    found = json.loads(result.stdout)
    assert not found, "\n".join(found)


def test_network_is_refused() -> None:
    with socket.socket() as stream, pytest.raises(RuntimeError, match="without network"):
        stream.connect(("8.8.8.8", 53))
