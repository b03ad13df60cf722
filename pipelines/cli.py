"""The command line; each command is a module of `pipelines.commands`.

Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer

from pipelines.commands.common import INTERRUPTED, say
from pipelines.commands.generate import generate, plan
from pipelines.commands.sheet import sheet

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
        from pipelines.version import version

        typer.echo(f"arlon {version()}")
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


for command in (generate, plan, sheet):
    app.command()(command)


def main() -> None:
    """Entry point of the console script."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app()
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(INTERRUPTED)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
