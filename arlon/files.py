"""Files that survive a crash: whole or absent, and on disk when the call returns.

A file is written under a temporary name, flushed to disk and renamed, and its folder is flushed too, so that neither
a killed process nor a power cut leaves half of one. A log grows by whole lines; a torn last line is not read.

Every step is a *write point* with a name, such as `segment.json:renamed`. `ARLON_CRASH_AT=segment.json:renamed:2` ends
the process, as `kill -9` does, the second time it gets there; `benchmarks/crash.py` tries them all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CRASH_VARIABLE = "ARLON_CRASH_AT"
TEMPORARY = ".tmp"
"""How the names of temporary files end; they start with a dot."""
_CHUNK = 1 << 20
_passed: Counter[str] = Counter()


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file that appears complete or not at all, and stays."""
    path = Path(path)
    temporary = temporary_beside(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            write_point(path.name, "written")
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk names no file
    finally:
        with suppress(OSError):  # read-only by now: `sweep` does it later
            temporary.unlink(missing_ok=True)


def write_json(path: str | Path, values: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write a JSON file, as `write_bytes` does. File names that are no Unicode are escaped."""
    write_bytes(path, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace"))


def publish(temporary: Path, path: Path) -> None:
    """Give a file or folder whose content is on disk its name, in place of what had it."""
    write_point(path.name, "synced")
    temporary.replace(path)
    sync_folder(path.parent)
    write_point(path.name, "renamed")


def temporary_beside(path: Path) -> Path:
    """A name to write `path` under; `sweep` finds it."""
    return path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")


def append_line(path: Path, values: Mapping[str, Any], *, sync: bool = False) -> None:
    """Add a line of JSON to a log; `sync`: it is on disk when this returns. A torn line before it is ended."""
    data = (json.dumps(values, ensure_ascii=False, separators=(",", ":")) + "\n").encode()
    is_new = not path.exists()
    with path.open("ab+") as file:
        if file.tell() and not _ends_line(file):
            data = b"\n" + data
        file.write(data)
        write_point(path.name, "written")
        file.flush()
        if sync:
            os.fsync(file.fileno())
    if sync and is_new:
        sync_folder(path.parent)
    write_point(path.name, "synced")


def _ends_line(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a log; none if there is no log. Torn ones are left out."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            with suppress(ValueError):
                values = json.loads(line)
                if isinstance(values, dict) and line.endswith(b"\n"):
                    yield values


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, that stays."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)


def sync_folder(path: Path) -> None:
    """Have the names in a folder on disk; systems that cannot do this for a folder do it by themselves."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def link_or_copy(source: Path, target: Path) -> None:
    """The same content under a second name. Files are replaced, never written in place, so a hard link is safe."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        copy_file(source, target)


def copy_file(source: Path, target: Path) -> None:
    """A copy that is on disk."""
    shutil.copyfile(source, target)
    with target.open("rb+") as file:
        os.fsync(file.fileno())


def sweep(folders: Iterable[Path], names: Iterable[str]) -> None:
    """Remove what a crash left of files and folders of these names while they were written."""
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
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file of any size."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def hash_plain(values: Any) -> str:
    """SHA-256 of plain values, whatever the order of keys."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hash_bytes(text.encode(errors="backslashreplace"))


def hash_tensor(tensor: Tensor) -> str:
    """SHA-256 over type, shape and content of a tensor of any device."""
    tensor = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def write_point(name: str, step: str) -> None:
    """End the process here if the environment asks for it; see the module."""
    wanted = os.environ.get(CRASH_VARIABLE)
    if not wanted:
        return
    point = f"{name}:{step}"
    _passed[point] += 1
    if wanted == f"{point}:{_passed[point]}":
        os.kill(os.getpid(), signal.SIGKILL)
