"""The commands that go on with a run, as their users meet them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from arlon.data.video_io import probe
from pipelines.cli import app


def arlon(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def made(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A film of two takes, 51 frames each."""
    film = tmp_path_factory.mktemp("film") / "film.mp4"
    shots = ("--prompt", "a red circle", "--prompt", "a blue square", "--duration", "51f", "--transition", "cut")
    result = arlon("generate", "--model", tiny_model, *shots, "--seed", 7, "--threads", 1, "--output", film)
    assert result.exit_code == 0, result.stderr
    return film


@pytest.mark.slow
def test_a_film_is_forked_redone_extended_and_resumed(made: Path, tmp_path: Path) -> None:
    fork = tmp_path / "other.mp4"
    result = arlon("fork", made, fork)
    assert (result.exit_code, result.stdout.strip()) == (0, str(tmp_path / "other.run")), result.stderr
    result = arlon("redo", tmp_path / "other.run", "--shot", 2, "--prompt", "a green square", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["num_made"] == 1
    result = arlon("extend", fork, "--prompt", "a red square", "--duration", "34f")
    assert result.exit_code == 0, result.stderr
    assert probe(fork).num_frames == 136
    prompts = [shot["prompt"] for shot in json.loads(fork.with_suffix(".json").read_text())["storyboard"]["shots"]]
    assert prompts == ["a red circle", "a green square", "a red square"]
    before = fork.read_bytes()
    result = arlon("resume", fork)
    assert (result.exit_code, result.stdout.strip()) == (0, str(fork)), result.stderr
    assert fork.read_bytes() == before
    assert probe(made).num_frames == 102


def test_an_interrupted_command_says_how_to_go_on(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.commands import generate as cli

    run_dir = tmp_path / "a film.run"
    with monkeypatch.context() as patch:
        patch.setattr(cli, "progress_line", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        result = arlon(
            *("generate", "--model", tiny_model, "--prompt", "a", "--threads", 1, "--output", tmp_path / "a film.mp4")
        )
    assert result.exit_code == 130
    assert f"go on with: arlon resume '{run_dir}'" in result.stderr
    result = arlon("resume", run_dir)
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "a film.mp4").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resume", "none"), "'none' is not a run folder"),
        (("redo", "none", "--shot", "1"), "'none' is not a run folder"),
        (("redo", "FILM", "--shot", "3"), "--shot must be between 1 and 2, got 3"),
        (("redo", "FILM", "--shot", "1", "--prompt", "a\x1b[2Jb"), "holds the control character"),
        (("redo", "FILM", "--shot", "1", "--prompt", "x" * 100_000), "at most 2000 characters, got 100000"),
        (("extend", "FILM"), "no prompt: give --prompt"),
        (("fork", "FILM", "FILM"), "exists: choose another --output"),
        (("verify", "FILM", "--segment", "9"), "segment 9 is not among those"),
        (("resume", "FILM", "--address", "1.2.3.4:5"), "--address needs --executor ray"),
    ],
)
def test_wrong_usage_is_one_line_and_changes_nothing(made: Path, arguments: tuple[str, ...], message: str) -> None:
    content = {path: path.stat().st_mtime_ns for path in made.parent.rglob("*")}
    result = arlon(*(made if argument == "FILM" else argument for argument in arguments))
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in made.parent.rglob("*")} == content
