"""The command line; each command is a module of `pipelines.commands`.

Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer

from arlon.memory import keep_freed_memory
from arlon.threads import limit_spinning
from pipelines.commands.batch import batch
from pipelines.commands.common import INTERRUPTED, say
from pipelines.commands.doctor import doctor
from pipelines.commands.evaluate import evaluate
from pipelines.commands.extend import extend
from pipelines.commands.fork import fork
from pipelines.commands.generate import generate
from pipelines.commands.inspect import inspect
from pipelines.commands.plan import plan
from pipelines.commands.redo import redo
from pipelines.commands.resume import resume
from pipelines.commands.sheet import sheet
from pipelines.commands.status import status
from pipelines.commands.verify import verify

app = typer.Typer(
    name="arlon",
    help="Long video from text: autoregressive codes plan the film, a diffusion transformer renders it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(value: bool) -> None:
    if value:
        from arlon.version import version

        typer.echo(f"arlon {version()}")
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


COMMANDS = (generate, plan, batch, resume, redo, extend, fork, status, inspect, verify, sheet, evaluate, doctor)
for command in COMMANDS:
    app.command()(command)


def main() -> None:
    """Entry point of the console script."""
    signal.signal(signal.SIGTERM, _interrupt)
    keep_freed_memory()
    limit_spinning()
    try:
        app()
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(INTERRUPTED)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
