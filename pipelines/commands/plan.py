"""`arlon plan`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from pipelines.commands.common import count, reported
from pipelines.commands.options import FilmOptions, JsonOption, SettingOptions, grouped, read_film

if TYPE_CHECKING:
    from collections.abc import Sequence

    from arlon.checkpoint import ModelFolder
    from arlon.film.plan import Plan
    from arlon.film.settings import Settings
    from pipelines.doctor.film_cost import FilmCost

T = TypeVar("T")
MAX_ROWS, TAIL_ROWS = 30, 10
"""Shots that `arlon plan` prints of a film that has more, and how many of them are the last."""
FILE_COLUMNS = 120
"""Of a timeline that is not printed on a terminal."""


@grouped
def plan(
    *,
    film: FilmOptions,
    how: SettingOptions,
    is_whole: Annotated[bool, typer.Option("--all", help="Print every shot of a long film.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Print the frame-exact timeline of a film without making it."""
    with reported():
        from arlon.film.media import check_references
        from arlon.film.plan import clip_plan
        from arlon.film.prepare import make_settings, plan_film
        from pipelines.runs.picture import check_picture, is_picture

        storyboard, settings = read_film(film, how)
        if is_picture(storyboard, None):
            check_picture(storyboard)
        planned = plan_film(storyboard, film.model)
        film_plan, folder = planned.plan, planned.model
        references = check_references(film_plan)
        chosen = make_settings(film_plan.geometry, settings)
        if is_picture(storyboard, None):
            film_plan = clip_plan(film_plan, 1)
        if as_json:
            plain = film_plan.to_plain() | {"references": [given.describe() for given in references]}
            plain |= {"cost": _cost(film_plan, folder, chosen).to_plain()}
            typer.echo(json.dumps(plain, indent=2, ensure_ascii=False))
        else:
            print_timeline(film_plan, is_whole=is_whole)
            head, tail = _head_and_tail(references, is_whole=is_whole)
            for given in head:
                typer.echo(given.describe())
            if tail:
                typer.echo(f"... {count(len(references) - len(head) - len(tail), 'more file')}, shown with --all")
            for given in tail:
                typer.echo(given.describe())
            _print_cost(_cost(film_plan, folder, chosen))


def print_timeline(film: Plan, *, is_whole: bool = False) -> None:
    """Print the shots of a film and their sums; of a long one the first and the last, unless `is_whole`."""
    from rich.console import Console
    from rich.table import Table

    from arlon.film.plan import timeline_rows

    head, tail = _head_and_tail(film.shots, is_whole=is_whole)
    rows = timeline_rows(film, (*head, *tail))
    table = Table(box=None, pad_edge=False)
    for column in rows[0]:
        is_text = column in ("join", "prompt")
        table.add_column(
            column,
            justify="left" if is_text else "right",
            no_wrap=column != "prompt",
            min_width=16 if column == "prompt" else None,
        )
    for number, row in enumerate(rows):
        if tail and number == len(head):
            left_out = f"{count(len(film.shots) - len(rows), 'more shot')}, shown with --all"
            table.add_row(*("..." if column == "shot" else "" for column in row if column != "prompt"), left_out)
        table.add_row(*row.values())
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, FILE_COLUMNS)
    console.print(table)
    console.print(_sums(film), soft_wrap=True)


def _head_and_tail(items: Sequence[T], *, is_whole: bool) -> tuple[Sequence[T], Sequence[T]]:
    """The first and the last of many things; all are the first if they are few, or `is_whole`."""
    if is_whole or len(items) <= MAX_ROWS:
        return items, ()
    return items[: MAX_ROWS - TAIL_ROWS], items[-TAIL_ROWS:]


def _sums(film: Plan) -> str:
    board, fit = film.storyboard, film.frame_fit
    size = f"{board.width} x {board.height} pixels" if fit.is_exact else fit.describe()
    change = film.num_frames - sum(shot.asked_frames for shot in film.shots)
    rounded = f" ({change / film.fps:+.2f} s by rounding)" if change else ""
    return (
        f"{count(len(film.shots), 'shot')}, {film.num_frames} frames, {film.duration_s:.2f} s at {film.fps:g} fps"
        f"{rounded}, {size}, {count(len(film.takes), 'take')}, "
        f"{count(len(film.segments), 'segment')}, seed {board.seed}"
    )


def _cost(film: Plan, model: ModelFolder, settings: Settings) -> FilmCost:
    from arlon.film.geometry import read_configs
    from pipelines.doctor.film_cost import plan_cost

    return plan_cost(film, read_configs(model), settings)


def _print_cost(cost: FilmCost) -> None:
    from pipelines.doctor.film_cost import cost_lines

    for line in cost_lines(cost):
        typer.echo(line)
