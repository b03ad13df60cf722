"""What README.md, CONTRIBUTING.md and CHANGELOG.md show is true.

Commands parse and run, links lead somewhere, code runs, and tables of keys and solvers are complete.
"""

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
from arlon.diffusion.solvers import SOLVERS
from arlon.film.storyboard import parse_storyboard
from arlon.film.storyboard_values import FILM_READERS, SHOT_READERS
from pipelines.cli import app

ROOT = Path(__file__).parents[1]
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")}
README = PAGES["README.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?<=\n\n)((?: {4}\S.*\n|\n(?= {4}))+)")
INLINE = re.compile(r"`([^`\n]+)`")
FOLDERS = ("arlon", "stages", "pipelines", "configs", "benchmarks", "tests", "docs", "examples")


def blocks(*languages: str, page: str = README) -> list[str]:
    """Fenced blocks of these languages."""
    return [text for language, text in FENCE.findall(page) if language in languages]


def command_lines() -> list[list[str]]:
    """Every command that the pages show, in blocks and within sentences, split into words and without comments."""
    return [words for page in PAGES.values() for words in command_lines_of(page)]


def command_lines_of(page: str) -> list[list[str]]:
    """Every command that a page shows."""
    prose = FENCE.sub("", page)
    shown = "\n".join([*blocks("", "sh", "bash", "shell", "console", page=page), *INDENTED.findall(prose)])
    lines = [line.strip().removeprefix("$ ") for line in shown.replace("\\\n", " ").splitlines()]
    lines += [text for text in INLINE.findall(prose) if " " in text]
    starts = ("arlon ", ".venv/bin/arlon ", "make ", "python ", "python3 ")
    return [shlex.split(line, comments=True) for line in lines if line.startswith(starts)]


def commands(*names: str) -> list[list[str]]:
    """What follows these names in the commands that the pages show, each once."""
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


@pytest.mark.parametrize("name", PAGES)
def test_links_and_paths_lead_to_files(name: str) -> None:
    prose = FENCE.sub("", PAGES[name])
    links = re.findall(r"\]\(([^)#\s]+)", prose) + re.findall(r"(?:src|href)=\"([^\"#]+)", prose)
    paths = [text for text in INLINE.findall(prose) if re.fullmatch(rf"(?:{'|'.join(FOLDERS)})/[\w./-]*", text)]
    local = [link for link in links if "://" not in link and not link.startswith("mailto:")]
    assert local
    missing = [path for path in (*local, *paths) if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("name", PAGES)
def test_lines_are_not_longer_than_those_of_the_code(name: str) -> None:
    assert not [line for line in PAGES[name].splitlines() if len(line) > 120]


def table_keys(heading: str) -> set[str]:
    """Names in the first column of the table with a heading, those between backticks."""
    rows = README.split(f"| {heading} |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return {key for row in rows for key in INLINE.findall(row.split("|")[1])}


def test_tables_of_a_storyboard_have_all_its_keys() -> None:
    assert table_keys("key of a shot") == set(SHOT_READERS)
    assert table_keys("key of a film") == set(FILM_READERS)


def test_all_solvers_are_named() -> None:
    row = next(line for line in README.splitlines() if line.startswith("| `solver` |"))
    built_in = {name for name in SOLVERS if SOLVERS[name].__module__.startswith("arlon.")}
    assert set(INLINE.findall(row)) - {"solver"} == built_in


def test_names_of_the_library_can_be_imported() -> None:
    for dotted in re.findall(r"`((?:arlon|stages|pipelines)(?:\.\w+)+)`", "\n".join(PAGES.values())):
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


RUNNABLE = [words for words in ARLON if not {"ray", "--resolution", "cuda", "configs/shapes/demo.yaml"} & set(words)]
"""Without films on Ray, which have tests of their own, films larger than the tiny model's, and films for a GPU."""


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
