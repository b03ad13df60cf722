"""Options of the commands that make a film or go on with one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.commands.common import AddressOption, Executor

if TYPE_CHECKING:
    from pipelines.executors.ray_graph import GraphConfig

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or the film beside it.")]
RunModelOption = Annotated[
    str | None, typer.Option("--model", help="Name or folder of the run's model, where it has moved.")
]


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """Where a film is computed."""

    executor: Annotated[
        Executor, typer.Option("--executor", help="One process, or Ray actors; the film is the same.")
    ] = Executor.local
    address: AddressOption = None
    graph: Annotated[
        Path | None,
        typer.Option("--graph", metavar="FILE.yaml", help="Ray actors of each role; docs/cluster.md."),
    ] = None

    def check(self) -> None:
        """Refuse options that would not be used.

        Raises:
            UsageError: If there are any.
        """
        from arlon.film.storyboard import UsageError

        for name, value in (("--address", self.address), ("--graph", self.graph)):
            if value and self.executor is not Executor.ray:
                raise UsageError(f"{name} needs --executor ray")

    def read_graph(self) -> GraphConfig | None:
        """The actors of each role, from the file of --graph.

        Raises:
            UsageError: If it cannot be read, or is wrong.
        """
        if self.graph is None:
            return None
        from arlon.config import load_config
        from arlon.film.storyboard import UsageError
        from pipelines.executors.ray_graph import GraphConfig

        try:
            return load_config(GraphConfig, [self.graph])
        except (ValueError, FileNotFoundError) as error:
            raise UsageError(str(error)) from error
