"""Files that somebody prepared to do harm: refused in a line, at once, and without effect on the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from arlon.film import strict_yaml as markup
from arlon.film.geometry import open_model, read_geometry
from arlon.film.plan import make_plan, resolve_storyboard
from arlon.film.storyboard import StoryboardError, load_storyboard, parse_storyboard
from pipelines.cli import app
from pipelines.runs.generate import generate
from tests.pipelines.films import prepared_film


def num_calls(function: Callable[[], object], limit: int = 10**9) -> int:
    """How many Python functions, built-in ones too, a function calls: its work, whatever the machine's speed.

    Raises:
        AssertionError: As soon as it has called more than `limit`.
    """
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")
        if calls > limit:
            sys.setprofile(None)
            raise AssertionError(f"more than {limit} calls")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(before)
    return calls


def arlon(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    for path in (tmp_path / "fifo.yaml", Path("/dev/zero")):
        for arguments in (("plan", "--storyboard", path), ("batch", path, "--output-dir", tmp_path / "out")):
            result = arlon(*arguments)
            assert result.exit_code == 2
            assert "not a regular file" in result.stderr
            assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_huge_sparse_file_is_refused_before_it_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sparse.yaml"
    with path.open("wb") as file:
        file.truncate(2**30)
    monkeypatch.setattr("arlon.film.storyboard.parse_yaml", lambda _: pytest.fail("it was parsed"))
    with pytest.raises(StoryboardError, match=r"larger than 64 MiB"):
        load_storyboard(path)
    monkeypatch.setattr(markup, "MAX_TEXT_BYTES", 3)
    path.write_text("abc")
    assert markup.read_text(path) == "abc"


def test_a_bomb_of_aliases_is_refused_at_once(tmp_path: Path) -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefghi", "bcdefghij", strict=True)]
    (tmp_path / "bomb.yaml").write_text("\n".join([*lines, "shots: *j"]))

    def load() -> None:
        with pytest.raises(StoryboardError, match=r"shots\[8\]"):
            load_storyboard(tmp_path / "bomb.yaml")

    assert num_calls(load, limit=10**6) > 0  # written out, the aliases are 9 ** 10 values


def test_the_work_of_planning_grows_with_the_number_of_shots_and_not_faster(tiny_model: Path) -> None:
    geometry = read_geometry(open_model(str(tiny_model))[0])

    def plan(num_shots: int) -> None:
        shots = [{"prompt": f"a red circle {number}", "duration": 1} for number in range(num_shots)]
        film = resolve_storyboard(parse_storyboard({"shots": shots}), geometry.defaults, 1)
        assert len(make_plan(film, geometry).shots) == num_shots

    few = num_calls(lambda: plan(200))
    assert num_calls(lambda: plan(2000), limit=11 * few) > few
    plan(10_000)


@pytest.fixture(scope="module")
def film(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A film of one shot."""
    shot = {"prompt": "a red circle", "duration": "51f"}
    return generate(prepared_film(tiny_model, tmp_path_factory.mktemp("hostile") / "film.mp4", shot)).film


@pytest.mark.parametrize(
    "change",
    [
        {"timeline": 7},
        {"storyboard": {}},
        {"storyboard": {"shots": []}, "timeline": {"shots": []}},
        {"storyboard": [1]},
        {"model": None},
        {"settings": "x"},
    ],
)
def test_a_record_that_was_changed_is_refused_in_a_line(film: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    result = arlon("inspect", _with_record(film, tmp_path, change))
    assert result.exit_code == 1, result.output
    assert result.stderr.count("\n") == 1
    assert "damaged or was changed" in result.stderr


def test_a_record_cannot_steer_the_terminal(film: Path, tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\x9b2J"
    path = _with_record(
        film, tmp_path, {"arlon": evil, "model": {"name": evil, "hash": evil}, "settings": {evil: evil}}
    )
    result = arlon("inspect", path)
    assert result.exit_code == 0, result.stderr
    assert not {"\x1b", "\x07", "\x9b"} & set(result.stdout)
    assert "\\x1b]0;owned" in result.stdout


def _with_record(film: Path, folder: Path, change: dict[str, Any]) -> Path:
    """The film with another record in its tag."""
    from arlon.data.video_io import Fragment, VideoWriter
    from arlon.film.container import read_film_record
    from arlon.film.record import film_tags
    from pipelines.store.run_folder import RunFolder

    tags = film_tags(read_film_record(film) | change, "title")
    with VideoWriter(folder / "film.mp4", fps=8, tags=tags) as writer:
        writer.append_fragment(Fragment(data=RunFolder(film.with_suffix(".run")).read_fragment(0)))
    return folder / "film.mp4"


def test_films_that_were_cut_off_anywhere_are_read_or_refused_in_a_line(film: Path, tmp_path: Path) -> None:
    data = film.read_bytes()
    for length in (0, 7, 100, len(data) // 3, len(data) - 1):
        (tmp_path / "cut.mp4").write_bytes(data[:length])
        result = arlon("inspect", tmp_path / "cut.mp4")
        assert result.exit_code in (0, 1)
        assert "Traceback" not in result.output
        assert result.exit_code == 0 or result.stderr.count("\n") == 1
