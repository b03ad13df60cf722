"""The command line: `arlon generate`, `arlon plan`, `arlon sheet`.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. An error is one readable message on stderr;
`ARLON_DEBUG=1` shows the traceback too. Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipelines.generate import FilmResult, Prepared, Progress
    from pipelines.plan import Plan

FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="arlon",
    help="Long video from text: autoregressive codes plan the film, a diffusion transformer renders it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Executor(str, Enum):  # noqa: UP042 (typer shows the values of a plain str Enum)
    """How a film is computed."""

    local = "local"
    ray = "ray"


class TransitionOption(str, Enum):  # noqa: UP042
    """How shots given by --prompt join."""

    carry = "continue"
    cut = "cut"


class DtypeOption(str, Enum):  # noqa: UP042
    """Precision of the networks."""

    float32 = "float32"
    bfloat16 = "bfloat16"


PromptsOption = Annotated[
    list[str] | None, typer.Option("--prompt", "-p", help="A shot; give it again for the next one.")
]
StoryboardOption = Annotated[
    Path | None,
    typer.Option("--storyboard", help="Storyboard file: .yaml, .json, or .txt with one prompt a line."),
]
ModelOption = Annotated[str | None, typer.Option("--model", help="Name or folder of a model. [default: shapes]")]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Seed of the film; -1 or none: a random one, printed.")]
DurationOption = Annotated[
    str | None, typer.Option("--duration", help='Length of shots that give none: seconds, or "36f" frames.')
]
JoinOption = Annotated[TransitionOption, typer.Option("--transition", help="How shots given by --prompt join.")]
FpsOption = Annotated[float | None, typer.Option("--fps", help="Frames a second.")]
HeightOption = Annotated[int | None, typer.Option("--height", help="Frame height in pixels.")]
WidthOption = Annotated[int | None, typer.Option("--width", help="Frame width in pixels.")]
StepsOption = Annotated[int | None, typer.Option("--num-inference-steps", help="Solver steps a segment.")]
GuidanceOption = Annotated[
    float | None,
    typer.Option("--guidance-scale", help="Text guidance of the diffusion transformer; 1 is off."),
]
NegativeOption = Annotated[str | None, typer.Option("--negative-prompt", help="What to stay away from.")]
SolverOption = Annotated[str | None, typer.Option("--solver", help="Sampler of the diffusion transformer.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any film-level storyboard key or setting, e.g. ar_top_p=0.9."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


def _print_version(value: bool) -> None:
    if value:
        from pipelines.version import version

        typer.echo(f"arlon {version()}")
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
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
    with _reported():
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


@app.command()
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
    with _reported():
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


@app.command()
def sheet(
    film: Annotated[Path, typer.Argument(help="A film, any video, or a run folder.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="PNG. [default: beside the film]")] = None,
    columns: Annotated[int, typer.Option("--columns", help="Frames a shot.")] = 8,
    scale: Annotated[int | None, typer.Option("--scale", min=1, max=64, help="Enlarge frames this many times.")] = None,
) -> None:
    """Write a contact sheet of a film: a row a shot, its prompt above it."""
    with _reported():
        from pipelines.sheet import film_sheet, find_film, write_sheet
        from pipelines.storyboard import UsageError

        target = output or find_film(film).with_suffix(".png")
        if target.suffix.lower() != ".png":
            raise UsageError(f"a contact sheet is written as .png, got '{target}'")
        write_sheet(film_sheet(film, num_columns=columns, scale=scale), target)
        typer.echo(str(target))


def _generate(prepared: Prepared, executor: str, address: str | None) -> FilmResult:
    from pipelines.generate import generate as run

    film = prepared.plan
    _say(f"seed {film.storyboard.seed}, model {prepared.record['model']['name']}")
    _say(
        f"{_count(len(film.shots), 'shot')}, {_count(len(film.segments), 'segment')}, {film.num_frames} frames, "
        f"{film.duration_s:.1f} s at {film.fps:g} fps"
    )
    done = 0

    def on_progress(progress: Progress) -> None:
        nonlocal done
        done = progress.done
        _say(progress_line(progress))

    try:
        return run(prepared, executor=executor, address=address, on_progress=on_progress)
    except KeyboardInterrupt:
        kept = f"; what there is plays: {prepared.paths.partial}" if done else ""
        _say(f"interrupted after {done} of {len(film.segments)} segments{kept}")
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
    _say(f"{result.duration_s:.1f} s of film in {result.elapsed_s:.1f} s ({pace:.2f} x real time)")
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
        f"pixels, {_count(len(film.takes), 'take')}, {_count(len(film.segments), 'segment')}, seed {board.seed}"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _say(text: str) -> None:
    typer.echo(text, err=True)


@contextmanager
def _reported() -> Iterator[None]:
    """Turn errors into one message on stderr and an exit code."""
    from pipelines.storyboard import UsageError

    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt as error:
        _debug()
        raise typer.Exit(INTERRUPTED) from error
    except UsageError as error:
        _fail(str(error), WRONG_USAGE, error)
    except (ValueError, OSError, RuntimeError, ImportError, MemoryError) as error:
        _fail(_message(error), FAILED, error)
    except Exception as error:
        text = f"unexpected {type(error).__name__}: {_message(error)} (ARLON_DEBUG=1 shows where)"
        _fail(text, FAILED, error)


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error).strip() or type(error).__name__


def _fail(text: str, code: int, error: BaseException) -> None:
    _debug()
    _say(f"error: {_printable(text)}")
    raise typer.Exit(code) from error


def _printable(text: str) -> str:
    """Text whose control characters, which would steer a terminal, are written out."""
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)


def _debug() -> None:
    if os.environ.get("ARLON_DEBUG"):
        import traceback

        traceback.print_exc()


def main() -> None:
    """Entry point of the console script."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app()
    except KeyboardInterrupt:
        _say("interrupted")
        sys.exit(INTERRUPTED)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
