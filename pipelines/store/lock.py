"""Locks of a run folder, so that only one process at a time works on a run.

The lock is the operating system's (flock) on a file in the run folder. It ends with the process that holds it, however
that ends, so a stale lock file blocks nobody. The content of the file says who holds it, for messages and for writers.

Under Ray another process, the writer, writes into the folder. It may outlive a command that was killed, so it holds a
lock of its own as long as it lives (`WriterLock`), and works only for the holder of the run. `RunLock` waits until no
writer is left. A holder writes down who it is before it looks for writers, and a writer takes its lock before it looks
for the holder. So there is no moment at which two processes write.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from arlon.errors import ArlonError

LOCK_NAME = "run.lock"
WRITER_LOCK_NAME = "writer.lock"
PATIENCE_S = 0.1
"""Seconds to wait for the lock of another command; `arlon status` holds it for a moment only."""
WRITER_PATIENCE_S = 20.0
"""Seconds to wait for the writer of a killed command, which Ray ends within seconds."""
LEAVING_PATIENCE_S = 2.0
"""Seconds to wait for the writer of a command that ends; after that its lock file stays."""


class RunLockedError(ArlonError, RuntimeError):
    """Another process works on the run."""


class RunLock:
    """Lock of a run, held inside a `with` block.

    Args:
        folder: The run folder, which must exist.
        writer_patience_s: Seconds to wait for the writer of a killed command.

    Raises:
        RunLockedError: On entering, if another process works on the run.
    """

    def __init__(self, folder: str | Path, *, writer_patience_s: float = WRITER_PATIENCE_S) -> None:
        self.path = Path(folder) / LOCK_NAME
        self._writer_path = self.path.with_name(WRITER_LOCK_NAME)
        self._writer_patience_s = writer_patience_s
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        self._descriptor = _lock_file(self.path, PATIENCE_S)
        if self._descriptor is None:
            raise RunLockedError(f"'{self.path.parent}' is in use by {_holder(self.path)}: wait for it")
        with suppress(OSError):  # on a full disk the lock holds all the same
            os.truncate(self._descriptor, 0)
            os.write(self._descriptor, json.dumps(_ourselves()).encode())
        try:
            if not self._writer_is_gone(self._writer_patience_s):
                raise RunLockedError(
                    f"'{self.path.parent}' is still in use by {_holder(self._writer_path)}, "
                    "the Ray writer of a command that was killed: wait for it, or end it"
                )
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # on a disk that became read-only the lock ends all the same
            self._writer_is_gone(LEAVING_PATIENCE_S)
        self._release()

    def _writer_is_gone(self, patience_s: float) -> bool:
        """Wait until no writer is left, and remove its lock file; False if one is left after `patience_s` seconds."""
        if not self._writer_path.exists():
            return True
        descriptor = _lock_file(self._writer_path, patience_s)
        if descriptor is None:
            return False
        self._writer_path.unlink(missing_ok=True)
        os.close(descriptor)
        return True

    def _release(self) -> None:
        assert self._descriptor is not None
        with suppress(OSError):
            self.path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None
        with suppress(OSError):  # not empty: only a run that left nothing leaves no folder
            self.path.parent.rmdir()


class WriterLock:
    """Lock of a process that writes for the holder of a run, from now until the process ends or calls `release`.

    Args:
        folder: The run folder.
        holder: Result of `holder_mark` in the command for which this process writes.
        patience_s: Seconds to wait for another writer.

    Raises:
        RunLockedError: If there is another writer, or another command holds the run by now.
    """

    def __init__(self, folder: str | Path, holder: str, *, patience_s: float = WRITER_PATIENCE_S) -> None:
        path = Path(folder) / WRITER_LOCK_NAME
        descriptor = _lock_file(path, patience_s)
        if descriptor is None:
            raise RunLockedError(f"'{folder}' is written by {_holder(path)}: wait for it")
        self._descriptor = descriptor
        if holder_mark(folder) != holder:
            path.unlink(missing_ok=True)
            self.release()
            raise RunLockedError(f"'{folder}' is held by another command: the one of this writer has ended")
        with suppress(OSError):
            os.truncate(descriptor, 0)
            os.write(descriptor, json.dumps(_ourselves()).encode())

    def release(self) -> None:
        """Release the lock before the process ends."""
        os.close(self._descriptor)


def holder_mark(folder: str | Path) -> str:
    """Text that identifies the process that locked a run last, different each time; empty if the run is not locked."""
    try:
        return (Path(folder) / LOCK_NAME).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _ourselves() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "mark": secrets.token_hex(8)}


def holder_of(folder: str | Path) -> str | None:
    """Describe the process that works on a run, for messages; None if there is none."""
    path = Path(folder) / LOCK_NAME
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _holder(path)
    finally:
        os.close(descriptor)
    return None


def _lock_file(path: Path, patience_s: float) -> int | None:
    """Lock a file, which is made if it is missing; None if another process holds it for all of `patience_s` seconds."""
    until_s = time.monotonic() + patience_s
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_file_at(path, descriptor):
                return descriptor
        except BlockingIOError:
            if time.monotonic() >= until_s:
                os.close(descriptor)
                return None
            time.sleep(0.02)
        os.close(descriptor)  # another process holds it, or its last holder removed the file after we opened it


def _is_file_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
        here = values["host"] == socket.gethostname()
        return f"process {int(values['pid'])}" + ("" if here else f" on {str(values['host'])[:64]}")
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
