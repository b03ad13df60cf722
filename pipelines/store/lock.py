"""One process at a time works on a run.

The lock is the operating system's (flock) on a file in the run folder, so it ends with the process that holds it,
however that ends: a lock file left by a killed process or a restarted machine is in nobody's way. What the file says
tells who holds it, for messages and for writers.

Under Ray another process writes into the folder: the writer. It may outlive a command that was killed, so it has a
lock of its own, for as long as it lives, and works only for the holder of the run: `WriterLock`. `RunLock` waits until
no writer is left. Since a holder makes itself known before it looks for writers, and a writer takes its lock before it
looks for the holder, there is no moment at which two of them write.
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
"""For a lock of another command; one that only looks has it for a moment."""
WRITER_PATIENCE_S = 20.0
"""For the writer of a killed command, which Ray ends within seconds."""
LEAVING_PATIENCE_S = 2.0
"""For the writer of a command that ends; if it takes longer, its lock file stays."""


class RunLockedError(ArlonError, RuntimeError):
    """Another process works on the run."""


class RunLock:
    """Held inside a `with`; the folder must be there.

    Args:
        folder: The run folder.
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
        with suppress(OSError):  # a full disk: the lock holds all the same
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
        with suppress(OSError):  # a disk that became read-only: the lock ends all the same
            self._writer_is_gone(LEAVING_PATIENCE_S)
        self._release()

    def _writer_is_gone(self, patience_s: float) -> bool:
        """Wait until no writer is left, and remove its lock file."""
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
        with suppress(OSError):  # a run that left nothing leaves no folder either
            self.path.parent.rmdir()


class WriterLock:
    """Held from now on by a process that writes for another one, until it ends or `release` is called.

    Args:
        folder: The run folder.
        holder: What `holder_mark` told the command for which this process writes.

    Raises:
        RunLockedError: If there is another writer, or the run is in other hands by now.
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
            raise RunLockedError(f"'{folder}' is in other hands: this writer's command was ended")
        with suppress(OSError):
            os.truncate(descriptor, 0)
            os.write(descriptor, json.dumps(_ourselves()).encode())

    def release(self) -> None:
        """Give the lock up before the process ends."""
        os.close(self._descriptor)


def holder_mark(folder: str | Path) -> str:
    """A text that differs for everyone who ever locks a run; empty if nobody did since it was last given up."""
    try:
        return (Path(folder) / LOCK_NAME).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _ourselves() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "mark": secrets.token_hex(8)}


def holder_of(folder: str | Path) -> str | None:
    """Who works on a run, for messages; None: nobody."""
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
    """Lock a file, which is made if it is missing; None if somebody else has it all the time."""
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
        os.close(descriptor)  # it is another's, or its last holder removed it just after we opened it


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
