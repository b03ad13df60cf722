from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.lock import RunLock, RunLockedError, holder_of

HOLD = (
    "import sys; from pipelines.lock import RunLock; lock = RunLock(sys.argv[1]); lock.__enter__();"
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
