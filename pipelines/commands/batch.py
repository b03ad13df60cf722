"""`arlon batch`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from arlon.errors import UsageError
from pipelines.commands.common import FAILED, count, only_results_on_stdout, printable, reported, say
from pipelines.commands.options import (
    AddressOption,
    Executor,
    HlsOption,
    JsonOption,
    ModelOption,
    SettingOptions,
    grouped,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipelines.batch.batch import BatchOptions, FilmOutcome, FilmTask


@grouped
def batch(
    *,
    films: Annotated[
        Path, typer.Argument(metavar="FILE.jsonl", help="One film a line: prompts or a storyboard; docs/cluster.md.")
    ],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Film NAME goes to OUTPUT_DIR/NAME.")],
    model: ModelOption = None,
    executor: Annotated[
        Executor,
        typer.Option("--executor", help="One film after another, or several at a time with Ray."),
    ] = Executor.local,
    address: AddressOption = None,
    pipelines: Annotated[
        int | None,
        typer.Option("--pipelines", min=1, help="Films at the same time. [default: as many as there is room for]"),
    ] = None,
    retries: Annotated[int, typer.Option("--retries", min=0, help="Further attempts after a failure.")] = 2,
    how: SettingOptions,
    hls: HlsOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make many films; what is finished is skipped, and one that fails does not stop the rest."""
    with reported():
        from pipelines.batch.batch import BatchOptions, FilmTask, read_batch

        if executor is Executor.local and (address or pipelines):
            raise UsageError(f"{'--address' if address else '--pipelines'} needs --executor ray")
        film_values, settings = how.read()
        _check_values(film_values, settings, model)
        options = BatchOptions(
            output_dir=str(output_dir.expanduser().resolve()), model=model, num_retries=retries, hls=hls
        )
        read = read_batch(films, film_values=film_values, settings=settings)
        tasks = [film for film in read if isinstance(film, FilmTask)]
        outcomes = [film for film in read if not isinstance(film, FilmTask)]
        say(count(len(read), "film") + (f", {len(outcomes)} of which cannot be made" if outcomes else ""))
        with only_results_on_stdout():
            for outcome in _run(tasks, options, settings, executor, address, pipelines):
                outcomes.append(outcome)
                say(f"{len(outcomes)}/{len(read)}  {outcome_line(outcome)}")
        print_outcomes(sorted(outcomes, key=lambda outcome: outcome.line), as_json=as_json)
        if any(outcome.state == "failed" for outcome in outcomes):
            raise typer.Exit(FAILED)


def _check_values(film_values: dict[str, Any], settings: dict[str, Any], model: str | None) -> None:
    """Refuse what would fail every film."""
    from arlon.config import config_from_dict
    from arlon.film.geometry import open_model
    from arlon.film.settings import Settings
    from arlon.film.storyboard import storyboard_from_prompts, with_overrides

    with_overrides(storyboard_from_prompts(["any"]), film_values)
    try:
        config_from_dict(Settings, settings)
        if model is not None:
            open_model(model)
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(str(error)) from error


def _run(
    tasks: list[FilmTask],
    options: BatchOptions,
    settings: dict[str, Any],
    executor: Executor,
    address: str | None,
    num_pipelines: int | None,
) -> Iterator[FilmOutcome]:
    if executor is Executor.local or not tasks:
        from pipelines.batch.batch import run_batch_local

        return run_batch_local(tasks, options)
    from arlon.threads import available_cores
    from pipelines.batch.ray_batch import run_batch_graph

    return run_batch_graph(
        tasks,
        options,
        address=address,
        num_pipelines=num_pipelines,
        device=settings.get("device", "cpu"),
        num_threads=settings.get("num_threads", available_cores()),
    )


def outcome_line(outcome: FilmOutcome) -> str:
    """One line about a film: `done  circle  12.3 s  /out/circle/film.mp4`."""
    name = printable(outcome.name)
    if outcome.state == "done":
        return f"done  {name}  {outcome.elapsed_s:.1f} s  {outcome.film}"
    if outcome.state == "skipped":
        return f"skipped, it is complete  {name}  {outcome.film}"
    return f"failed  {name}  {_one_line(outcome.error or '')}"


def print_outcomes(outcomes: list[FilmOutcome], *, as_json: bool) -> None:
    """What became of every film, and how many are done, were complete before, and failed."""
    counts = {state: sum(outcome.state == state for outcome in outcomes) for state in ("done", "skipped", "failed")}
    if as_json:
        plain = counts | {"films": [outcome.to_plain() for outcome in outcomes]}
        typer.echo(json.dumps(plain, indent=2, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("line", "film", "state", "time", "tries", "film file, or why not"):
        table.add_column(column, justify="right" if column in ("line", "time", "tries") else "left")
    for outcome in outcomes:
        what = outcome.film if outcome.error is None else _one_line(outcome.error)
        time = f"{outcome.elapsed_s:.1f} s" if outcome.elapsed_s else ""
        tries = str(outcome.num_attempts or "")
        table.add_row(str(outcome.line), printable(outcome.name), outcome.state, time, tries, what)
    console = Console(markup=False, highlight=False)
    console.print(table)
    console.print(", ".join(f"{number} {state}" for state, number in counts.items()))


def _one_line(error: str) -> str:
    """An error of several lines in one: the storyboard's problems stand in lines of their own."""
    return printable("; ".join(line.strip() for line in error.splitlines()).replace(":; ", ": "))
