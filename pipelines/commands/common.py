"""What the commands share: exit codes, options, and how an error reaches the user.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. An error is one readable message on stderr;
`ARLON_DEBUG=1` shows the traceback too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130


class Executor(str, Enum):  # noqa: UP042 (typer shows the values of a plain str Enum)
    """How a film is computed."""

    local = "local"
    ray = "ray"


class TransitionOption(str, Enum):  # noqa: UP042
    """How shots given by --prompt join."""

    carry = "continue"
    cut = "cut"


class DtypeOption(str, Enum):  # noqa: UP042
    """Precision of the networks."""

    float32 = "float32"
    bfloat16 = "bfloat16"


PromptsOption = Annotated[
    list[str] | None, typer.Option("--prompt", "-p", help="A shot; give it again for the next one.")
]
StoryboardOption = Annotated[
    Path | None,
    typer.Option("--storyboard", help="Storyboard file: .yaml, .json, or .txt with one prompt a line."),
]
ModelOption = Annotated[str | None, typer.Option("--model", help="Name or folder of a model. [default: shapes]")]
DurationOption = Annotated[
    str | None, typer.Option("--duration", help='Length of shots that give none: seconds, or "36f" frames.')
]
JoinOption = Annotated[TransitionOption, typer.Option("--transition", help="How shots given by --prompt join.")]
HeightOption = Annotated[int | None, typer.Option("--height", help="Frame height in pixels.")]
WidthOption = Annotated[int | None, typer.Option("--width", help="Frame width in pixels.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any film-level storyboard key or setting, e.g. ar_top_p=0.9."),
]
AddressOption = Annotated[str | None, typer.Option("--address", help="Ray cluster to join.")]
PrecisionOption = Annotated[DtypeOption | None, typer.Option("--dtype", help="Precision. [default: float32]")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu, cuda, ... [default: cpu]")]
HlsOption = Annotated[bool, typer.Option("--hls", help="Make an HLS stream beside a film, to watch it while it grows.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing of how it goes, only what came of it.")]


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer has to see it, which knows no groups: the fields of a dataclass are options of their own."""
    parameters = signature(command, eval_str=True).parameters.values()
    groups = {given.name: given.annotation for given in parameters if is_dataclass(given.annotation)}

    @wraps(command)
    def flat(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    options: list[Parameter] = []
    for given in parameters:
        group = groups.get(given.name)
        options += [given] if group is None else signature(group, eval_str=True).parameters.values()
    flat.__signature__ = Signature(options)
    return flat


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def say(text: str) -> None:
    typer.echo(text, err=True)


def only_results_on_stdout() -> AbstractContextManager[Any]:
    """While work is done: Ray prints there when a process dies, and what reads our results would trip over it."""
    return redirect_stdout(sys.stderr)


@contextmanager
def reported() -> Iterator[None]:
    """Turn errors into one message on stderr and an exit code."""
    from arlon.film.storyboard import UsageError

    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt as error:
        _debug()
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
    _debug()
    say(f"error: {printable(text)}")
    raise typer.Exit(code) from error


def printable(text: str) -> str:
    """Text whose control characters, which would steer a terminal, are written out."""
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)


def _debug() -> None:
    if os.environ.get("ARLON_DEBUG"):
        import traceback

        traceback.print_exc()
