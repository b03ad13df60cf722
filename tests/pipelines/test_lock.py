from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipelines.store.lock import RunLock, RunLockedError, WriterLock, holder_mark, holder_of

HOLD = (
    "import sys; from pipelines.store.lock import RunLock; lock = RunLock(sys.argv[1]); lock.__enter__();"
    "print('held', flush=True); sys.stdin.read()"
)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with RunLock(tmp_path):
        assert holder_of(tmp_path) == f"process {os.getpid()}"
        with pytest.raises(RunLockedError, match=f"in use by process {os.getpid()}"), RunLock(tmp_path):
            pass
    assert holder_of(tmp_path) is None
    with RunLock(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_folder_goes_with_its_lock(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with RunLock(tmp_path / "run"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(RunLockedError, match=f"process {process.pid}"), RunLock(tmp_path):
        pass
    process.kill()
    process.communicate()
    assert (tmp_path / "run.lock").exists()
    assert holder_of(tmp_path) is None
    with RunLock(tmp_path):
        assert holder_of(tmp_path) == f"process {os.getpid()}"


WRITE = (
    "import sys; from pipelines.store.lock import WriterLock; lock = WriterLock(sys.argv[1], sys.argv[2]);"
    "print('held', flush=True); sys.stdin.read()"
)


def test_the_writer_of_a_killed_command_is_waited_for(tmp_path: Path) -> None:
    """A command was killed, and its writer lives on: the run is refused until the writer is gone, and then free."""
    (tmp_path / "mine.txt").write_text("keep")
    with RunLock(tmp_path):
        mark = holder_mark(tmp_path)
    (tmp_path / "run.lock").write_text(mark)
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITE, tmp_path, mark],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "held\n"
    with pytest.raises(RunLockedError, match=f"process {writer.pid}, the Ray writer"):
        RunLock(tmp_path, writer_patience_s=0.1).__enter__()
    assert holder_of(tmp_path) is None
    threading.Timer(0.3, writer.kill).start()
    with RunLock(tmp_path, writer_patience_s=60):
        assert writer.poll() is not None or writer.wait(5)
        assert not (tmp_path / "writer.lock").exists()
    writer.communicate()


def test_a_writer_works_for_the_holder_of_the_run_only(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with RunLock(tmp_path):
        earlier = holder_mark(tmp_path)
        writer = WriterLock(tmp_path, earlier)
        with pytest.raises(RunLockedError, match="is written by process"):
            WriterLock(tmp_path, earlier, patience_s=0.1)
        writer.release()
    with RunLock(tmp_path):
        with pytest.raises(RunLockedError, match="another command"):
            WriterLock(tmp_path, earlier)
        WriterLock(tmp_path, holder_mark(tmp_path)).release()
    with pytest.raises(RunLockedError, match="another command"):
        WriterLock(tmp_path, earlier)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
