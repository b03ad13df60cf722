"""`arlon status`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.commands.common import reported
from pipelines.commands.options import JsonOption, RunArgument

if TYPE_CHECKING:
    from pipelines.runs.status import RunStatus


def status(
    run: RunArgument,
    as_json: JsonOption = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show how it goes on until the process at it ends.")] = False,
) -> None:
    """Tell where a run stands: what is committed, what is made now, how long it will take."""
    with reported():
        from pipelines.runs.status import read_status

        if watch:
            _watch(run)
        found = read_status(run)
        if as_json:
            typer.echo(json.dumps(found.to_plain(), indent=2, ensure_ascii=False))
        else:
            typer.echo("\n".join(_lines(found)))


def _watch(run: Path) -> None:
    from rich.console import Console

    from pipelines.runs.progress_view import watch
    from pipelines.runs.resume import find_run
    from pipelines.store.lock import holder_of

    folder = find_run(run).path
    watch(folder, Console(stderr=True), is_running=lambda: holder_of(folder) is not None)


def _lines(status: RunStatus) -> list[str]:
    holder = f" by {status.holder}" if status.holder else ""
    lines = [
        f"{status.state}{holder}",
        f"codes     {status.num_codes_written} of {status.num_code_frames} frames",
        f"segments  {status.num_committed} of {status.num_segments} committed",
    ]
    if status.now:
        left = "" if status.left_s is None else f", about {status.left_s:.0f} s left"
        lines.append(f"now       {status.now}{left}")
    if status.drift:
        drift = status.drift
        lines.append(f"drift     colour {drift['colour']:.1f}, contrast {drift['contrast']:+.1f} levels (last segment)")
    return [*lines, f"film      {status.film}"]
