"""Changed runs against films made from the changed storyboard in one go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from arlon.film.storyboard import Storyboard, StoryboardError, UsageError, parse_storyboard
from pipelines.runs.edit import begin_change, change_run, fork_run, with_shot_changed, with_shots_added
from pipelines.runs.generate import FilmProgress, FilmResult, generate
from pipelines.runs.resume import Run, continue_run, open_run
from pipelines.store.run_folder import RunFolder
from tests.pipelines.films import SHOTS, assert_same_film, prepared_film

pytestmark = pytest.mark.slow

CUT = {"prompt": "a red square", "duration": "51f", "transition": "cut"}
FOUR = (*SHOTS, {"prompt": "a blue circle moves right", "duration": "34f"}, CUT)
"""Takes of the shots (0, 1), (2, 3) and (4); a segment a shot."""


@pytest.fixture(scope="module")
def film(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> FilmResult:
    return generate(prepared_film(tiny_model, tmp_path_factory.mktemp("whole") / "film.mp4", *FOUR))


@pytest.fixture
def run(film: FilmResult, tmp_path: Path) -> Run:
    """A copy of that film, to change."""
    return open_run(fork_run(open_run(film.run_dir), tmp_path / "film.mp4"))


def change(old: Run, storyboard: Storyboard, **options: Any) -> FilmResult:
    new = change_run(old, storyboard)
    return generate(new.prepared, begin=lambda _, executor: begin_change(old, new, executor), **options)


def made_whole(model: Path, output: Path, *shots: Any) -> FilmResult:
    return generate(prepared_film(model, output, *shots))


def test_redo_makes_only_what_depends_on_the_shot(film: FilmResult, run: Run, tiny_model: Path, tmp_path: Path) -> None:
    files = {i: run.folder.segment_dir(i) / "latents.safetensors" for i in range(5)}
    before = {i: path.stat().st_ino for i, path in files.items()}
    done: list[int] = []
    made = change(
        run,
        with_shot_changed(run, 3, prompt="a green square"),
        on_progress=lambda progress: done.append(progress.result.segment.index),
    )
    assert done == [2, 3]  # the shot, and the one that goes on from it; the cut behind them stays
    assert [i for i, path in files.items() if path.stat().st_ino == before[i]] == [0, 1, 4]
    shots = [*FOUR[:2], {**FOUR[2], "prompt": "a green square"}, *FOUR[3:]]
    whole = made_whole(tiny_model, tmp_path / "whole.mp4", *shots)
    assert made.film.read_bytes() == whole.film.read_bytes()
    assert made.film.read_bytes() != film.film.read_bytes()


def test_redo_to_what_it_was_gives_the_film_again(film: FilmResult, run: Run) -> None:
    change(run, with_shot_changed(run, 1, seed=99))
    again = open_run(run.folder.path)
    assert again.plan.storyboard.shots[0].seed == 99
    made = change(again, with_shot_changed(again, 1, seed=7))
    assert made.num_made == 2
    assert [RunFolder(made.run_dir).read_segment(i) for i in range(5)] == [
        RunFolder(film.run_dir).read_segment(i) for i in range(5)
    ]


def test_redo_of_the_same_makes_nothing(film: FilmResult, run: Run) -> None:
    made = change(run, with_shot_changed(run, 3, prompt=FOUR[2]["prompt"]))
    assert (made.num_made, made.film_hash) == (0, film.film_hash)


def test_redo_without_a_word_draws_another_seed(run: Run) -> None:
    first, second = (with_shot_changed(run, 2) for _ in range(2))
    assert None not in (first.shots[1].seed, second.shots[1].seed)
    assert first.shots[1].seed != second.shots[1].seed


def test_the_version_before_is_kept_and_can_be_gone_on_with(film: FilmResult, run: Run) -> None:
    change(run, with_shot_changed(run, 1, prompt="a blue circle"))
    version = open_run(run.folder.path / "versions" / "0001")
    made = generate(version.prepared, begin=lambda *_: continue_run(version))
    assert made.num_made == 0
    assert made.film == run.folder.path / "versions" / "0001" / "film.mp4"
    assert made.film.read_bytes() == film.film.read_bytes()


@pytest.mark.parametrize("step", ["_copy", "write_codes", "write_run"])
def test_a_redo_that_stops_while_it_begins_loses_nothing(
    film: FilmResult, run: Run, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    import pipelines.runs.edit as module

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module if step == "_copy" else module.RunFolder, step, stop)
        with pytest.raises(KeyboardInterrupt):
            change(run, with_shot_changed(run, 1, prompt="a blue circle"))
    old = open_run(run.folder.path)
    made = generate(old.prepared, begin=lambda *_: continue_run(old))
    assert made.film.read_bytes() == film.film.read_bytes()


def test_a_redo_that_is_interrupted_goes_on(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    def stop(progress: FilmProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        change(run, with_shot_changed(run, 1, prompt="a blue circle"), on_progress=stop)
    halfway = open_run(run.folder.path)
    made = generate(halfway.prepared, begin=lambda *_: continue_run(halfway))
    assert made.num_made == 1
    shots = [{**FOUR[0], "prompt": "a blue circle"}, *FOUR[1:]]
    assert made.film.read_bytes() == made_whole(tiny_model, tmp_path / "whole.mp4", *shots).film.read_bytes()


@pytest.mark.parametrize(("shot", "num_made"), [(1, 5), (2, 5), (3, 4)])
def test_a_film_that_was_interrupted_is_changed(tiny_model: Path, tmp_path: Path, shot: int, num_made: int) -> None:
    """One segment is committed, and the codes it needs are there: the first of the second shot are among them."""

    def stop(progress: FilmProgress) -> None:
        raise KeyboardInterrupt

    prepared = prepared_film(tiny_model, tmp_path / "film.mp4", *FOUR)
    with pytest.raises(KeyboardInterrupt):
        generate(prepared, on_progress=stop)
    halfway = open_run(prepared.paths.run_dir)
    assert {take: codes.shape[1] for take, codes in halfway.folder.read_codes().items()} == {0: 10}
    made = change(halfway, with_shot_changed(halfway, shot, prompt="a blue circle"))
    assert made.num_made == num_made
    shots = [*FOUR[: shot - 1], {**FOUR[shot - 1], "prompt": "a blue circle"}, *FOUR[shot:]]
    assert made.film.read_bytes() == made_whole(tiny_model, tmp_path / "whole.mp4", *shots).film.read_bytes()


@pytest.mark.parametrize(("transition", "num_made"), [("cut", 1), ("continue", 2)])
def test_an_extended_film_is_the_longer_film(
    run: Run, tiny_model: Path, tmp_path: Path, transition: str, num_made: int
) -> None:
    """The last segment of a take looks at the codes behind it, so what continues it changes it."""
    added = {"prompt": "a green circle", "duration": "34f", "transition": transition}
    made = change(run, with_shots_added(run, parse_storyboard({"shots": [added]}).shots))
    assert made.num_made == num_made
    assert made.film.read_bytes() == made_whole(tiny_model, tmp_path / "whole.mp4", *FOUR, added).film.read_bytes()


@pytest.mark.slow
def test_a_film_with_blended_borders_is_changed_and_extended(tiny_model: Path, tmp_path: Path) -> None:
    settings = {"vae_blend_frames": 2}
    made = generate(prepared_film(tiny_model, tmp_path / "film.mp4", *FOUR, settings=settings))
    run = open_run(made.run_dir)
    made = change(run, with_shot_changed(run, 2, prompt="a blue circle"))
    run = open_run(made.run_dir)
    added = {"prompt": "a green circle", "duration": "34f", "transition": "continue"}
    made = change(run, with_shots_added(run, parse_storyboard({"shots": [added]}).shots))
    shots = [FOUR[0], {**FOUR[1], "prompt": "a blue circle"}, *FOUR[2:], added]
    whole = generate(prepared_film(tiny_model, tmp_path / "whole.mp4", *shots, settings=settings))
    assert_same_film(made.film, whole.film)


def test_a_fork_leaves_the_first_run_alone(film: FilmResult, run: Run) -> None:
    assert (run.folder.segment_dir(0) / "fragment.mp4").stat().st_nlink > 1
    content = {path: path.read_bytes() for path in film.run_dir.rglob("*") if path.is_file()}
    change(run, with_shot_changed(run, 1, prompt="a blue circle"))
    assert {path: path.read_bytes() for path in film.run_dir.rglob("*") if path.is_file()} == content
    with pytest.raises(UsageError, match="exists"):
        fork_run(open_run(film.run_dir), run.folder.path.with_suffix(".mp4"))


def test_changes_that_cannot_be_made_are_refused(run: Run) -> None:
    with pytest.raises(UsageError, match="--shot must be between 1 and 5, got 6"):
        with_shot_changed(run, 6)
    with pytest.raises(StoryboardError, match="shot 1: prompt is empty"):
        with_shot_changed(run, 1, prompt=" ")
