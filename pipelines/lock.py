"""One process at a time works on a run.

The lock is the operating system's (flock) on a file in the run folder, so it ends with the process that holds it,
however that ends: a lock file left by a killed process or a restarted machine is in nobody's way. What the file says
is only for messages.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

LOCK_NAME = "run.lock"
PATIENCE = 5
"""How often the lock is tried, 20 ms apart."""


class RunLockedError(RuntimeError):
    """Another process works on the run."""


class RunLock:
    """Held inside a `with`; the folder must be there.

    Args:
        folder: The run folder.

    Raises:
        RunLockedError: On entering, if another process works on the run.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / LOCK_NAME
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        while self._descriptor is None:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            if not _locked(descriptor):
                os.close(descriptor)
                raise RunLockedError(f"'{self.path.parent}' is in use by {_holder(self.path)}: wait for it")
            if _is_file_at(self.path, descriptor):
                self._descriptor = descriptor
            else:  # its last holder removed the file just after we opened it
                os.close(descriptor)
        with suppress(OSError):  # a full disk: the lock holds all the same
            os.truncate(self._descriptor, 0)
            os.write(self._descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._descriptor is not None
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None
        with suppress(OSError):  # a run that left nothing leaves no folder either
            self.path.parent.rmdir()


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


def _locked(descriptor: int) -> bool:
    """Lock a file, if nobody else has it; `holder_of` has it for a moment only."""
    for _ in range(PATIENCE):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.02)
    return False


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
