"""What pyproject.toml says of dependencies is true: all are declared, and their lower bounds are the tested ones."""

from __future__ import annotations

import ast
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PACKAGES = ("arlon", "stages", "pipelines")
TOOLS = {"mypy", "ruff", "types-pyyaml"}
"""Tools that look at the source; the tests with the oldest versions do not run them."""
OPTIONAL = {"torchvision"}
"""Libraries of extras that neither constraints file installs; tests have stand-ins for them."""
INSTALLED_BY_HAND = {"pyiqa"}
"""Imported only for a metric that asks the user to install them, with the command to do so."""


def declared(*, dev: bool) -> dict[str, Requirement]:
    """Requirements of pyproject.toml by name, those of all extras among them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: lines for name, lines in project["optional-dependencies"].items() if dev or name != "dev"}
    requirements = [Requirement(line) for lines in (project["dependencies"], *extras.values()) for line in lines]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def pinned(file: str) -> dict[str, Version]:
    """Exact versions of a constraints file by name."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    pins = (Requirement(line) for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(pin.name): Version(next(iter(pin.specifier)).version) for pin in pins}


@pytest.mark.parametrize("name", sorted(declared(dev=True).keys() - TOOLS - OPTIONAL))
def test_lower_bound_is_the_oldest_tested_version(name: str) -> None:
    bounds = [Version(part.version) for part in declared(dev=True)[name].specifier if part.operator == ">="]
    assert bounds == [pinned("constraints-oldest.txt")[name]]


@pytest.mark.parametrize("name", sorted(declared(dev=True).keys() - OPTIONAL))
def test_newest_tested_version_is_admitted(name: str) -> None:
    version = pinned("constraints.txt")[name]
    assert version in declared(dev=True)[name].specifier


def test_every_imported_library_is_declared() -> None:
    imported: set[str] = set()
    for file in (file for package in PACKAGES for file in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").partition(".")[0])
    libraries = imported - sys.stdlib_module_names - set(PACKAGES) - INSTALLED_BY_HAND
    distributions = packages_distributions()
    known = declared(dev=False).keys()
    missing = {
        library
        for library in libraries
        if known.isdisjoint(canonicalize_name(name) for name in distributions.get(library, [library]))
    }
    assert not missing, f"imported, but not declared in pyproject.toml: {sorted(missing)}"
