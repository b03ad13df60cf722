"""A film that was stopped anywhere goes on to the same bytes, and makes nothing twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from arlon.files import CRASH_VARIABLE, hash_plain
from arlon.film.storyboard import UsageError
from pipelines.runs.generate import FilmProgress, FilmResult, generate
from pipelines.runs.resume import continue_run, open_run
from pipelines.runs.run_record import changed_libraries
from pipelines.runs.verify import replay_segment, verify_run
from pipelines.store.lock import RunLock, RunLockedError
from pipelines.store.run_folder import CODES_NAME, RunFolder, RunFolderError
from tests.pipelines import processes
from tests.pipelines.films import assert_same_film, make_film, prepared_film
from tests.pipelines.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def film(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> FilmResult:
    """An uninterrupted film."""
    return generate(prepared_film(tiny_model, tmp_path_factory.mktemp("whole") / "film.mp4"))


def resume(run_dir: Path, **options: Any) -> FilmResult:
    run = open_run(run_dir, **options)
    return generate(run.prepared, begin=lambda *_: continue_run(run))


def stopped_after(num_segments: int, model: Path, output: Path, **options: Any) -> Path:
    """The run folder of a film that was interrupted."""

    def stop(progress: FilmProgress) -> None:
        if progress.done == num_segments:
            raise KeyboardInterrupt

    prepared = prepared_film(model, output, **options)
    with pytest.raises(KeyboardInterrupt):
        generate(prepared, on_progress=stop)
    return prepared.paths.run_dir


def reseal(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a sealed file so that its own hash fits."""
    values = json.loads(path.read_text())
    values.pop("sha256")
    change(values)
    path.write_text(json.dumps(values | {"sha256": hash_plain(values)}))


@pytest.mark.parametrize("num_segments", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3))])
def test_an_interrupted_film_goes_on_to_the_same_bytes(
    film: FilmResult, tiny_model: Path, tmp_path: Path, num_segments: int
) -> None:
    run_dir = stopped_after(num_segments, tiny_model, tmp_path / "film.mp4")
    made = resume(run_dir)
    assert_same_film(made.film, film.film)
    assert made.num_made == 3 - num_segments
    assert made.film_hash == film.film_hash
    assert made.sidecar is not None
    assert film.sidecar is not None
    assert made.sidecar.read_text() == film.sidecar.read_text()
    assert not run_dir.with_name("film.partial.mp4").exists()


@pytest.mark.slow
def test_a_film_with_blended_chunk_borders_goes_on_to_the_same_bytes(
    film: FilmResult, tiny_model: Path, tmp_path: Path
) -> None:
    settings = {"vae_blend_frames": 2}
    whole = generate(prepared_film(tiny_model, tmp_path / "whole.mp4", settings=settings))
    made = resume(stopped_after(1, tiny_model, tmp_path / "film.mp4", settings=settings))
    assert made.film_hash == whole.film_hash != film.film_hash
    assert not list(verify_run(open_run(made.run_dir)))
    assert not list(replay_segment(open_run(made.run_dir), 1))


def test_codes_that_were_all_logged_are_gathered_by_the_next_writer(tiny_model: Path, tmp_path: Path) -> None:
    run_dir = stopped_after(3, tiny_model, tmp_path / "film.mp4")
    folder = RunFolder(run_dir)
    codes = folder.read_codes()
    (run_dir / CODES_NAME).unlink()
    for take, stored in codes.items():
        folder.append_codes(take, 0, stored)
    resume(run_dir)
    assert not folder.has_logged_codes()
    gathered = folder.read_codes()
    assert (run_dir / CODES_NAME).exists()
    assert all(torch.equal(gathered[take], stored) for take, stored in codes.items())


def test_a_finished_film_is_put_together_again_without_its_networks(film: FilmResult, tmp_path: Path) -> None:
    shutil.copytree(film.run_dir, tmp_path / "film.run")
    made = resume(tmp_path / "film.run")
    assert made.film == tmp_path / "film.mp4"
    assert_same_film(made.film, film.film)
    assert (made.num_made, made.first_segment_s, made.steps_s) == (0, 0.0, {})


