"""Options of the commands that go on with a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.common import Executor

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or the film beside it.")]
RunModelOption = Annotated[
    str | None, typer.Option("--model", help="Name or folder of the run's model, where it has moved.")
]
ExecutorOption = Annotated[
    Executor, typer.Option("--executor", help="One process, or Ray actors; the film is the same.")
]
AddressOption = Annotated[str | None, typer.Option("--address", help="Ray cluster to join.")]
