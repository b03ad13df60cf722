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

from tests.import_layers import LAYERS, Graph, circles, import_graph, layer_problems

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
    return {"threads": threads, "dtype": dtype, "random state": randomness,
            "environment": dict(os.environ), "files": sorted(os.listdir("."))}

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


@pytest.fixture(scope="module")
def imports() -> Graph:
    """What every module of this repository imports of it."""
    return import_graph(ROOT, FORBIDDEN)


def test_imports_run_downwards_through_the_layers(imports: Graph) -> None:
    problems = layer_problems(imports)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("package", LAYERS)
def test_an_import_from_the_lowest_to_the_highest_layer_is_found(imports: Graph, package: str) -> None:
    names = LAYERS[package].split()
    lowest, highest = f"{package}.{names[0]}", f"{package}.{names[-1]}"
    changed = {**imports, lowest: frozenset({highest})}
    assert f"{lowest} imports {highest}, which is not below it in {package}" in layer_problems(changed)


def test_no_imports_run_in_a_circle(imports: Graph) -> None:
    found = circles(imports)
    assert not found, "\n".join(found)


LOWER, UPPER = "from house.cellar import beer", "from house.roof.tiles import red"


@pytest.mark.parametrize(
    ("cellar", "problem"),
    [
        ("", None),
        (UPPER, "house.cellar imports house.roof.tiles"),
        (f"def drink():\n    {UPPER}", "house.cellar imports house.roof.tiles"),
        ("def drink():\n    import house.roof.tiles as above", "house.cellar imports house.roof.tiles"),
        (f"from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {UPPER}", "house.cellar imports house.roof.tiles"),
        ("from house import roof", "house.cellar imports house.roof"),
        ("import house", "house.cellar imports house"),
        ("from house.garage import car", "house.cellar imports house.garage"),
    ],
)
def test_an_import_that_runs_upwards_or_sideways_is_found(tmp_path: Path, cellar: str, problem: str | None) -> None:
    graph = made_up_house(tmp_path, cellar=cellar)
    found = layer_problems(graph, {"house": "cellar garage\n roof"})
    assert [problem is not None and problem in line for line in found] == [True] * (problem is not None)


def test_a_module_without_a_layer_is_found(tmp_path: Path) -> None:
    assert "house.garage is in no layer" in layer_problems(made_up_house(tmp_path), {"house": "cellar\n roof"})[0]


def test_a_circle_is_found(tmp_path: Path) -> None:
    assert not circles(made_up_house(tmp_path))
    graph = made_up_house(tmp_path, cellar=f"def drink():\n    {UPPER}")
    assert circles(graph) == ["house.cellar -> house.roof.tiles -> house.cellar"]


def made_up_house(folder: Path, *, cellar: str = "") -> dict[str, frozenset[str]]:
    """Imports of a package of four modules, of which one, as it should, imports one below it."""
    texts = {"__init__": "", "cellar": cellar, "garage": "", "roof/__init__": "", "roof/tiles": LOWER}
    for name, text in texts.items():
        path = folder / "house" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return dict(import_graph(folder, ["house"]))


def test_layers_are_those_of_packages_that_exist() -> None:
    missing = [package for package in LAYERS if not (ROOT / package.replace(".", "/") / "__init__.py").is_file()]
    assert not missing, f"renamed or removed: {missing}"


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