def test_codes_that_were_written_are_not_written_again(
    film: FilmResult, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from arlon.film.workers import CodeWorker

    prepared = prepared_film(tiny_model, tmp_path / "film.mp4")
    write, written = CodeWorker.run, []

    def counted(self: CodeWorker, request: Any) -> Any:
        if len(written) == 2:
            raise MemoryError
        written.append(request.stop)
        return write(self, request)

    monkeypatch.setattr(CodeWorker, "run", counted)
    with pytest.raises(MemoryError):
        generate(prepared)
    folder = RunFolder(prepared.paths.run_dir)
    assert {take: codes.shape[1] for take, codes in folder.read_codes().items()} == {0: 13}
    written.clear()
    assert resume(folder.path).film_hash == film.film_hash
    assert written == [8]
    assert not (folder.path / "codes.jsonl").exists()


@pytest.mark.parametrize("cut", [30, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 200))])
def test_a_torn_line_of_codes_does_not_count(film: FilmResult, tiny_model: Path, tmp_path: Path, cut: int) -> None:
    prepared = prepared_film(tiny_model, tmp_path / "film.mp4")
    folder = RunFolder(prepared.paths.run_dir)
    codes = RunFolder(film.run_dir).read_codes()
    from pipelines.runs.run_record import run_record

    folder.start(run_record(prepared, "local"))
    folder.append_codes(0, 0, codes[0][:, :8])
    folder.append_codes(0, 8, codes[0][:, 8:])
    path = folder.path / "codes.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert folder.read_codes()[0].equal(codes[0][:, :8])
    folder.append_codes(0, 8, codes[0][:, 8:11])
    assert folder.read_codes()[0].equal(codes[0][:, :11])
    assert resume(folder.path).film_hash == film.film_hash


WRITE_POINTS = (
    *("run.json:written:1", "run.json:renamed:1", "codes.jsonl:written:2", "codes.jsonl:synced:3"),
    *("codes.safetensors:synced:1", "codes.safetensors:renamed:1", "latents.safetensors:renamed:1"),
    *("fragment.mp4:synced:2", "segment.json:written:2", "segment.json:renamed:2", "segment.json:renamed:3"),
    *("film.json:renamed:1", "film.mp4:synced:1", "film.mp4:renamed:1"),
)


@pytest.mark.slow
@pytest.mark.parametrize("point", WRITE_POINTS)
def test_a_kill_at_a_write_point_loses_nothing_that_was_committed(
    film: FilmResult, tiny_model: Path, tmp_path: Path, point: str
) -> None:
    output = tmp_path / "film.mp4"
    ended = processes.run(make_film, tiny_model, output, environment={CRASH_VARIABLE: point})
    assert ended == -signal.SIGKILL
    folder = RunFolder(tmp_path / "film.run")
    if not folder.has_run():
        assert point == "run.json:written:1"
        generate(prepared_film(tiny_model, output))
    else:
        committed = {i: (folder.segment_dir(i) / "segment.json").stat().st_ino for i in folder.committed_indices()}
        made = resume(folder.path)
        assert made.num_made == 3 - len(committed)
        for index, inode in committed.items():
            assert (folder.segment_dir(index) / "segment.json").stat().st_ino == inode
    assert output.read_bytes() == film.film.read_bytes()
    assert not list(tmp_path.rglob("*.tmp"))
    assert not (tmp_path / "film.partial.mp4").exists()


def test_two_processes_on_one_run_are_refused(film: FilmResult, tmp_path: Path) -> None:
    shutil.copytree(film.run_dir, tmp_path / "film.run")
    with (
        RunLock(tmp_path / "film.run"),
        pytest.raises(RunLockedError, match=f"is in use by process {os.getpid()}: wait"),
    ):
        resume(tmp_path / "film.run")
    resume(tmp_path / "film.run")
    assert not (tmp_path / "film.run" / "run.lock").exists()


def test_the_lock_of_a_dead_process_is_in_nobodys_way(film: FilmResult, tmp_path: Path) -> None:
    shutil.copytree(film.run_dir, tmp_path / "film.run")
    (tmp_path / "film.run" / "run.lock").write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    assert resume(tmp_path / "film.run").film_hash == film.film_hash


def test_leftovers_are_swept_and_nothing_else(film: FilmResult, tmp_path: Path) -> None:
    run_dir = tmp_path / "film.run"
    shutil.copytree(film.run_dir, run_dir)
    leftovers = [
        run_dir / ".run.json.12.tmp",
        run_dir / "segments" / "0001" / ".latents.safetensors.12.tmp",
        tmp_path / ".film.mp4.12.tmp",
    ]
    mine = [tmp_path / ".other.mp4.12.tmp", run_dir / "notes.txt", run_dir / "segments" / "notes.txt"]
    for path in (*leftovers, *mine):
        path.write_text("x")
    (run_dir / "segments" / "0002" / "segment.json").unlink()
    assert resume(run_dir).num_made == 1
    assert not any(path.exists() for path in leftovers)
    assert all(path.exists() for path in mine)


