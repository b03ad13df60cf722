"""`arlon inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.commands.common import printable, reported
from pipelines.commands.options import JsonOption


def inspect(
    source: Annotated[Path, typer.Argument(metavar="FILE_OR_RUN", help="A film, finished or not, or a run folder.")],
    storyboard: Annotated[
        bool, typer.Option("--storyboard", help="Print the storyboard as YAML, to make the film again or change it.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Tell what a film was made from: storyboard, seeds, model, settings; of a run, also how long it took."""
    with reported():
        from pipelines.runs.inspect import inspect_film

        record = inspect_film(source)
        if storyboard:
            import yaml

            typer.echo(yaml.safe_dump(record["storyboard"], sort_keys=False, allow_unicode=True, width=1000), nl=False)
        elif as_json:
            typer.echo(json.dumps(record, indent=2, ensure_ascii=False))
        else:
            _print_record(record)


def _print_record(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from pipelines.runs.inspect import shot_rows

    rows = shot_rows(record)
    try:
        lines = _lines(record)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"the record is damaged or was changed: {type(error).__name__} {error}") from error
    if not rows:
        raise ValueError("the record is damaged or was changed: it has no shots")
    table = Table(box=None, pad_edge=False)
    for column in rows[0]:
        table.add_column(
            column, justify="left" if column in ("join", "prompt") else "right", no_wrap=column != "prompt"
        )
    for row in rows:
        table.add_row(*map(printable, row.values()))
    console = Console(markup=False, highlight=False)
    console.print(table)
    for line in lines:
        console.print(printable(line))


def _lines(record: dict[str, Any]) -> list[str]:
    board, timeline = record["storyboard"], record["timeline"]
    rows, columns = timeline.get("computed_at", (None, None))
    computed = "" if rows is None else f", computed at {columns} x {rows}"
    lines = [
        f"{timeline['num_frames']} frames, {timeline['duration_s']:.2f} s at {timeline['fps']:g} fps, "
        f"{board['width']} x {board['height']} pixels{computed}, seed {board['seed']}",
        f"model {record['model']['name']} {record['model']['hash'][:12]}, arlon {record['arlon']}",
        "settings " + ", ".join(f"{name} {value}" for name, value in record["settings"].items()),
    ]
    if "timings_s" in record:
        lines.append("seconds " + ", ".join(f"{role} {spent:.1f}" for role, spent in record["timings_s"].items()))
    return lines
