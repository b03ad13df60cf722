"""Options that say what film is meant: all those of `arlon plan`, and of `arlon generate` with how it is made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.commands.common import (
    DurationOption,
    HeightOption,
    JoinOption,
    ModelOption,
    PromptsOption,
    StoryboardOption,
    TransitionOption,
    WidthOption,
)

if TYPE_CHECKING:
    from pipelines.commands.options import FilmOptions


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """What is shown, and by which model."""

    prompt: PromptsOption = None
    storyboard: StoryboardOption = None
    model: ModelOption = None
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the film; -1 or none: a random one, printed.")] = (
        None
    )


@dataclass(frozen=True, kw_only=True)
class LookOptions:
    """Length and size of the film, the files it begins and ends with, and how it is sampled."""

    duration: DurationOption = None
    num_frames: Annotated[
        str | None,
        typer.Option("--num-frames", help="The same in frames, or by Open-Sora's name such as 2x; 1 makes a picture."),
    ] = None
    transition: JoinOption = TransitionOption.carry
    fps: Annotated[float | None, typer.Option("--fps", help="Frames a second.")] = None
    height: HeightOption = None
    width: WidthOption = None
    aspect: Annotated[
        str | None,
        typer.Option("--aspect", help="Height:width of the frame such as 9:16, or landscape, portrait, square."),
    ] = None
    resolution: Annotated[str | None, typer.Option("--resolution", help="Frame size by name, such as 240p.")] = None
    image: Annotated[Path | None, typer.Option("--image", help="Picture that the film begins with.")] = None
    end_image: Annotated[Path | None, typer.Option("--end-image", help="Picture that the film ends on.")] = None
    video: Annotated[Path | None, typer.Option("--video", help="Video whose end the film goes on from.")] = None
    base_only: Annotated[
        bool, typer.Option("--base-only", help="The base alone, without codes: any frame size, no plan ahead.")
    ] = False
    num_inference_steps: Annotated[
        int | None, typer.Option("--num-inference-steps", help="Solver steps a segment.")
    ] = None
    guidance_scale: Annotated[
        float | None,
        typer.Option("--guidance-scale", help="Text guidance of the diffusion transformer; 1 is off."),
    ] = None
    negative_prompt: Annotated[str | None, typer.Option("--negative-prompt", help="What to stay away from.")] = None
    solver: Annotated[str | None, typer.Option("--solver", help="Sampler of the diffusion transformer.")] = None


def film_options(
    source: SourceOptions, look: LookOptions, assignments: list[str] | None, **settings: Any
) -> FilmOptions:
    """What the options say together; `settings` are those of one command.

    Raises:
        UsageError: If two of them contradict each other, or --num-frames is no number of frames.
    """
    from pipelines.commands.options import FilmOptions, shot_length

    return FilmOptions(
        prompts=source.prompt or [],
        storyboard=source.storyboard,
        seed=source.seed,
        duration=shot_length(look.duration, look.num_frames),
        transition=look.transition.value,
        values={
            "fps": look.fps,
            "height": look.height,
            "width": look.width,
            "aspect": look.aspect,
            "resolution": look.resolution,
            "use_codes": False if look.base_only else None,
            "num_inference_steps": look.num_inference_steps,
            "guidance_scale": look.guidance_scale,
            "negative_prompt": look.negative_prompt,
            "solver": look.solver,
            **settings,
        },
        assignments=assignments or [],
        image=look.image,
        end_image=look.end_image,
        video=look.video,
    )
