"""Many films from one file: what a line may say, and what becomes of every film."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from arlon.film import workers
from arlon.film.storyboard import UsageError
from pipelines.batch import batch as batch_module
from pipelines.batch.batch import BatchOptions, FilmOutcome, FilmTask, attempt_film, read_batch, run_batch_local
from pipelines.cli import app
from pipelines.runs.generate import generate
from pipelines.store.lock import RunLock
from tests.pipelines.films import SHOTS, prepared_film

TWO_SEGMENTS = {"shots": [{"prompt": "a red circle", "duration": "85f"}], "num_threads": 1, "seed": 3}
ONE_SEGMENT = {"prompts": ["a blue square"], "duration": "51f", "num_threads": 1, "seed": 4}


def batch_file(folder: Path, *lines: Any) -> Path:
    path = folder / "films.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def read_one(folder: Path, line: Any, **options: Any) -> FilmTask | FilmOutcome:
    (film,) = read_batch(batch_file(folder, line), **options)
    return film


def arlon(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_ways_to_write_a_film(tmp_path: Path) -> None:
    (tmp_path / "boards").mkdir()
    (tmp_path / "boards" / "two.txt").write_text("a\n\n2 | b\n")
    path = batch_file(
        tmp_path,
        ["a red circle", "a blue square"],
        "",
        {"name": "Cut 1.2", "prompts": ["a", "b"], "transition": "cut", "duration": "36f", "seed": 7, "crf": 20},
        {"storyboard": "boards/two.txt", "num_inference_steps": 4},
        {"name": "inline", "shots": [{"prompt": "a", "seed": 9}], "fps": 8},
    )
    films = [film for film in read_batch(path) if isinstance(film, FilmTask)]
    assert [(film.line, film.name) for film in films] == [
        (1, "0001-a-red-circle"),
        (3, "Cut 1.2"),
        (4, "0004-a"),
        (5, "inline"),
    ]
    plain, cut, from_file, inline = (film.storyboard for film in films)
    assert [shot.transition for shot in plain.shots] == ["continue", "continue"]
    assert [shot.transition for shot in cut.shots] == ["cut", "cut"]
    assert ([shot.duration.frames for shot in cut.shots], cut.seed, films[1].settings) == ([36, 36], 7, {"crf": 20})
    assert [shot.duration.seconds for shot in from_file.shots] == [5.0, 2.0]
    assert from_file.num_inference_steps == 4
    assert (inline.shots[0].seed, inline.fps) == (9, 8.0)


def test_files_that_a_line_names_lie_beside_the_batch(tmp_path: Path) -> None:
    prompts = read_one(tmp_path, ['|0|a|2|b{"reference_path": "sea.png", "mask_strategy": "0"}'])
    shots = read_one(tmp_path, {"shots": [{"prompt": "a", "image": "in/sea.png"}]})
    assert isinstance(prompts, FilmTask)
    assert isinstance(shots, FilmTask)
    assert prompts.storyboard.shots[0].references == (str(tmp_path / "sea.png"),)
    assert shots.storyboard.shots[0].image == str(tmp_path / "in" / "sea.png")


def test_values_for_all_films_win(tmp_path: Path) -> None:
    line = {"prompts": ["a"], "fps": 8, "seed": 5, "crf": 30, "preset": "fast"}
    film = read_one(tmp_path, line, film_values={"fps": 12.0}, settings={"crf": 20})
    assert isinstance(film, FilmTask)
    assert (film.storyboard.fps, film.storyboard.seed) == (12.0, 5)
    assert film.settings == {"crf": 20, "preset": "fast"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompts": ["a"]', "not JSON"),
        ("7", "must be a list of prompts or an object, got 7"),
        ({"name": "x"}, "give one of prompts, storyboard, shots, got none"),
        ({"prompts": ["a"], "shots": []}, "got prompts and shots"),
        ({"prompts": [1]}, "prompts must be a list of texts"),
        ({"prompts": []}, "at least one shot"),
        ({"prompts": ["a"], "sed": 1}, "unknown key 'sed'"),
        ({"prompts": ["a"], "fps": 1000}, "fps must be between"),
        ({"prompts": ["a"], "duration": {}}, "duration must be seconds or frames"),
        ({"storyboard": "absent.yaml"}, "cannot be read: No such file"),
        ({"shots": [{"prompt": "a"}], "transition": "cut"}, "transition goes with prompts"),
        ({"prompts": ["a"], "name": "../x"}, "the name must be"),
        ({"prompts": ["a"], "name": "a/b"}, "the name must be"),
        ({"prompts": ["a"], "name": ".."}, "the name must be"),
        ({"prompts": ["a"], "name": ""}, "the name must be"),
        ({"prompts": ["a"], "name": 5}, "the name must be"),
        ({"prompts": ["a"], "name": "a\n"}, "the name must be"),
        ({"prompts": ["a"], "name": "x" * 101}, "the name must be"),
        ({"prompts": ["a"], "name": "x.mp4"}, "leave .mp4 out"),
    ],
)
def test_a_line_that_is_no_film_says_why(tmp_path: Path, line: Any, message: str) -> None:
    film = read_one(tmp_path, line)
    assert isinstance(film, FilmOutcome)
    assert film.state == "failed"
    assert message in (film.error or "")


def test_a_name_stands_once(tmp_path: Path) -> None:
    first, second = read_batch(batch_file(tmp_path, {"name": "x", "prompts": ["a"]}, {"name": "x", "prompts": ["b"]}))
    assert isinstance(first, FilmTask)
    assert isinstance(second, FilmOutcome)
    assert second.error == "the name 'x' is that of line 1: choose another"


@pytest.mark.parametrize(("first", "second"), [("x", "X"), ("Straße", "STRASSE"), ("ﬁlm", "film")])
def test_names_that_are_one_folder_on_some_systems_stand_once(tmp_path: Path, first: str, second: str) -> None:
    lines = [{"name": name, "prompts": ["a"]} for name in (first, second)]
    kept, refused = read_batch(batch_file(tmp_path, *lines))
    assert isinstance(kept, FilmTask)
    assert isinstance(refused, FilmOutcome)
    assert "is that of line 1" in (refused.error or "")


def test_files_that_hold_no_films_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_batch(tmp_path / "absent.jsonl")
    with pytest.raises(UsageError, match="is empty"):
        read_batch(batch_file(tmp_path, "", " "))
    with pytest.raises(UsageError, match="must be a path"):
        BatchOptions(output_dir="s3://bucket/films")


@pytest.mark.slow
def test_films_equal_those_made_alone_and_load_their_networks_once(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = generate(prepared_film(tiny_model, tmp_path / "alone.mp4"))
    built: list[str] = []
    for kind in (workers.TextWorker, workers.CodeWorker, workers.RefineWorker, workers.DecodeWorker):
        build = kind.__init__

        def counted(self: Any, job: Any, *rest: Any, _build: Any = build, _name: str = kind.__name__) -> None:
            built.append(_name)
            _build(self, job, *rest)

        monkeypatch.setattr(kind, "__init__", counted)
    film = {"shots": list(SHOTS), "num_threads": 1}
    path = batch_file(tmp_path, film | {"name": "other", "seed": 8}, film | {"name": "same", "seed": 7})
    tasks = [task for task in read_batch(path) if isinstance(task, FilmTask)]
    outcomes = list(run_batch_local(tasks, BatchOptions(output_dir=str(tmp_path / "out"), model=str(tiny_model))))
    assert [(outcome.name, outcome.state, outcome.num_made) for outcome in outcomes] == [
        ("other", "done", 3),
        ("same", "done", 3),
    ]
    assert (tmp_path / "out" / "same" / "film.mp4").read_bytes() == alone.film.read_bytes()
    assert (tmp_path / "out" / "other" / "film.mp4").read_bytes() != alone.film.read_bytes()
    assert sorted(built) == ["CodeWorker", "DecodeWorker", "RefineWorker", "TextWorker"]


@pytest.mark.slow
def test_a_failure_of_the_machine_is_tried_again_from_the_last_commit(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, calls = workers.DecodeWorker.run, []

    def failing(self: workers.DecodeWorker, request: Any) -> Any:
        calls.append(request)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return decode(self, request)

    monkeypatch.setattr(workers.DecodeWorker, "run", failing)
    task = read_one(tmp_path, {"name": "x", **TWO_SEGMENTS})
    assert isinstance(task, FilmTask)
    options = BatchOptions(output_dir=str(tmp_path / "out"), model=str(tiny_model))
    (outcome,) = run_batch_local([task], options)
    assert (outcome.state, outcome.num_attempts, outcome.num_made) == ("done", 2, 1)
    whole = attempt_film(task, BatchOptions(output_dir=str(tmp_path / "whole"), model=str(tiny_model)))
    assert Path(outcome.film or "").read_bytes() == Path(whole.film or "").read_bytes()


def test_retries_end_and_what_cannot_pass_is_not_tried_again(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = batch_file(tmp_path, {"name": "x", **ONE_SEGMENT}, {"name": "y", **ONE_SEGMENT, "height": 3})
    tasks = [task for task in read_batch(path) if isinstance(task, FilmTask)]

    def broken(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(batch_module, "generate", broken)
    options = BatchOptions(output_dir=str(tmp_path / "out"), model=str(tiny_model), num_retries=1)
    first, second = run_batch_local(tasks, options)
    assert (first.state, first.num_attempts, first.error) == ("failed", 2, "no space left")
    assert (second.state, second.num_attempts) == ("failed", 1)
    assert "height (3) must be even" in (second.error or "")


def test_a_film_in_use_is_left_alone(tiny_model: Path, tmp_path: Path) -> None:
    task = read_one(tmp_path, {"name": "x", **ONE_SEGMENT})
    assert isinstance(task, FilmTask)
    (tmp_path / "x").mkdir()
    with RunLock(tmp_path / "x"):
        outcome = attempt_film(task, BatchOptions(output_dir=str(tmp_path), model=str(tiny_model)))
    assert (outcome.state, outcome.may_retry) == ("failed", False)
    assert "is in use by process" in (outcome.error or "")


@pytest.mark.slow
def test_the_command_makes_skips_and_explains(tiny_model: Path, tmp_path: Path) -> None:
    path = batch_file(
        tmp_path,
        {"name": "good", **ONE_SEGMENT},
        {"name": "bad", "prompts": ["a"], "fps": -1},
        {"name": "random", **{key: value for key, value in ONE_SEGMENT.items() if key != "seed"}},
    )
    command = ("batch", path, "--output-dir", tmp_path / "out", "--model", tiny_model)
    result = arlon(*command)
    assert result.exit_code == 1, result.stderr
    assert "2 done, 0 skipped, 1 failed" in result.stdout
    assert "fps must be between 1 and 240, got -1" in " ".join(result.stdout.split())
    films = [tmp_path / "out" / name / "film.mp4" for name in ("good", "random")]
    before = [film.stat().st_mtime_ns for film in films]
    result = arlon(*command, "--json")
    assert result.exit_code == 1, result.stderr
    told = json.loads(result.stdout)
    assert (told["done"], told["skipped"], told["failed"]) == (0, 2, 1)
    assert [film["line"] for film in told["films"]] == [1, 2, 3]
    assert [film.stat().st_mtime_ns for film in films] == before
    batch_file(tmp_path, {"name": "good", **ONE_SEGMENT, "seed": 5}, {"name": "random", **ONE_SEGMENT, "crf": 20})
    errors = {film["name"]: film["error"] for film in json.loads(arlon(*command, "--json").stdout)["films"]}
    assert "holds a film with another storyboard" in errors["good"]
    assert "holds a film with another" in errors["random"]
    assert [film.stat().st_mtime_ns for film in films] == before


def test_the_command_ends_well_if_all_is_well(tiny_model: Path, tmp_path: Path) -> None:
    path = batch_file(tmp_path, {"name": "x", **ONE_SEGMENT})
    result = arlon("batch", path, "-o", tmp_path / "out", "--model", tiny_model, "--set", "crf=20")
    assert result.exit_code == 0, result.stderr
    assert json.loads((tmp_path / "out" / "x" / "run.json").read_text())["settings"]["crf"] == 20


@pytest.mark.slow
def test_films_have_streams_if_asked_for(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a film that fails half way and is tried again; one that was begun without a stream goes on without."""
    decode, calls = workers.DecodeWorker.run, []

    def failing(self: workers.DecodeWorker, request: Any) -> Any:
        calls.append(request)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return decode(self, request)

    monkeypatch.setattr(workers.DecodeWorker, "run", failing)
    path = batch_file(tmp_path, {"name": "begun", **TWO_SEGMENTS})
    command = ("batch", path, "--output-dir", tmp_path / "out", "--model", tiny_model)
    assert arlon(*command, "--retries", 0).exit_code == 1
    calls.clear()
    batch_file(tmp_path, {"name": "x", **TWO_SEGMENTS}, {"name": "begun", **TWO_SEGMENTS})
    result = arlon(*command, "--hls")
    assert result.exit_code == 0, result.stderr
    lines = (tmp_path / "out" / "x" / "film.hls" / "film.m3u8").read_text().splitlines()
    assert (sum(line.startswith("#EXTINF") for line in lines), lines[-1]) == (2, "#EXT-X-ENDLIST")
    assert not (tmp_path / "out" / "begun" / "film.hls").exists()
    films = [tmp_path / "out" / name / "film.mp4" for name in ("x", "begun")]
    assert films[0].read_bytes() == films[1].read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--set", "crv=3"), "did you mean 'crf'?"),
        (("--set", "crf=99"), "crf must be between"),
        (("--model", "absent/model"), "absent/model"),
        (("--pipelines", 2), "--pipelines needs --executor ray"),
        (("--address", "auto"), "--address needs --executor ray"),
    ],
)
def test_wrong_options_are_refused_before_any_work(tmp_path: Path, options: tuple[Any, ...], message: str) -> None:
    path = batch_file(tmp_path, {"name": "x", **ONE_SEGMENT})
    result = arlon("batch", path, "--output-dir", tmp_path / "out", *options)
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr
    assert not (tmp_path / "out").exists()
