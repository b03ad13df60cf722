"""A disk that is full, and one that is read-only: one line, nothing half-written, and the film can go on."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from arlon.files import append_line, read_lines
from pipelines.cli import app
from pipelines.executors.write import WriteWorker
from pipelines.runs.generate import FilmResult, generate
from pipelines.store.run_folder import RunFolder
from tests.pipelines.films import SHOTS, prepared_film

PAGE = 4096
DISK_BYTES = 2**20


@pytest.fixture(scope="module")
def film(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> FilmResult:
    """The film, made with room."""
    return generate(prepared_film(tiny_model, tmp_path_factory.mktemp("room") / "film.mp4"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of a megabyte, in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "arlon-test", folder)
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(("umount", "-l", folder), check=True)


def arlon(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def make(disk: Path, model: Path) -> Result:
    """Begin the film, or go on with it."""
    if RunFolder(disk / "film.run").has_run():
        return arlon("resume", disk / "film.run")
    storyboard = disk.parent / "film.json"
    storyboard.write_text(json.dumps({"seed": 7, "shots": list(SHOTS)}))
    options = ("--storyboard", storyboard, "--model", model, "--threads", 1)
    return arlon("generate", *options, "--output", disk / "film.mp4")


def leave_room(disk: Path, num_bytes: int) -> None:
    """Fill a disk but for some bytes, with a file that is no part of a film."""
    (disk / "ballast").unlink(missing_ok=True)
    with (disk / "ballast").open("wb", buffering=0) as ballast, suppress(OSError):
        while ballast.write(bytes(PAGE)):
            pass
    size = (disk / "ballast").stat().st_size
    with (disk / "ballast").open("rb+") as ballast:
        ballast.truncate(max(size - num_bytes, 0))


def assert_one_line(result: Result, *words: str) -> None:
    assert result.exit_code == 1, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert any(word in errors[0] for word in words), errors


def assert_nothing_is_half_written(disk: Path, film: FilmResult) -> None:
    folder, whole = RunFolder(disk / "film.run"), RunFolder(film.run_dir)
    for index in folder.committed_indices():
        assert folder.read_segment(index) == whole.read_segment(index)
    if folder.has_run():
        folder.read_run()
    if (folder.path / "codes.safetensors").exists():
        assert (folder.path / "codes.safetensors").read_bytes() == (whole.path / "codes.safetensors").read_bytes()
    if (disk / "film.json").exists():
        json.loads((disk / "film.json").read_text())
    assert not (disk / "film.mp4").exists()
    assert list(disk.rglob("*.tmp")) == []


@pytest.mark.slow
def test_a_full_disk_costs_one_line_and_the_film_goes_on_when_there_is_room(
    film: FilmResult, tiny_model: Path, disk: Path
) -> None:
    """With more and more room, the film gets further and further; it is full at every kind of file."""
    failures = []
    for num_pages in range(0, DISK_BYTES // PAGE, 2):
        leave_room(disk, num_pages * PAGE)
        result = make(disk, tiny_model)
        if result.exit_code == 0:
            break
        assert_one_line(result, "No space left on device")
        assert_nothing_is_half_written(disk, film)
        failures.append(len(list(RunFolder(disk / "film.run").committed_indices())))
    assert len(failures) > 4
    assert failures == sorted(failures)
    assert failures[0] == 0
    assert failures[-1] > 0
    assert (disk / "film.mp4").read_bytes() == film.film.read_bytes()
    assert arlon("verify", disk / "film.run").exit_code == 0


@pytest.mark.slow
def test_a_log_of_events_for_which_there_is_no_room_stops_no_film(
    film: FilmResult, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first line is written, the second is torn, and the others fail."""
    lines: list[Any] = []

    def torn(path: Path, values: Any, **options: Any) -> None:
        if path.name != "events.jsonl":
            append_line(path, values, **options)
            return
        lines.append(values)
        if len(lines) == 1:
            append_line(path, values)
        elif len(lines) == 2:
            with path.open("ab") as file:
                file.write(b'{"time":1,"ev')
        if len(lines) > 1:
            raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("pipelines.store.run_folder.append_line", torn)
    made = generate(prepared_film(tiny_model, tmp_path / "film.mp4"))
    monkeypatch.undo()
    assert made.film_hash == film.film_hash
    assert [event["event"] for event in read_lines(made.run_dir / "events.jsonl")] == ["start"]
    assert arlon("status", made.run_dir).exit_code == 0
    made.film.unlink()
    assert arlon("resume", made.run_dir).exit_code == 0
    assert made.film.read_bytes() == film.film.read_bytes()
    assert [event["event"] for event in read_lines(made.run_dir / "events.jsonl")] == ["start", "start", "film"]


def remount(disk: Path, mode: str) -> None:
    subprocess.run(("mount", "-o", f"remount,{mode}", disk), check=True)


def test_nothing_can_be_begun_on_a_read_only_disk(tiny_model: Path, disk: Path) -> None:
    remount(disk, "ro")
    assert_one_line(make(disk, tiny_model), "Read-only file system")
    assert list(disk.iterdir()) == []


@pytest.mark.slow
def test_a_disk_that_became_read_only_costs_one_line(
    film: FilmResult, tiny_model: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The film is stopped in its second segment, and then the disk is mounted read-only."""
    write = WriteWorker.run

    def stopped(self: Any, request: Any) -> Any:
        if request.segment.index:
            raise OSError(30, "Read-only file system", str(disk))
        return write(self, request)

    monkeypatch.setattr(WriteWorker, "run", stopped)
    assert_one_line(make(disk, tiny_model), "Read-only file system")
    remount(disk, "ro")
    monkeypatch.undo()
    assert list(RunFolder(disk / "film.run").committed_indices()) == [0]
    assert_nothing_is_half_written(disk, film)
    for command in ("resume", "redo"):
        options = ("--shot", 1) if command == "redo" else ()
        assert_one_line(arlon(command, disk / "film.run", *options), "Read-only file system")
    assert arlon("status", disk / "film.run").exit_code == 0
    assert arlon("inspect", disk / "film.run").exit_code == 0
    remount(disk, "rw")
    assert make(disk, tiny_model).exit_code == 0
    assert (disk / "film.mp4").read_bytes() == film.film.read_bytes()
