"""How every command prints, and how an error reaches the user.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. An error is one readable message on stderr;
`ARLON_DEBUG=1` shows the traceback too.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from typing import Any

import typer

from arlon.errors import UsageError

FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130


def count(number: int, noun: str) -> str:
    """A number of things in words: `1 film`, `3 films`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def say(text: str) -> None:
    """Print a line that is not a result, on stderr."""
    typer.echo(text, err=True)


def only_results_on_stdout() -> AbstractContextManager[Any]:
    """Send what is printed to stderr while work is done: Ray prints to stdout when a process dies."""
    return redirect_stdout(sys.stderr)


@contextmanager
def reported() -> Iterator[None]:
    """Turn an error inside the `with` block into one message on stderr and an exit code."""
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt as error:
        _print_traceback()
        raise typer.Exit(INTERRUPTED) from error
    except UsageError as error:
        _fail(str(error), WRONG_USAGE, error)
    except (ValueError, OSError, RuntimeError, ImportError, MemoryError) as error:
        _fail(_message(error), FAILED, error)
    except Exception as error:
        text = f"unexpected {type(error).__name__}: {_message(error)} (ARLON_DEBUG=1 shows where)"
        _fail(text, FAILED, error)


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error).strip() or type(error).__name__


def _fail(text: str, code: int, error: BaseException) -> None:
    _print_traceback()
    say(f"error: {printable(text)}")
    raise typer.Exit(code) from error


def _print_traceback() -> None:
    if os.environ.get("ARLON_DEBUG"):
        traceback.print_exc()


def printable(text: str) -> str:
    """Write out control characters, which would steer a terminal, as escapes; line breaks stay."""
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)
