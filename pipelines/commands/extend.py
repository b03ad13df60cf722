"""`arlon extend`."""

from __future__ import annotations

from pipelines.commands.common import reported
from pipelines.commands.generate import make_film, print_film
from pipelines.commands.options import (
    ComputeOptions,
    JsonOption,
    QuietOption,
    RunArgument,
    RunModelOption,
    ShotOptions,
    grouped,
)


@grouped
def extend(
    *,
    run: RunArgument,
    shots: ShotOptions,
    model: RunModelOption = None,
    compute: ComputeOptions,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Add shots at the end of a film; of a storyboard, only the shots are read."""
    with reported():
        from pipelines.runs.edit import begin_change, change_run, with_shots_added
        from pipelines.runs.resume import open_run

        compute.check()
        added = shots.read_shots()
        old = open_run(run, model=model)
        new = change_run(old, with_shots_added(old, added.shots))
        film = make_film(new.prepared, compute, begin=lambda _, executor: begin_change(old, new, executor), quiet=quiet)
        print_film(film, as_json=as_json, quiet=quiet)
