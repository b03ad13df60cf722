"""The wheel holds the code, the configurations and the packaged weights, and nothing else."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tests.wheels import PACKAGES, ROOT

DATA = ("configs/**/*.yaml", "arlon/py.typed", "arlon/weights/**/*.json", "arlon/weights/**/*.safetensors")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel_files(wheel: Path) -> dict[str, int]:
    """Files of a wheel and their sizes."""
    with zipfile.ZipFile(wheel) as archive:
        return {item.filename: item.file_size for item in archive.infolist() if not item.is_dir()}


def expected_files(*patterns: str) -> dict[str, int]:
    """Files of the source tree and their sizes; a leading dot marks a temporary file."""
    found = [file for pattern in patterns for file in ROOT.glob(pattern) if not file.name.startswith(".")]
    return {file.relative_to(ROOT).as_posix(): file.stat().st_size for file in found}


def test_wheel_holds_every_module(wheel_files: dict[str, int]) -> None:
    modules = expected_files(*(f"{package}/**/*.py" for package in PACKAGES))
    assert modules
    assert not modules.keys() - wheel_files.keys()


def test_wheel_holds_configurations_and_weights(wheel_files: dict[str, int]) -> None:
    data = expected_files(*DATA)
    assert any(name.endswith(".yaml") for name in data)
    assert {name: wheel_files.get(name) for name in data} == data


def test_wheel_holds_nothing_else(wheel_files: dict[str, int]) -> None:
    top = {name.split("/")[0] for name in wheel_files}
    assert top == {*PACKAGES, "arlon-0.1.0.dist-info"}
    assert not [name for name in wheel_files if "__pycache__" in name or "test" in Path(name).name]


def test_wheel_installs_the_command_and_the_licence(wheel_files: dict[str, int]) -> None:
    assert "arlon-0.1.0.dist-info/entry_points.txt" in wheel_files
    assert "arlon-0.1.0.dist-info/licenses/LICENSE" in wheel_files
