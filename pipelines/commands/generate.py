"""`arlon generate`, and making a film with word of how it goes."""

from __future__ import annotations

import json
import shlex
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from arlon.errors import UsageError
from pipelines.commands.common import count, only_results_on_stdout, reported, say
from pipelines.commands.options import (
    ComputeOptions,
    Executor,
    FilmOptions,
    HlsOption,
    JsonOption,
    QuietOption,
    SettingOptions,
    grouped,
    read_film,
)

if TYPE_CHECKING:
    from pipelines.runs.generate import Begin, FilmProgress, FilmResult
    from pipelines.runs.picture import PreparedPicture
    from pipelines.runs.prepare import Prepared


@grouped
def generate(
    *,
    film: FilmOptions,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="film.mp4 or a folder. [default: outputs/PROMPT-SEED]"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at --output.")] = False,
    compute: ComputeOptions,
    how: SettingOptions,
    sheet: Annotated[bool, typer.Option("--sheet", help="Write a contact sheet beside the film.")] = False,
    metadata: Annotated[
        bool,
        typer.Option("--metadata/--no-metadata", help="Store in the film and beside it what it was made from."),
    ] = True,
    hls: HlsOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make a film."""
    with reported():
        from pipelines.runs.picture import is_picture, prepare_picture
        from pipelines.runs.prepare import prepare

        compute.check()
        storyboard, settings = read_film(film, how)
        if is_picture(storyboard, output):
            _refuse_for_picture({"--executor": compute.executor is not Executor.local, "--sheet": sheet, "--hls": hls})
            checked = prepare_picture(
                storyboard, model=film.model, output=output, overwrite=overwrite, settings=settings, metadata=metadata
            )
            _print_picture(checked, as_json=as_json)
            return
        prepared = prepare(
            storyboard,
            model=film.model,
            output=output,
            overwrite=overwrite,
            settings=settings,
            metadata=metadata,
            hls=hls,
        )
        result = make_film(prepared, compute, quiet=quiet)
        sheet_path = _write_sheet_beside(result.film) if sheet else None
        print_film(result, sheet_path, as_json=as_json, quiet=quiet)


def _refuse_for_picture(options: dict[str, bool]) -> None:
    """Refuse options that would do nothing where one frame is made."""

    if given := [name for name, is_given in options.items() if is_given]:
        raise UsageError(f"a picture is one frame, made in one process: leave out {', '.join(given)}")


def _print_picture(prepared: PreparedPicture, *, as_json: bool) -> None:
    from pipelines.runs.picture import make_picture

    say(f"seed {prepared.job.plan.storyboard.seed}, model {prepared.record['model']['name']}")
    with only_results_on_stdout():
        result = make_picture(prepared)
    say(f"one frame in {result.elapsed_s:.1f} s")
    typer.echo(json.dumps(result.to_plain(), indent=2) if as_json else str(result.picture))


def make_film(
    prepared: Prepared,
    compute: ComputeOptions,
    *,
    begin: Begin | None = None,
    quiet: bool = False,
) -> FilmResult:
    """Make a film and tell how it goes, unless `quiet`; `begin` makes its run folder ready, a new one if it is None.

    On a terminal that is a view that changes, else a line a segment.
    """
    from pipelines.runs.generate import generate as run
    from pipelines.runs.generate import start_run
    from pipelines.store.lock import RunLockedError
    from pipelines.store.run_folder import RunFolder, RunFolderError

    film, graph = prepared.plan, compute.read_graph()
    if not quiet:
        _announce(prepared)
    is_live = not quiet and sys.stderr.isatty()
    done = 0

    def on_progress(progress: FilmProgress) -> None:
        nonlocal done
        done = progress.done
        if not quiet and not is_live:
            say(progress_line(progress))

    try:
        with only_results_on_stdout(), _view(prepared) if is_live else nullcontext():
            return run(
                prepared,
                begin=begin or start_run,
                executor=compute.executor.value,
                address=compute.address,
                graph=graph,
                on_progress=on_progress,
            )
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            say(f"interrupted after {done} of {len(film.segments)} segments")
        if done:
            say(f"what there is plays: {prepared.paths.partial}")
        is_refused = isinstance(error, RunLockedError | RunFolderError)
        if not is_refused and RunFolder(prepared.paths.run_dir).has_run():
            say(f"go on with: arlon resume {shlex.quote(str(prepared.paths.run_dir))}")
        raise


def _announce(prepared: Prepared) -> None:
    film = prepared.plan
    say(f"seed {film.storyboard.seed}, model {prepared.record['model']['name']}")
    say(
        f"{count(len(film.shots), 'shot')}, {count(len(film.segments), 'segment')}, {film.num_frames} frames, "
        f"{film.duration_s:.1f} s at {film.fps:g} fps"
    )


def _view(prepared: Prepared) -> AbstractContextManager[Any]:
    from pipelines.runs.progress_view import live_view

    return live_view(prepared.paths.run_dir)


def progress_line(progress: FilmProgress) -> str:
    """One line about a segment that is done: `segment 3/8  shot 2  1.9 s  about 9 s left  a red circle ...`."""
    result = progress.result
    prompt = progress.prompt if len(progress.prompt) <= 60 else f"{progress.prompt[:57]}..."
    time_left = f"about {progress.left_s:.0f} s left" if progress.done < progress.total else "done"
    spent_s = sum(result.elapsed_s.values())
    return (
        f"segment {progress.done}/{progress.total}  shot {result.segment.shot + 1}  {spent_s:.1f} s  "
        f"{time_left}  {prompt}"
    )


def _write_sheet_beside(film: Path) -> Path:
    from pipelines.deliver.sheet import film_sheet, write_sheet

    target = film.with_suffix(".png")
    write_sheet(film_sheet(film), target)
    return target


def print_film(result: FilmResult, sheet_path: Path | None = None, *, as_json: bool, quiet: bool = False) -> None:
    """Say what was made, and print where it is."""
    if as_json:
        extra = {} if sheet_path is None else {"sheet": str(sheet_path)}
        typer.echo(json.dumps(result.to_plain() | extra, indent=2, ensure_ascii=False))
        return
    pace = result.duration_s / result.elapsed_s
    if not quiet:
        say(f"{result.duration_s:.1f} s of film in {result.elapsed_s:.1f} s ({pace:.2f} x real time)")
    typer.echo(str(result.film))
    if sheet_path is not None:
        typer.echo(str(sheet_path))
