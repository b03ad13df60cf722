"""Run folders that an earlier version left half-way: today's code goes on with them and keeps what is in them."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from arlon.data.video_io import probe
from pipelines.cli import app
from pipelines.runs.resume import open_run, read_fitting_codes
from pipelines.runs.status import read_status
from pipelines.runs.verify import verify_run
from pipelines.store.run_folder import RunFolder

OLD = Path(__file__).parents[1] / "data" / "old_run"
NUM_COMMITTED = {"film.run": 2, "given.run": 1}


@pytest.fixture
def film(tmp_path: Path) -> Path:
    """A copy of the film without given frames; segments 0 and 1 of 3 are committed."""
    return shutil.copytree(OLD / "film.run", tmp_path / "film.run")


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """A copy of the film that begins with a picture, which is gone; segment 0 of 2 is committed."""
    return shutil.copytree(OLD / "given.run", tmp_path / "given.run")


def arlon(*arguments: Any) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.stderr
    return result


def segment_hashes(run_dir: Path, *indices: int) -> dict[str, str]:
    """SHA-256 of all files of these segments, by their path in the run folder."""
    files = [path for index in indices for path in RunFolder(run_dir).segment_dir(index).iterdir()]
    return {str(path.relative_to(run_dir)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def made_segments(run_dir: Path) -> list[int]:
    """Numbers of the segments that were committed after the run was copied, in order."""
    old = len((OLD / run_dir.name / "events.jsonl").read_text().splitlines())
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()[old:]]
    return [event["segment"] for event in events if event["event"] == "commit"]


@pytest.mark.parametrize("name", NUM_COMMITTED)
def test_an_old_run_is_planned_as_it_was_and_all_in_it_is_sound(name: str) -> None:
    run = open_run(OLD / name)  # refuses another plan, another model and a changed run.json
    committed = list(run.folder.committed_indices())
    assert committed == list(range(NUM_COMMITTED[name]))
    assert list(verify_run(run)) == []
    last = run.plan.segments[committed[-1]]
    assert read_fitting_codes(run)[last.take].shape[1] >= last.num_code_frames
    assert read_status(run.folder.path).state == "interrupted"


@pytest.mark.slow
def test_an_old_run_goes_on_from_its_last_segment(film: Path) -> None:
    arlon("resume", film)
    assert made_segments(film) == [2]
    assert segment_hashes(film, 0, 1) == segment_hashes(OLD / "film.run", 0, 1)
    assert probe(film.with_suffix(".mp4")).num_frames == 119
    arlon("verify", film)


@pytest.mark.slow
def test_a_shot_of_an_old_run_is_made_anew(film: Path) -> None:
    arlon("redo", film, "--shot", 2, "--prompt", "a blue square moves left on a grey background")
    assert made_segments(film) == [0, 1, 2]  # segment 0 reads codes of shot 2 ahead
    assert segment_hashes(film / "versions" / "0001", 0, 1) == segment_hashes(OLD / "film.run", 0, 1)
    arlon("verify", film)


@pytest.mark.slow
def test_an_old_run_that_was_given_a_picture_gets_another_shot(given: Path) -> None:
    arlon("extend", given, "--prompt", "a blue square moves left on a grey background", "--duration", "34f")
    assert made_segments(given) == [1, 2]
    assert segment_hashes(given, 0) == segment_hashes(OLD / "given.run", 0)
    assert (given / "references.safetensors").read_bytes() == (OLD / "given.run/references.safetensors").read_bytes()
    assert probe(given.with_suffix(".mp4")).num_frames == 119
    arlon("verify", given)
