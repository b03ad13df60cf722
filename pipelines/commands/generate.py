"""`arlon generate` and `arlon plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.commands.common import (
    DtypeOption,
    DurationOption,
    Executor,
    FpsOption,
    GuidanceOption,
    HeightOption,
    JoinOption,
    JsonOption,
    ModelOption,
    NegativeOption,
    PromptsOption,
    SeedOption,
    SetOption,
    SolverOption,
    StepsOption,
    StoryboardOption,
    TransitionOption,
    WidthOption,
    count,
    reported,
    say,
)

if TYPE_CHECKING:
    from pipelines.generate import FilmResult, Prepared, Progress
    from pipelines.plan import Plan


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
    transition: JoinOption = TransitionOption.carry,
    fps: FpsOption = None,
    height: HeightOption = None,
    width: WidthOption = None,
    num_inference_steps: StepsOption = None,
    guidance_scale: GuidanceOption = None,
    negative_prompt: NegativeOption = None,
    solver: SolverOption = None,
    executor: Annotated[
        Executor, typer.Option("--executor", help="One process, or Ray actors; the film is the same.")
    ] = Executor.local,
    address: Annotated[str | None, typer.Option("--address", help="Ray cluster to join.")] = None,
    dtype: Annotated[DtypeOption | None, typer.Option("--dtype", help="Precision. [default: float32]")] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, ... [default: cpu]")] = None,
    threads: Annotated[int | None, typer.Option("--threads", help="Processor threads. [default: all cores]")] = None,
    assignments: SetOption = None,
    sheet: Annotated[bool, typer.Option("--sheet", help="Write a contact sheet beside the film.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a film."""
    with reported():
        from pipelines.generate import prepare
        from pipelines.options import FilmOptions, read_film_options
        from pipelines.storyboard import UsageError

        if address and executor is not Executor.ray:
            raise UsageError("--address needs --executor ray")
        options = FilmOptions(
            prompts=prompt or [],
            storyboard=storyboard,
            seed=seed,
            duration=duration,
            transition=transition.value,
            values={
                "fps": fps,
                "height": height,
                "width": width,
                "num_inference_steps": num_inference_steps,
                "guidance_scale": guidance_scale,
                "negative_prompt": negative_prompt,
                "solver": solver,
                "dtype": dtype.value if dtype else None,
                "device": device,
                "num_threads": threads,
            },
            assignments=assignments or [],
        )
        film, settings = read_film_options(options)
        prepared = prepare(film, model=model, output=output, overwrite=overwrite, settings=settings)
        result = _generate(prepared, executor.value, address)
        sheet_path = _write_sheet_beside(result.film) if sheet else None
        _print_film(result, sheet_path, as_json=as_json)


def plan(
    prompt: PromptsOption = None,
    storyboard: StoryboardOption = None,
    model: ModelOption = None,
    seed: SeedOption = None,
    duration: DurationOption = None,
    transition: JoinOption = TransitionOption.carry,
    fps: FpsOption = None,
    height: HeightOption = None,
    width: WidthOption = None,
    num_inference_steps: StepsOption = None,
    guidance_scale: GuidanceOption = None,
    negative_prompt: NegativeOption = None,
    solver: SolverOption = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print the frame-exact timeline of a film without making it."""
    with reported():
        from pipelines.generate import make_settings, open_for_film
        from pipelines.options import FilmOptions, read_film_options

        options = FilmOptions(
            prompts=prompt or [],
            storyboard=storyboard,
            seed=seed,
            duration=duration,
            transition=transition.value,
            values={
                "fps": fps,
                "height": height,
                "width": width,
                "num_inference_steps": num_inference_steps,
                "guidance_scale": guidance_scale,
                "negative_prompt": negative_prompt,
                "solver": solver,
            },
            assignments=assignments or [],
        )
        film, settings = read_film_options(options)
        film_plan, _, _ = open_for_film(film, model)
        make_settings(film_plan.geometry.defaults, settings)
        if as_json:
            typer.echo(json.dumps(film_plan.to_plain(), indent=2, ensure_ascii=False))
        else:
            _print_timeline(film_plan)


def _generate(prepared: Prepared, executor: str, address: str | None) -> FilmResult:
    from pipelines.generate import generate as run

    film = prepared.plan
    say(f"seed {film.storyboard.seed}, model {prepared.record['model']['name']}")
    say(
        f"{count(len(film.shots), 'shot')}, {count(len(film.segments), 'segment')}, {film.num_frames} frames, "
        f"{film.duration_s:.1f} s at {film.fps:g} fps"
    )
    done = 0

    def on_progress(progress: Progress) -> None:
        nonlocal done
        done = progress.done
        say(progress_line(progress))

    try:
        return run(prepared, executor=executor, address=address, on_progress=on_progress)
    except KeyboardInterrupt:
        kept = f"; what there is plays: {prepared.paths.partial}" if done else ""
        say(f"interrupted after {done} of {len(film.segments)} segments{kept}")
        raise


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


def _print_film(result: FilmResult, sheet_path: Path | None, *, as_json: bool) -> None:
    if as_json:
        extra = {} if sheet_path is None else {"sheet": str(sheet_path)}
        typer.echo(json.dumps(result.to_plain() | extra, indent=2, ensure_ascii=False))
        return
    pace = result.duration_s / result.elapsed_s
    say(f"{result.duration_s:.1f} s of film in {result.elapsed_s:.1f} s ({pace:.2f} x real time)")
    typer.echo(str(result.film))
    if sheet_path is not None:
        typer.echo(str(sheet_path))


def _print_timeline(film: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    from pipelines.plan import timeline_rows

    rows = timeline_rows(film)
    table = Table(box=None, pad_edge=False)
    for column in rows[0]:
        is_text = column in ("join", "prompt")
        table.add_column(
            column,
            justify="left" if is_text else "right",
            no_wrap=column != "prompt",
            min_width=16 if column == "prompt" else None,
        )
    for row in rows:
        table.add_row(*row.values())
    console = Console(markup=False, highlight=False)
    console.print(table)
    board = film.storyboard
    console.print(
        f"{film.num_frames} frames, {film.duration_s:.2f} s at {film.fps:g} fps, {board.width} x {board.height} "
        f"pixels, {count(len(film.takes), 'take')}, {count(len(film.segments), 'segment')}, seed {board.seed}"
    )
