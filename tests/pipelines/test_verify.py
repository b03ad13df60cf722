"""Verify, inspect and status, on one film and on damaged copies of it; and their commands."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from arlon.data.video_io import encode_fragment, hash_frames, read_video
from arlon.film.storyboard import UsageError, load_storyboard
from pipelines.cli import app
from pipelines.runs.generate import FilmResult, generate
from pipelines.runs.inspect import inspect_film
from pipelines.runs.resume import open_run
from pipelines.runs.status import read_status
from pipelines.runs.verify import replay_segment, verify_run
from pipelines.store.lock import RunLock
from pipelines.store.run_folder import FRAGMENT_NAME, FRAMES, RunFolder
from tests.pipelines.films import SHOTS, assert_same_film, prepared_film


@pytest.fixture(scope="module")
def film(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> FilmResult:
    return generate(prepared_film(tiny_model, tmp_path_factory.mktemp("whole") / "film.mp4"))


@pytest.fixture
def copied(film: FilmResult, tmp_path: Path) -> Path:
    """The run folder of a copy of the film."""
    shutil.copytree(film.film.parent, tmp_path / "copy")
    return tmp_path / "copy" / "film.run"


def arlon(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.slow
def test_a_film_is_what_it_says(film: FilmResult) -> None:
    run = open_run(film.run_dir)
    assert list(verify_run(run)) == []
    assert [list(replay_segment(run, index)) for index in range(3)] == [[], [], []]
    with pytest.raises(UsageError, match="segment 3 is not among those"):
        list(replay_segment(run, 3))


def test_replay_finds_bits_that_are_not_what_the_record_gives(copied: Path) -> None:
    """Latents and fragment changed together with their hashes: only making the segment again tells.

    The new record has no hash of the frames, like those of the first version.
    """
    folder = RunFolder(copied)
    record = folder.read_segment(1)
    folder.commit_segment(
        1,
        latent=folder.read_latent(1) + 1e-6,
        fragment=folder.read_fragment(2),
        inputs=record.inputs,
        look=record.look,
    )
    assert list(replay_segment(open_run(copied), 1)) == [
        "segment 1: its latents come out otherwise",
        "segment 1: its encoded frames come out otherwise",
    ]
    codes = folder.read_codes()
    folder.write_codes(codes | {0: torch.roll(codes[0], 1, dims=1)})
    problems = list(replay_segment(open_run(copied), 0))
    assert problems[0] == "segment 0: its codes come out otherwise"


@pytest.mark.parametrize("shift", [0, 1])
def test_replay_tells_a_slip_of_the_encoder_from_another_picture(copied: Path, shift: int) -> None:
    """Shift 0: other bytes are stored for the same frames. Shift 1: the frames were others before they were encoded."""
    folder = RunFolder(copied)
    record = folder.read_segment(1)
    frames = np.roll(read_video(folder.segment_dir(1) / FRAGMENT_NAME), shift, axis=2)
    hash_before = record.outputs[FRAMES]
    folder.commit_segment(
        1,
        latent=folder.read_latent(1),
        fragment=encode_fragment(frames, fps=8, crf=16).data,  # not the bytes of the frames that were decoded
        frames_hash=hash_frames(frames) if shift else hash_before,
        inputs=record.inputs,
        look=record.look,
    )
    copied.with_suffix(".mp4").unlink()  # it would tell that a segment is another
    assert list(verify_run(open_run(copied))) == []  # the record agrees with itself; only making it again tells
    problems = list(replay_segment(open_run(copied), 1))
    assert len(problems) == 1
    if shift:
        assert problems[0] == "segment 1: its frames come out otherwise"
    else:
        assert "frames come out the same" in problems[0]
        assert str(folder.segment_dir(1)) in problems[0]


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda run: (run.with_suffix(".mp4")).write_bytes(b"x"), "is not made of the segments of this run"),
        (lambda run: (run / "segments/0001/fragment.mp4").unlink(), "segment 1: .*is missing or differs"),
        (lambda run: (run / "segments/0000/segment.json").unlink(), "segment 1: the segment it goes on from"),
        (lambda run: (run / "codes.safetensors").unlink(), "segment 0: its codes are not there"),
        (lambda run: (run / "codes.safetensors").write_bytes(b"x"), "damaged or cut off"),
    ],
)
def test_damage_is_found(copied: Path, damage: Callable[[Path], object], problem: str) -> None:
    damage(copied)
    result = arlon("verify", copied)
    assert result.exit_code == 1
    assert re.search(problem, result.stderr), result.stderr


def test_verify_command_says_what_was_checked(film: FilmResult) -> None:
    result = arlon("verify", film.film, "--segment", 2)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("3 of 3 segments committed, all as recorded; segment 2 came out the same")


def test_a_film_alone_tells_what_it_was_made_from(film: FilmResult, tmp_path: Path) -> None:
    alone = tmp_path / "alone.mp4"
    shutil.copy(film.film, alone)
    result = arlon("inspect", alone)
    assert result.exit_code == 0, result.stderr
    for text in ("a green circle moves left", "seed 7", "136 frames", "model tiny", "6.38 s"):
        assert text in result.stdout
    record = json.loads(arlon("inspect", alone, "--json").stdout)
    assert film.sidecar is not None
    assert record == json.loads(film.sidecar.read_text())


@pytest.mark.slow
def test_the_storyboard_of_a_film_makes_it_again(film: FilmResult, tiny_model: Path, tmp_path: Path) -> None:
    board = tmp_path / "film.yaml"
    board.write_text(arlon("inspect", film.film, "--storyboard").stdout)
    assert [shot.prompt for shot in load_storyboard(board).shots] == [shot["prompt"] for shot in SHOTS]
    again = tmp_path / "again.mp4"
    result = arlon(
        *("generate", "--storyboard", board, "--model", tiny_model, "--threads", 1, "--output", again),
    )
    assert result.exit_code == 0, result.stderr
    assert_same_film(again, film.film)


def test_a_run_tells_its_timings(film: FilmResult) -> None:
    record = inspect_film(film.run_dir)
    assert set(record["timings_s"]) == {"code", "refine", "decode", "write"}
    for role, seconds in film.steps_s.items():
        assert record["timings_s"][role] == pytest.approx(seconds, abs=0.01)
    assert record["kept_versions"] == 0
    assert str(film.film.parent) not in json.dumps(record["storyboard"])


def test_events_tell_seconds_memory_and_drift(film: FilmResult) -> None:
    events = list(RunFolder(film.run_dir).events())
    made = ["step"] * 4 + ["commit"]
    assert [event["event"] for event in events] == ["start", *made * 2, "codes", *made, "film"]
    steps = [event for event in events if event["event"] == "step"]
    assert [(e["segment"], e["role"]) for e in steps[:4]] == [(0, r) for r in ("code", "refine", "decode", "write")]
    assert all(event["seconds"] > 0 and event["memory_mb"] > 10 for event in steps)
    commits = [event for event in events if event["event"] == "commit"]
    assert [event["drift"] for event in commits] == [{"colour": 0.0, "contrast": 0.0}] * 3  # a shot a segment


def test_status_of_a_run_in_all_its_states(film: FilmResult, copied: Path) -> None:
    done = read_status(film.run_dir)
    assert (done.state, done.holder, done.now, done.left_s) == ("complete", None, None, None)
    assert (done.num_committed, done.num_segments) == (3, 3)
    assert (done.num_codes_written, done.num_code_frames) == (21, 21)
    assert done.film == str(film.film)
    shutil.rmtree(copied / "segments" / "0002")
    copied.with_suffix(".mp4").unlink()
    assert read_status(copied).state == "interrupted"
    with RunLock(copied):
        running = read_status(copied)
        assert (running.state, running.num_committed) == ("running", 2)
        assert running.now == "making segment 2, of shot 3"
        assert running.left_s is not None
        (copied / "codes.safetensors").unlink()
        assert read_status(copied).now == "writing the codes of segment 2, of shot 3"
    text = arlon("status", film.run_dir).stdout
    assert text.startswith("complete\n")
    assert "3 of 3 committed" in text
    assert json.loads(arlon("status", film.run_dir, "--json").stdout)["num_committed"] == 3
    assert "is not a run folder" in arlon("status", copied.parent).stderr
