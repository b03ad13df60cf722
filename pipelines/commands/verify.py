"""`arlon verify`."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.commands.common import FAILED, count, reported, say
from pipelines.commands.options import RunArgument, RunModelOption


def verify(
    run: RunArgument,
    segment: Annotated[
        int | None, typer.Option("--segment", help="Make this segment (from 0) again, too, and compare its bits.")
    ] = None,
    model: RunModelOption = None,
) -> None:
    """Check a run: all hashes, how its parts fit, and that the film is made of its segments."""
    with reported():
        from pipelines.runs.resume import open_run
        from pipelines.runs.verify import replay_segment, verify_run

        opened = open_run(run, model=model)
        problems = list(verify_run(opened))
        if segment is not None and not problems:
            problems = list(replay_segment(opened, segment))
        for problem in problems:
            say(f"error: {problem}")
        if problems:
            raise typer.Exit(FAILED)
        there = sum(1 for _ in opened.folder.committed_indices())
        again = "" if segment is None else f"; segment {segment} came out the same, bit for bit"
        typer.echo(f"{there} of {count(len(opened.plan.segments), 'segment')} committed, all as recorded{again}")
