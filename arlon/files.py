"""Durable files and content hashes: the one place that decides how Arlon writes to disk.

A file is written under a temporary name, flushed to disk (fsync) and renamed, and its folder is flushed too. So neither
a killed process nor a power cut leaves half a file, and what has been written is still there afterwards. A log grows by
whole lines; a torn last line is ignored when the log is read.

Every step is a *write point* with a name, such as `segment.json:renamed`. With the environment variable
`ARLON_CRASH_AT=segment.json:renamed:2` the process kills itself, as `kill -9` would, the second time it gets there;
`benchmarks/crash.py` tries them all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor  # importing torch takes a second, and most commands only write text

CRASH_VARIABLE = "ARLON_CRASH_AT"
TEMPORARY = ".tmp"
"""Suffix of the names of temporary files, which start with a dot."""
_passed: Counter[str] = Counter()


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Write a file that appears complete or not at all, and survives a crash once the `with` block is left.

    Yields:
        A temporary path in the same folder. The block writes the content to it; after the block it is flushed and
        renamed to `path`, or removed if the block raised an exception.

    Raises:
        OSError: If the disk is full or the folder cannot be written; the error names a file.
    """
    path = Path(path)
    temporary = temporary_beside(path)
    try:
        yield temporary
        write_point(path.name, "written")
        sync_file(temporary)
        publish(temporary, path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # "No space left" alone names no file
    finally:
        with suppress(OSError):  # the disk may be read-only by now; `sweep` removes it later
            temporary.unlink(missing_ok=True)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file atomically and durably, see `atomic_file`."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file atomically and durably. Characters that are no Unicode, as in file names, are escaped."""
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_json(path: str | Path, values: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write an indented JSON file atomically and durably."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def publish(temporary: Path, path: Path) -> None:
    """Rename a file or folder whose content is already on disk to `path`, replacing what is there, and flush that."""
    write_point(path.name, "synced")
    temporary.replace(path)
    sync_folder(path.parent)
    write_point(path.name, "renamed")


def temporary_beside(path: Path) -> Path:
    """Temporary name in the same folder as `path`, to write the content under; `sweep` finds it after a crash."""
    return path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")


def append_line(path: Path, values: Mapping[str, Any], *, sync: bool = False) -> None:
    """Append a line of JSON to a log. A torn line that a crash left at its end is terminated first.

    Args:
        path: The log; it is created if it does not exist.
        values: Content of the line.
        sync: Whether to flush the line to disk before returning.
    """
    data = (json.dumps(values, ensure_ascii=False, separators=(",", ":")) + "\n").encode()
    is_new = not path.exists()
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                data = b"\n" + data
        file.write(data)
        write_point(path.name, "written")
        file.flush()
        if sync:
            os.fsync(file.fileno())
    if sync and is_new:
        sync_folder(path.parent)
    write_point(path.name, "synced")


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines of a log, in order; torn lines are skipped, and a missing log has none."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            with suppress(ValueError):
                values = json.loads(line)
                if isinstance(values, dict) and line.endswith(b"\n"):
                    yield values


def make_folder(path: Path) -> None:
    """Make a folder and its parents, and flush their names to disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)


def sync_file(path: Path) -> None:
    """Flush the content of a file to disk (fsync)."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flush the names in a folder to disk, so that renames survive a crash; does nothing if the system cannot."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def link_or_copy(source: Path, target: Path) -> None:
    """Give the content of a file a second name; a hard link is safe, as files are replaced and never edited."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        copy_file(source, target)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file and flush the copy to disk."""
    shutil.copyfile(source, target)
    sync_file(target)


def sweep(folders: Iterable[Path], names: Iterable[str]) -> None:
    """Remove temporary files and folders that a crash left behind.

    Args:
        folders: Folders to look in; missing ones are skipped.
        names: Final names of the files and folders that were being written.
    """
    prefixes = tuple(f".{name}." for name in names)
    for folder in folders:
        for path in folder.glob(f".*{TEMPORARY}") if folder.is_dir() else ():
            if not path.name.startswith(prefixes):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def hash_bytes(data: bytes) -> str:
    """SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of the content of a file, in hexadecimal; large files are read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_plain(values: Any) -> str:
    """SHA-256 of plain values (what JSON can hold), in hexadecimal; the order of keys does not matter."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hash_bytes(text.encode(errors="backslashreplace"))


def hash_tensor(tensor: Tensor) -> str:
    """SHA-256 over dtype, shape and content of a tensor on any device, in hexadecimal."""
    import torch

    tensor = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def write_point(name: str, step: str) -> None:
    """Kill this process if the environment variable `ARLON_CRASH_AT` names this write point; for tests of crashes."""
    wanted = os.environ.get(CRASH_VARIABLE)
    if not wanted:
        return
    point = f"{name}:{step}"
    _passed[point] += 1
    if wanted == f"{point}:{_passed[point]}":
        os.kill(os.getpid(), signal.SIGKILL)
