"""`arlon resume`."""

from __future__ import annotations

from pipelines.commands.common import (
    Executor,
    GraphOption,
    JsonOption,
    QuietOption,
    check_ray_options,
    read_graph,
    reported,
    say,
)
from pipelines.commands.generate import make_film, print_film
from pipelines.commands.run_options import AddressOption, ExecutorOption, RunArgument, RunModelOption


def resume(
    run: RunArgument,
    model: RunModelOption = None,
    executor: ExecutorOption = Executor.local,
    address: AddressOption = None,
    graph: GraphOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Go on with a film that was interrupted; what is committed is not made again."""
    with reported():
        from pipelines.runs.resume import continue_run, open_run

        check_ray_options(executor, address, graph)
        opened = open_run(run, model=model)
        for change in opened.changed_libraries:
            say(f"note: {change} since this run was started; what is made now may differ in its last bits")
        film = make_film(
            opened.prepared,
            executor.value,
            address,
            graph=read_graph(graph),
            begin=lambda *_: continue_run(opened),
            quiet=quiet,
        )
        print_film(film, as_json=as_json, quiet=quiet)
