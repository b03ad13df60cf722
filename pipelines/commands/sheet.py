"""`arlon sheet`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from arlon.errors import UsageError
from pipelines.commands.common import reported


def sheet(
    film: Annotated[Path, typer.Argument(help="A film, any video, or a run folder.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="PNG. [default: beside the film]")] = None,
    columns: Annotated[int, typer.Option("--columns", help="Frames a shot.")] = 8,
    scale: Annotated[int | None, typer.Option("--scale", min=1, max=64, help="Enlarge frames this many times.")] = None,
) -> None:
    """Write a contact sheet of a film: a row a shot, its prompt above it."""
    with reported():
        from pipelines.deliver.sheet import film_sheet, find_film, write_sheet

        target = output or find_film(film).with_suffix(".png")
        if target.suffix.lower() != ".png":
            raise UsageError(f"a contact sheet is written as .png, got '{target}'")
        write_sheet(film_sheet(film, num_columns=columns, scale=scale), target)
        typer.echo(str(target))