def test_what_was_changed_by_hand_is_refused_in_one_line(film: FilmResult, tmp_path: Path) -> None:
    def refusal(damage: Callable[[Path], object]) -> str:
        run_dir = tmp_path / "film.run"
        shutil.copytree(film.run_dir, run_dir)
        damage(run_dir)
        with pytest.raises((RunFolderError, UsageError)) as caught:
            resume(run_dir)
        shutil.rmtree(run_dir)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def replaced(name: str, old: str, new: str) -> Callable[[Path], object]:
        return lambda run: (run / name).write_text((run / name).read_text().replace(old, new))

    def changed(name: str, **values: Any) -> Callable[[Path], object]:
        return lambda run: reseal(run / name, lambda stored: stored.update(values))

    segment = "segments/0001/segment.json"
    assert "was changed after it was written" in refusal(replaced("run.json", "a red circle", "a blue circle"))
    assert "not valid JSON" in refusal(lambda run: (run / "run.json").write_text("{"))
    assert "names no film in or beside it" in refusal(changed("run.json", film="../../film.mp4"))
    assert "names no film in or beside it" in refusal(changed("run.json", film="/etc/passwd"))
    assert "plan that this version" in refusal(changed("run.json", plan={}))
    assert "was changed after it was written" in refusal(replaced(segment, "green", "blue"))
    assert "it is segment 5 of its film" in refusal(changed(segment, index=5))
    inputs = json.loads((film.run_dir / segment).read_text())["inputs"]
    assert "other values of seed" in refusal(changed(segment, inputs=inputs | {"seed": 8}))
    assert "made from other codes" in refusal(changed(segment, inputs=inputs | {"codes": "0"}))
    assert "other frames than the segment before" in refusal(changed(segment, inputs=inputs | {"overlap": "0"}))
    assert "differs from its record" in refusal(lambda run: (run / "segments/0001/fragment.mp4").write_bytes(b""))
    assert "which has 3 segments" in refusal(lambda run: shutil.copytree(run / "segments/0002", run / "segments/0003"))
    assert "damaged or cut off" in refusal(lambda run: (run / "codes.safetensors").write_bytes(b"short"))


def test_a_segment_that_is_deleted_is_made_again(film: FilmResult, tmp_path: Path) -> None:
    run_dir = tmp_path / "film.run"
    shutil.copytree(film.run_dir, run_dir)
    shutil.rmtree(run_dir / "segments" / "0001")
    made = resume(run_dir)
    assert made.num_made == 1
    assert_same_film(made.film, film.film)


def test_another_model_is_refused_and_a_moved_one_can_be_named(film: FilmResult, tmp_path: Path) -> None:
    run_dir, model = tmp_path / "film.run", tmp_path / "moved"
    shutil.copytree(film.run_dir, run_dir)
    shutil.copytree(json.loads((run_dir / "run.json").read_text())["model"]["source"], model)
    reseal(run_dir / "run.json", lambda run: run["model"].update(source=str(tmp_path / "gone")))
    with pytest.raises(UsageError, match=r"model.*--model"):
        resume(run_dir)
    assert resume(run_dir, model=str(model)).film_hash == film.film_hash
    import torch

    torch.manual_seed(1)
    other = make_tiny_model(tmp_path / "other")
    weights = other / "dit" / "model.safetensors"
    assert weights.exists()
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor + 0.01 for name, tensor in load_file(weights).items()}
    save_file(tensors, weights)
    from arlon.checkpoint import write_model_index

    write_model_index(other, {})
    with pytest.raises(UsageError, match=r"another model.*'tiny'"):
        open_run(run_dir, model=str(other))


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", tmp_path / "film.mp4"):
        with pytest.raises(UsageError, match=r"is not a run folder: it holds no run\.json"):
            open_run(path)


def test_the_film_stands_for_its_run(film: FilmResult) -> None:
    assert open_run(film.film).folder.path == film.run_dir


def test_a_run_that_was_changed_after_it_was_opened_is_refused(film: FilmResult, tmp_path: Path) -> None:
    shutil.copytree(film.run_dir, tmp_path / "film.run")
    run = open_run(tmp_path / "film.run")
    reseal(tmp_path / "film.run" / "run.json", lambda values: values.update(stale=[0]))
    with pytest.raises(RuntimeError, match="was changed by another process just now"):
        generate(run.prepared, begin=lambda *_: continue_run(run))


@pytest.mark.parametrize("name", ["torch", "av", "diffusers", "transformers", "ftfy"])
def test_other_libraries_are_told(film: FilmResult, name: str) -> None:
    run = open_run(film.run_dir)
    assert changed_libraries(run.record) == []
    older = {**run.record, "versions": {**run.record["versions"], name: "0.1"}}
    (change,) = changed_libraries(older)
    assert change.startswith(f"{name} 0.1 -> ")


def test_libraries_that_an_earlier_version_did_not_record_are_not_told(film: FilmResult) -> None:
    run = open_run(film.run_dir)
    versions = {name: run.record["versions"][name] for name in ("av", "numpy", "safetensors", "torch")}
    assert changed_libraries({**run.record, "versions": versions}) == []


def test_libraries_that_films_no_longer_need_are_not_told(film: FilmResult) -> None:
    run = open_run(film.run_dir)
    versions = {**run.record["versions"], "vector-quantize-pytorch": "1.20.0"}
    assert changed_libraries({**run.record, "versions": versions}) == []
