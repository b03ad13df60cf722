"""`arlon fork`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.common import reported, say
from pipelines.commands.options import RunArgument, RunModelOption


def fork(
    run: RunArgument,
    output: Annotated[Path, typer.Argument(metavar="NEW", help="Film (.mp4) or folder of the copy.")],
    model: RunModelOption = None,
) -> None:
    """Copy a run, sharing its files, to go on from it in another way."""
    with reported():
        from pipelines.runs.edit import fork_run
        from pipelines.runs.resume import open_run

        run_dir = fork_run(open_run(run, model=model), output)
        say(f"go on with: arlon resume|redo|extend {shlex.quote(str(run_dir))}")
        typer.echo(str(run_dir))
