"""A wheel installed with its base dependencies alone: every command answers, and says what an extra would add."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import venv
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.main import get_command

from pipelines.cli import COMMANDS, app

pytestmark = pytest.mark.slow
EXTRAS = ("ray", "lightning", "tensorboard", "pytest", "hypothesis")


def base_distributions() -> set[str]:
    """Names of everything that the base dependencies of this project bring with them, as it is installed here."""
    found: set[str] = set()
    todo = [(Requirement(line), "") for line in base_requirements()]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        extras = tuple(requirement.extras) or ("",)
        if name in found and extras == ("",):
            continue
        found.add(name)
        todo += [(Requirement(line), extra) for line in metadata.requires(name) or () for extra in extras]
    return found


def base_requirements() -> list[str]:
    """`dependencies` of `pyproject.toml`."""
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)["project"]["dependencies"]


def link_distribution(name: str, site_packages: Path) -> None:
    """Make one installed distribution visible in another environment, by links to its files and folders."""
    distribution = metadata.distribution(name)
    tops = {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}
    for top in tops:
        target = site_packages / top
        if not target.exists():
            target.symlink_to(Path(str(distribution.locate_file(top))).resolve())


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `python` and `arlon` of a fresh environment without extras. Nothing is downloaded."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    (site_packages,) = (folder / "env" / "lib").glob("python*/site-packages")
    for name in sorted(base_distributions()):
        link_distribution(name, site_packages)
    install = ["-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, *install], check=True)
    return python.parent


def run(scripts: Path, cwd: Path, name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command of the fresh environment, away from the source tree."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [str(scripts / name), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_no_extra_is_there_and_the_package_is_that_of_the_wheel(scripts: Path, tmp_path: Path) -> None:
    code = (
        "import importlib.util, json, arlon, pipelines;"
        f"print(json.dumps([[n for n in {EXTRAS!r} if importlib.util.find_spec(n)], pipelines.__path__[0]]))"
    )
    result = run(scripts, tmp_path, "python", "-c", code)
    assert result.returncode == 0, result.stderr
    extras, path = json.loads(result.stdout)
    assert extras == []
    assert Path(path).is_relative_to(scripts.parent)


@pytest.mark.parametrize("command", ["", *sorted(get_command(app).commands)])
def test_a_command_tells_its_options(scripts: Path, tmp_path: Path, command: str) -> None:
    result = run(scripts, tmp_path, "arlon", *([command] if command else []), "--help")
    assert result.returncode == 0, result.stderr
    assert f"Usage: arlon {command}".strip() in result.stdout
    assert result.stderr == ""


def test_all_commands_are_asked() -> None:
    assert len(COMMANDS) == len(get_command(app).commands) > 10


def test_a_film_is_made_and_verified(scripts: Path, tmp_path: Path, tiny_model: Path) -> None:
    made = run(
        *(scripts, tmp_path, "arlon", "generate", "--model", tiny_model, "--prompt", "a red circle"),
        *("--duration", "51f", "--threads", 1, "--sheet", "--output", "film.mp4"),
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout.split() == ["film.mp4", "film.png"]
    checked = run(scripts, tmp_path, "arlon", "verify", "film.run")
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("command", ["generate", "batch"])
def test_ray_is_missed_before_anything_is_made(scripts: Path, tmp_path: Path, tiny_model: Path, command: str) -> None:
    (tmp_path / "films.jsonl").write_text('{"prompts": ["a red circle"], "duration": "51f"}\n', encoding="utf-8")
    source = {
        "generate": ["--prompt", "a red circle", "--output", "film.mp4"],
        "batch": ["films.jsonl", "--output-dir", "films"],
    }
    result = run(scripts, tmp_path, "arlon", command, *source[command], "--executor", "ray", "--model", tiny_model)
    assert result.returncode != 0
    assert "pip install 'arlon[ray]'" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["films.jsonl"]


def test_the_doctor_names_what_is_not_installed(scripts: Path, tmp_path: Path, tiny_model: Path) -> None:
    result = run(scripts, tmp_path, "arlon", "doctor", "--model", tiny_model)
    assert result.returncode == 0, result.stderr
    assert "arlon[ray]" in result.stdout
    assert "arlon[train]" in result.stdout


def test_training_says_which_extra_it_needs(scripts: Path, tmp_path: Path) -> None:
    result = run(scripts, tmp_path, "python", "-m", "stages.train", "--help")
    assert result.returncode == 0, result.stderr
    result = run(scripts, tmp_path, "python", "-m", "stages.train", "vae")
    assert result.returncode == 2
    assert result.stderr.splitlines() == ["error: training needs Lightning: pip install 'arlon[train]'"]
