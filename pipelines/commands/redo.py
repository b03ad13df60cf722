"""`arlon redo`."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.commands.common import reported
from pipelines.commands.generate import make_film, print_film
from pipelines.commands.options import ComputeOptions, JsonOption, QuietOption, RunArgument, RunModelOption, grouped


@grouped
def redo(
    *,
    run: RunArgument,
    shot: Annotated[int, typer.Option("--shot", help="Number of the shot, from 1.")],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Its new prompt. [default: as it was]")] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Its new seed. [default: a fresh one, if the prompt stays]")
    ] = None,
    model: RunModelOption = None,
    compute: ComputeOptions,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make one shot again, and only what depends on it; the film as it was is kept as a version of the run."""
    with reported():
        from pipelines.runs.edit import begin_change, change_run, with_shot_changed
        from pipelines.runs.resume import open_run

        compute.check()
        old = open_run(run, model=model)
        new = change_run(old, with_shot_changed(old, shot, prompt=prompt, seed=seed))
        film = make_film(new.prepared, compute, begin=lambda _, executor: begin_change(old, new, executor), quiet=quiet)
        print_film(film, as_json=as_json, quiet=quiet)
