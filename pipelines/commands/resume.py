"""`arlon resume`."""

from __future__ import annotations

from pipelines.commands.common import reported, say
from pipelines.commands.generate import make_film, print_film
from pipelines.commands.options import ComputeOptions, JsonOption, QuietOption, RunArgument, RunModelOption, grouped


@grouped
def resume(
    *,
    run: RunArgument,
    model: RunModelOption = None,
    compute: ComputeOptions,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Go on with a film that was interrupted; what is committed is not made again."""
    with reported():
        from pipelines.runs.resume import continue_run, open_run
        from pipelines.runs.run_record import changed_libraries

        compute.check()
        opened = open_run(run, model=model)
        for change in changed_libraries(opened.record):
            say(f"note: {change} since this run was started; what is made now may differ in its last bits")
        film = make_film(opened.prepared, compute, begin=lambda *_: continue_run(opened), quiet=quiet)
        print_film(film, as_json=as_json, quiet=quiet)
