"""Processes of their own that can be killed, or hold a terminal, without importing everything anew.

A server that has imported what a film needs forks them, so that one costs what it does and not the seconds of its
imports. They are real processes: signals, exit codes and what is left on disk are as for any other.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

PRELOADED = "tests.pipelines.preloaded"
LIMIT_S = 600.0


def start(
    function: Callable[..., object], *arguments: Any, environment: Mapping[str, str] | None = None
) -> BaseProcess:
    """Start a function, which an import must find, in a process of its own.

    Args:
        function: What to run.
        arguments: For the function; they are pickled.
        environment: Variables that are set in the process before.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOADED])
    process = context.Process(
        target=_run, args=(function.__module__, function.__qualname__, arguments, dict(environment or {}))
    )
    process.start()
    return process


def run(function: Callable[..., object], *arguments: Any, environment: Mapping[str, str] | None = None) -> int:
    """Run a function in a process of its own; its exit code, or minus the signal that ended it."""
    process = start(function, *arguments, environment=environment)
    process.join(LIMIT_S)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(f"{function.__qualname__} did not end within {LIMIT_S:.0f} s")
    return process.exitcode


def _run(module: str, name: str, arguments: tuple[Any, ...], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    getattr(importlib.import_module(module), name)(*arguments)


def command(arguments: Sequence[str], terminal: str, stdout: str) -> None:
    """Run `arlon` in this process, with stderr on a terminal and stdout in a file; it ends the process."""
    from pipelines.cli import main

    # Tests that a shell started in the background ignore Ctrl-C, and so would their children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(terminal, os.O_RDWR | os.O_NOCTTY), sys.stderr.fileno())
    os.dup2(os.open(stdout, os.O_WRONLY | os.O_CREAT), sys.stdout.fileno())
    sys.argv = ["arlon", *arguments]
    main()
