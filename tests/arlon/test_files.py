"""Durable files: complete or absent, whatever happens while they are written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from arlon.files import (
    CRASH_VARIABLE,
    append_line,
    atomic_file,
    hash_bytes,
    hash_file,
    make_folder,
    read_lines,
    sweep,
    write_bytes,
    write_json,
)


def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})

    def fail_halfway() -> None:
        with atomic_file(path) as temporary:
            temporary.write_bytes(b"half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_halfway()
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        write_bytes(tmp_path / "none" / "a", b"")
    assert "none" in str(caught.value.filename)


@pytest.mark.parametrize(("step", "is_new"), [("written", False), ("synced", False), ("renamed", True)])
def test_a_kill_at_each_write_point_leaves_the_old_file_or_the_new(tmp_path: Path, step: str, is_new: bool) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    code = f"from arlon.files import write_bytes; write_bytes({str(path)!r}, b'new')"
    environment = {CRASH_VARIABLE: f"a.bin:{step}:1", "PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == -9
    assert path.read_bytes() == (b"new" if is_new else b"old")
    sweep([tmp_path, tmp_path / "missing"], [path.name])
    assert list(tmp_path.iterdir()) == [path]


def test_a_torn_line_of_a_log_is_ended_and_skipped(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    append_line(log, {"a": 1})
    with log.open("ab") as file:
        file.write(b'{"a": 2')
    assert list(read_lines(log)) == [{"a": 1}]
    append_line(log, {"a": 3}, sync=True)
    assert list(read_lines(log)) == [{"a": 1}, {"a": 3}]


def test_hash_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b")
    write_bytes(tmp_path / "a" / "b" / "c", bytes(range(256)) * 10_000)
    assert hash_file(tmp_path / "a" / "b" / "c") == hash_bytes(bytes(range(256)) * 10_000)


def test_importing_loads_no_torch() -> None:
    code = "import sys, arlon.files, arlon.errors; assert 'torch' not in sys.modules"
    environment = {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
