"""`arlon generate` and `arlon plan`."""

from __future__ import annotations

import json
import shlex
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from pipelines.commands.common import (
    AspectOption,
    BaseOption,
    DtypeOption,
    DurationOption,
    EndImageOption,
    Executor,
    FpsOption,
    FramesOption,
    GraphOption,
    GuidanceOption,
    HeightOption,
    HlsOption,
    ImageOption,
    JoinOption,
    JsonOption,
    ModelOption,
    NegativeOption,
    PromptsOption,
    QuietOption,
    ResolutionOption,
    SeedOption,
    SetOption,
    SolverOption,
    StepsOption,
    StoryboardOption,
    TransitionOption,
    VideoOption,
    WidthOption,
    check_ray_options,
    count,
    only_results_on_stdout,
    read_graph,
    reported,
    say,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipelines.film_cost import FilmCost
    from pipelines.generate import Begin, FilmResult, Prepared, Progress
    from pipelines.graph import GraphConfig
    from pipelines.picture import PreparedPicture
    from pipelines.plan import Plan
    from pipelines.requests import Settings


T = TypeVar("T")
MAX_ROWS, TAIL_ROWS = 30, 10
"""Shots that `arlon plan` prints of a film that has more, and how many of them are the last."""
FILE_COLUMNS = 120
"""Of a timeline that is not printed on a terminal."""


def generate(
    prompt: PromptsOption = None,
    storyboard: StoryboardOption = None,
    model: ModelOption = None,
    seed: SeedOption = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="film.mp4 or a folder. [default: outputs/PROMPT-SEED]"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at --output.")] = False,
    duration: DurationOption = None,
    num_frames: FramesOption = None,
    transition: JoinOption = TransitionOption.carry,
    fps: FpsOption = None,
    height: HeightOption = None,
    width: WidthOption = None,
    aspect: AspectOption = None,
    resolution: ResolutionOption = None,
    image: ImageOption = None,
    end_image: EndImageOption = None,
    video: VideoOption = None,
    base_only: BaseOption = False,
    num_inference_steps: StepsOption = None,
    guidance_scale: GuidanceOption = None,
    negative_prompt: NegativeOption = None,
    solver: SolverOption = None,
    executor: Annotated[
        Executor, typer.Option("--executor", help="One process, or Ray actors; the film is the same.")
    ] = Executor.local,
    address: Annotated[str | None, typer.Option("--address", help="Ray cluster to join.")] = None,
    graph: GraphOption = None,
    dtype: Annotated[DtypeOption | None, typer.Option("--dtype", help="Precision. [default: float32]")] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, ... [default: cpu]")] = None,
    threads: Annotated[int | None, typer.Option("--threads", help="Processor threads. [default: all cores]")] = None,
    assignments: SetOption = None,
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
        from pipelines.generate import prepare
        from pipelines.options import FilmOptions, read_film_options
        from pipelines.picture import is_picture, prepare_picture

        check_ray_options(executor, address, graph)
        options = FilmOptions(
            prompts=prompt or [],
            storyboard=storyboard,
            seed=seed,
            duration=_length(duration, num_frames),
            transition=transition.value,
            values={
                "fps": fps,
                "height": height,
                "width": width,
                "aspect": aspect,
                "resolution": resolution,
                "use_codes": False if base_only else None,
                "num_inference_steps": num_inference_steps,
                "guidance_scale": guidance_scale,
                "negative_prompt": negative_prompt,
                "solver": solver,
                "dtype": dtype.value if dtype else None,
                "device": device,
                "num_threads": threads,
            },
            assignments=assignments or [],
            image=image,
            end_image=end_image,
            video=video,
        )
        film, settings = read_film_options(options)
        if is_picture(film, output):
            _refuse_for_picture({"--executor": executor is not Executor.local, "--sheet": sheet, "--hls": hls})
            checked = prepare_picture(
                film, model=model, output=output, overwrite=overwrite, settings=settings, metadata=metadata
            )
            _print_picture(checked, as_json=as_json)
            return
        prepared = prepare(
            film, model=model, output=output, overwrite=overwrite, settings=settings, metadata=metadata, hls=hls
        )
        result = make_film(prepared, executor.value, address, graph=read_graph(graph), quiet=quiet)
        sheet_path = _write_sheet_beside(result.film) if sheet else None
        print_film(result, sheet_path, as_json=as_json, quiet=quiet)


def plan(
    prompt: PromptsOption = None,
    storyboard: StoryboardOption = None,
    model: ModelOption = None,
    seed: SeedOption = None,
    duration: DurationOption = None,
    num_frames: FramesOption = None,
    transition: JoinOption = TransitionOption.carry,
    fps: FpsOption = None,
    height: HeightOption = None,
    width: WidthOption = None,
    aspect: AspectOption = None,
    resolution: ResolutionOption = None,
    image: ImageOption = None,
    end_image: EndImageOption = None,
    video: VideoOption = None,
    base_only: BaseOption = False,
    num_inference_steps: StepsOption = None,
    guidance_scale: GuidanceOption = None,
    negative_prompt: NegativeOption = None,
    solver: SolverOption = None,
    assignments: SetOption = None,
    is_whole: Annotated[bool, typer.Option("--all", help="Print every shot of a long film.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Print the frame-exact timeline of a film without making it."""
    with reported():
        from pipelines.generate import make_settings, open_for_film
        from pipelines.options import FilmOptions, read_film_options
        from pipelines.picture import check_picture, is_picture
        from pipelines.plan import clip_plan
        from pipelines.references import check_references

        options = FilmOptions(
            prompts=prompt or [],
            storyboard=storyboard,
            seed=seed,
            duration=_length(duration, num_frames),
            transition=transition.value,
            values={
                "fps": fps,
                "height": height,
                "width": width,
                "aspect": aspect,
                "resolution": resolution,
                "use_codes": False if base_only else None,
                "num_inference_steps": num_inference_steps,
                "guidance_scale": guidance_scale,
                "negative_prompt": negative_prompt,
                "solver": solver,
            },
            assignments=assignments or [],
            image=image,
            end_image=end_image,
            video=video,
        )
        film, settings = read_film_options(options)
        if is_picture(film, None):
            check_picture(film)
        film_plan, _, folder = open_for_film(film, model)
        references = check_references(film_plan)
        chosen = make_settings(film_plan.geometry, settings)
        if is_picture(film, None):
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


def _length(duration: str | None, num_frames: str | None) -> str | None:
    """Length of shots that give none, from the two options that say it."""
    from arlon.data.aspect import NUM_FRAMES
    from pipelines.storyboard import UsageError

    if num_frames is None:
        return duration
    if duration is not None:
        raise UsageError("give either --duration or --num-frames, not both")
    named = {name: frames for name, frames in NUM_FRAMES.items() if name.endswith("x")}
    if num_frames not in named and not num_frames.isdecimal():
        raise UsageError(f"--num-frames must be a whole number or one of {', '.join(named)}, got '{num_frames}'")
    return f"{named.get(num_frames, num_frames)}f"


def _refuse_for_picture(options: dict[str, bool]) -> None:
    """Refuse options that would do nothing where one frame is made."""
    from pipelines.storyboard import UsageError

    if given := [name for name, is_given in options.items() if is_given]:
        raise UsageError(f"a picture is one frame, made in one process: leave out {', '.join(given)}")


def _print_picture(prepared: PreparedPicture, *, as_json: bool) -> None:
    from pipelines.picture import make_picture

    say(f"seed {prepared.job.plan.storyboard.seed}, model {prepared.record['model']['name']}")
    with only_results_on_stdout():
        result = make_picture(prepared)
    say(f"one frame in {result.elapsed_s:.1f} s")
    typer.echo(json.dumps(result.to_plain(), indent=2) if as_json else str(result.picture))


def _cost(film: Plan, model: Path, settings: Settings) -> FilmCost:
    from arlon.checkpoint import ModelFolder
    from pipelines.film_cost import plan_cost

    return plan_cost(film, ModelFolder.open(model, verify=False), dtype=settings.dtype, settings=settings)


def _print_cost(cost: FilmCost) -> None:
    from pipelines.film_cost import cost_lines

    for line in cost_lines(cost):
        typer.echo(line)


def make_film(
    prepared: Prepared,
    executor: str,
    address: str | None,
    *,
    graph: GraphConfig | None = None,
    begin: Begin | None = None,
    quiet: bool = False,
) -> FilmResult:
    """Make a film and tell how it goes, unless `quiet`; `begin` makes its run folder ready, a new one if it is None.

    On a terminal that is a view that changes, else a line a segment.
    """
    from pipelines.generate import generate as run
    from pipelines.generate import start_run
    from pipelines.runs.lock import RunLockedError
    from pipelines.runs.run_folder import RunFolder, RunFolderError

    film = prepared.plan
    if not quiet:
        _announce(prepared)
    is_live = not quiet and sys.stderr.isatty()
    done = 0

    def on_progress(progress: Progress) -> None:
        nonlocal done
        done = progress.done
        if not quiet and not is_live:
            say(progress_line(progress))

    try:
        with only_results_on_stdout(), _view(prepared) if is_live else nullcontext():
            return run(
                prepared,
                begin=begin or start_run,
                executor=executor,
                address=address,
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
    from pipelines.runs.live import live_view

    return live_view(prepared.paths.run_dir)


def progress_line(progress: Progress) -> str:
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
    from pipelines.sheet import film_sheet, write_sheet

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


def print_timeline(film: Plan, *, is_whole: bool = False) -> None:
    """Print the shots of a film and their sums; of a long one the first and the last, unless `is_whole`."""
    from rich.console import Console
    from rich.table import Table

    from pipelines.plan import timeline_rows

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
