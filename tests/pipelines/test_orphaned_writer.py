"""A command on a cluster is killed while its writer writes a segment and lives on; `arlon resume` follows at once.

The order is made certain by stopping processes: the writer between the first file of a segment and its commit, and the
raylet, which would end the writer, until the next command holds the run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks import crash
from pipelines.cli import app
from pipelines.runs.generate import generate
from pipelines.store.lock import WRITER_LOCK_NAME, holder_of
from pipelines.store.run_folder import SEGMENT_NAME, RunFolder
from tests.pipelines.films import assert_same_film, prepared_film

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SHOTS = ({"prompt": "a red circle moves left", "duration": "221f"}, {"prompt": "a blue square", "duration": "221f"})
LIMIT_S = 240.0


def of_process(process: int) -> tuple[str, int] | None:
    """State (a letter, T: stopped) and parent of a process; None: it has ended."""
    try:
        state, parent = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return None
    return None if state in "ZX" else (state, int(parent))


def stop(process: int) -> None:
    os.kill(process, signal.SIGSTOP)
    while (found := of_process(process)) is not None and found[0] != "T":
        time.sleep(0.001)


def let_go_on(*processes: int) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGCONT)


def stopped_writer(command: subprocess.Popen[str], folder: RunFolder) -> int:
    """The writer of a command, stopped between the first file of a segment and its commit."""
    index, until_s = 2, time.monotonic() + LIMIT_S
    while time.monotonic() < until_s:
        assert command.poll() is None, command.communicate()[1]
        where = folder.segment_dir(index)
        if (where / SEGMENT_NAME).exists():
            index += 1
        elif where.is_dir() and any(where.iterdir()):
            writer = int(json.loads((folder.path / WRITER_LOCK_NAME).read_text())["pid"])
            stop(writer)
            if not (where / SEGMENT_NAME).exists():
                return writer
            let_go_on(writer)
        time.sleep(0.0005)
    raise AssertionError("the writer was not caught while it wrote a segment")


class Watch:
    """Looks at a run in a thread, and lets the stopped processes go on when another command holds the run."""

    def __init__(self, folder: RunFolder, writer: int, raylet: int) -> None:
        self.folder, self.writer, self.raylet = folder, writer, raylet
        self.has_waited = self.has_begun_too_early = False
        self.at_its_end: dict[int, int] = {}
        """Committed segments when the writer had ended."""
        self.is_over = threading.Event()

    def run(self) -> None:
        while not self.is_over.wait(0.02):
            has_begun = sum(event["event"] == "start" for event in self.folder.events()) > 1
            if of_process(self.writer) is None:
                self.at_its_end = crash.committed(self.folder)
                return
            self.has_begun_too_early |= has_begun
            if holder_of(self.folder.path) and not self.has_waited:
                self.has_waited = True
                time.sleep(0.5)
                let_go_on(self.writer, self.raylet)

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self.run)
        thread.start()
        try:
            yield
        finally:
            let_go_on(self.writer, self.raylet)
            self.is_over.set()
            thread.join()


def test_a_run_goes_on_when_the_orphaned_writer_is_gone(ray_session: Any, tiny_model: Path, tmp_path: Path) -> None:
    whole = generate(prepared_film(tiny_model, tmp_path / "whole.mp4", *SHOTS))
    board = tmp_path / "board.json"
    board.write_text(json.dumps({"seed": 7, "shots": SHOTS}))
    output, folder = tmp_path / "film.mp4", RunFolder(tmp_path / "film.run")
    address = ray_session.get_runtime_context().gcs_address
    options = ("--model", tiny_model, "--threads", 1, "--executor", "ray", "--address", address)
    command = crash.start("generate", "--storyboard", board, "--output", output, *options)
    writer = stopped_writer(command, folder)
    before = crash.committed(folder)
    found = of_process(writer)
    assert found is not None
    watch = Watch(folder, writer, raylet=found[1])
    assert Path(f"/proc/{watch.raylet}/comm").read_text().strip() == "raylet"
    with watch.running():
        stop(watch.raylet)
        os.killpg(command.pid, signal.SIGKILL)
        command.communicate()
        resumed = CliRunner().invoke(app, ["resume", str(folder.path)])
    assert resumed.exit_code == 0, resumed.stderr
    assert watch.has_waited
    assert not watch.has_begun_too_early, "two processes wrote into the run"
    after = crash.committed(folder)
    assert sorted(after) == list(range(len(after)))
    kept = before | watch.at_its_end
    assert len(before) >= 2
    assert {index: after[index] for index in kept} == kept
    assert max(crash.commits(folder).values()) == 1
    assert_same_film(output, whole.film)
