"""What README.md shows is true: its commands parse and run, its links lead somewhere, its code runs."""

from __future__ import annotations

import importlib
import re
import runpy
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner

from arlon.data.video_io import VideoWriter
from arlon.film.storyboard import parse_storyboard
from pipelines.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?<=\n\n)((?: {4}\S.*\n|\n(?= {4}))+)")
INLINE = re.compile(r"`([^`\n]+)`")
FOLDERS = ("arlon", "stages", "pipelines", "configs", "benchmarks", "tests", "docs", "examples")


def blocks(*languages: str) -> list[str]:
    """Fenced blocks of these languages."""
    return [text for language, text in FENCE.findall(README) if language in languages]


def command_lines() -> list[list[str]]:
    """Every command that README shows, in blocks and within sentences, split into words and without comments."""
    prose = FENCE.sub("", README)
    shown = "\n".join([*blocks("", "sh", "bash", "shell", "console"), *INDENTED.findall(prose)])
    lines = [line.strip().removeprefix("$ ") for line in shown.replace("\\\n", " ").splitlines()]
    lines += [text for text in INLINE.findall(prose) if " " in text]
    starts = ("arlon ", ".venv/bin/arlon ", "make ", "python ", "python3 ")
    return [shlex.split(line, comments=True) for line in lines if line.startswith(starts)]


def commands(*names: str) -> list[list[str]]:
    """What follows these names in the commands that README shows, each once."""
    return [list(words) for words in dict.fromkeys(tuple(w[1:]) for w in command_lines() if w[0] in names)]


ARLON = [words for words in commands("arlon", ".venv/bin/arlon") if len(words) > 1]
NAMED = [words[0] for words in commands("arlon", ".venv/bin/arlon") if len(words) == 1]
"""Commands that a sentence names without what they need."""
MAKE = commands("make")
PYTHON = commands("python", "python3")
PYTHON_BLOCKS = blocks("python", "py")


def shown(words: list[str]) -> str:
    return shlex.join(words)[:80]


def test_readme_shows_commands_of_every_kind() -> None:
    assert {"generate", "resume", "verify", "evaluate", "doctor"} <= {words[0] for words in ARLON}
    assert {"setup", "demo", "check", "test"} <= {words[0] for words in MAKE}


def test_commands_that_sentences_name_exist() -> None:
    assert {name for name in NAMED if not name.isupper()} <= set(get_command(app).commands)


@pytest.mark.parametrize("words", ARLON, ids=shown)
def test_options_of_a_command_exist(words: list[str]) -> None:
    group = get_command(app)
    name, command, rest = group.resolve_command(group.make_context("arlon", list(words)), list(words))
    assert name == words[0]
    assert command.make_context(name, rest).params  # refuses unknown options and values


@pytest.mark.parametrize("words", MAKE, ids=shown)
def test_a_target_of_make_exists_and_its_settings_are_those_of_the_stage(words: list[str]) -> None:
    target, *variables = words
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE)
    assert all(re.search(rf"^{value.split('=')[0]} \?=", makefile, re.MULTILINE) for value in variables)
    config = ROOT / "configs" / "shapes" / f"{target}.yaml"
    settings = [value.removeprefix("ARGS=") for value in variables if value.startswith("ARGS=")]
    if config.exists() and settings:
        from stages.train import load_stage_config

        assert load_stage_config(target, [config], settings[0].split())


@pytest.mark.parametrize("words", PYTHON, ids=shown)
def test_a_script_exists_and_knows_its_options(words: list[str]) -> None:
    if words[0] == "-m":
        path = ROOT.joinpath(*words[1].split("."))
        file = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__main__.py"
    else:
        file = ROOT / words[0]
    text = file.read_text(encoding="utf-8")
    for word in words[1:]:
        if word.startswith("--"):
            assert f'"{word.split("=")[0]}"' in text


def test_links_and_paths_lead_to_files() -> None:
    prose = FENCE.sub("", README)
    links = re.findall(r"\]\(([^)#\s]+)", prose) + re.findall(r"(?:src|href)=\"([^\"#]+)", prose)
    paths = [text for text in INLINE.findall(prose) if re.fullmatch(rf"(?:{'|'.join(FOLDERS)})/[\w./-]*", text)]
    local = [link for link in links if "://" not in link and not link.startswith("mailto:")]
    assert local
    missing = [name for name in (*local, *paths) if not (ROOT / name).exists()]
    assert not missing


def test_names_of_the_library_can_be_imported() -> None:
    for dotted in re.findall(r"`((?:arlon|stages|pipelines)(?:\.\w+)+)`", README):
        module, _, name = dotted.rpartition(".")
        found = importlib.import_module(module)
        assert hasattr(found, name) or importlib.import_module(dotted), dotted


def test_storyboards_can_be_read() -> None:
    boards = [yaml.safe_load(text) for text in blocks("yaml", "yml")]
    films = [parse_storyboard(board) for board in boards if "shots" in board]
    assert films


@pytest.fixture(scope="module")
def workplace(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that README's commands name; its films are those of the tiny model."""
    folder = tmp_path_factory.mktemp("readme")
    board = next(text for text in blocks("yaml", "yml") if "shots" in text)
    (folder / "film.yaml").write_text(board, encoding="utf-8")
    (folder / "films.jsonl").write_text(
        '{"prompts": ["a red circle"], "duration": "51f", "num_threads": 1}\n', encoding="utf-8"
    )
    frames = np.random.default_rng(0).integers(0, 255, (34, 32, 48, 3), np.uint8)
    with VideoWriter(folder / "mine.mp4", fps=8.0) as writer:
        writer.append(frames)
    from PIL import Image

    for name in ("start.png", "end.png"):
        Image.fromarray(frames[0]).save(folder / name)
    made = ["generate", "--storyboard", "film.yaml", "--output", "film.mp4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = CliRunner().invoke(app, [*made, "--model", str(tiny_model), "--threads", "1"])
    assert result.exit_code == 0, result.stderr
    (folder / "films").mkdir()
    for path in ("film.mp4", "film.json"):
        shutil.copy(folder / path, folder / "films")
    return folder


RUNNABLE = [words for words in ARLON if "ray" not in words and "--resolution" not in words]
"""Without films on Ray, which have tests of their own, and films larger than the tiny model's."""


@pytest.mark.slow
@pytest.mark.parametrize("words", RUNNABLE, ids=shown)
def test_a_command_runs_with_a_small_model(
    words: list[str], workplace: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = shutil.copytree(workplace, tmp_path / "here")
    options = {
        "generate": ["--overwrite", "--threads", "1", "--model", str(tiny_model)],
        "plan": ["--model", str(tiny_model)],
        "batch": ["--model", str(tiny_model)],
        "doctor": ["--model", str(tiny_model)],
    }
    monkeypatch.chdir(here)
    result = CliRunner().invoke(app, [*words, *options.get(words[0], [])])
    assert result.exit_code == 0, result.stderr
    if "--output" in words:
        assert (here / words[words.index("--output") + 1]).exists()


@pytest.mark.slow
@pytest.mark.parametrize("code", PYTHON_BLOCKS, ids=range(len(PYTHON_BLOCKS)))
def test_python_code_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "example.py"
    script.write_text(code, encoding="utf-8")
    runpy.run_path(str(script))
