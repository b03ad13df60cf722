"""`arlon extend`."""

from __future__ import annotations

from pipelines.commands.common import (
    DurationOption,
    JoinOption,
    JsonOption,
    PromptsOption,
    QuietOption,
    StoryboardOption,
    TransitionOption,
    grouped,
    reported,
)
from pipelines.commands.generate import make_film, print_film
from pipelines.commands.run_options import ComputeOptions, RunArgument, RunModelOption


@grouped
def extend(
    *,
    run: RunArgument,
    prompt: PromptsOption = None,
    storyboard: StoryboardOption = None,
    duration: DurationOption = None,
    transition: JoinOption = TransitionOption.carry,
    model: RunModelOption = None,
    compute: ComputeOptions,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Add shots at the end of a film; of a storyboard, only the shots are read."""
    with reported():
        from pipelines.commands.options import FilmOptions, read_film_options
        from pipelines.runs.edit import begin_change, change_run, with_shots_added
        from pipelines.runs.resume import open_run

        compute.check()
        options = FilmOptions(
            prompts=prompt or [],
            storyboard=storyboard,
            seed=None,
            duration=duration,
            transition=transition.value,
            values={},
            assignments=[],
        )
        added, _ = read_film_options(options)
        old = open_run(run, model=model)
        new = change_run(old, with_shots_added(old, added.shots))
        film = make_film(new.prepared, compute, begin=lambda _, executor: begin_change(old, new, executor), quiet=quiet)
        print_film(film, as_json=as_json, quiet=quiet)
