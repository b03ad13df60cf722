"""Options that several commands share, in groups, and what they say together.

A group is a dataclass whose fields are options: `arlon generate` and `arlon plan` have the same `FilmOptions` and
`SettingOptions`. A field that bears the name of a storyboard key or of a setting sets it, so a new option is one field.
Which values a key may hold is decided in one place each, `arlon.film.storyboard_values` and `arlon.film.settings`.

Modules that need PyTorch or YAML are imported inside the methods, so that `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from arlon.errors import StoryboardError, UsageError, did_you_mean

if TYPE_CHECKING:
    from arlon.film.storyboard import Storyboard
    from arlon.film.storyboard_values import Duration
    from pipelines.executors.ray_graph import GraphConfig


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


RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or the film beside it.")]
RunModelOption = Annotated[
    str | None, typer.Option("--model", help="Name or folder of the run's model, if it has moved.")
]
ModelOption = Annotated[str | None, typer.Option("--model", help="Name or folder of a model. [default: shapes]")]
HeightOption = Annotated[int | None, typer.Option("--height", help="Frame height in pixels.")]
WidthOption = Annotated[int | None, typer.Option("--width", help="Frame width in pixels.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any film-level storyboard key or setting, e.g. ar_top_p=0.9."),
]
AddressOption = Annotated[str | None, typer.Option("--address", help="Ray cluster to join.")]
HlsOption = Annotated[bool, typer.Option("--hls", help="Make an HLS stream beside a film, to watch it while it grows.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the result, no progress.")]


@dataclass(frozen=True, kw_only=True)
class ShotOptions:
    """The shots of a film, or those that are added to one."""

    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="A shot; give it again for the next one.")
    ] = None
    storyboard: Annotated[
        Path | None,
        typer.Option("--storyboard", help="Storyboard file: .yaml, .json, or .txt with one prompt a line."),
    ] = None
    duration: Annotated[
        str | None, typer.Option("--duration", help='Length of shots that give none: seconds, or "36f" frames.')
    ] = None
    transition: Annotated[TransitionOption, typer.Option("--transition", help="How shots given by --prompt join.")] = (
        TransitionOption.carry
    )

    def read_shots(self) -> Storyboard:
        """Read the storyboard that the options describe, without film-level options.

        Raises:
            UsageError: If there are no shots, two sources of shots, or the storyboard is wrong.
        """
        from arlon.film.storyboard import load_storyboard, storyboard_from_prompts

        if self.storyboard and self.prompt:
            raise UsageError("give either --storyboard or --prompt, not both")
        if not self.storyboard and not self.prompt:
            raise UsageError("no prompt: give --prompt 'a red circle moves left', or --storyboard film.yaml")
        duration = self.read_duration()
        if self.storyboard:
            return load_storyboard(self.storyboard, default_duration=duration)
        return storyboard_from_prompts(self.prompt or [], duration=duration, transition=self.transition.value)

    def read_duration(self) -> Duration | None:
        """Read the length of shots that give none.

        Raises:
            StoryboardError: If it is not a length.
        """
        from arlon.film.storyboard_values import parse_duration

        try:
            return None if self.duration is None else parse_duration(self.duration)
        except ValueError as error:
            raise StoryboardError([f"--duration {error}"], "options") from error


@dataclass(frozen=True, kw_only=True)
class FilmOptions(ShotOptions):
    """What a film shows, how long and large it is, and how it is sampled."""

    num_frames: Annotated[
        str | None,
        typer.Option(
            "--num-frames", help="Like --duration, in frames, or by Open-Sora's name such as 2x; 1 makes a picture."
        ),
    ] = None
    model: ModelOption = None
    seed: Annotated[
        int | None, typer.Option("--seed", help="Seed of the film; -1 or none takes a random one, which is printed.")
    ] = None
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
    video: Annotated[Path | None, typer.Option("--video", help="Video that the film continues.")] = None
    base_only: Annotated[
        bool, typer.Option("--base-only", help="The base model alone, without codes: any frame size, no plan ahead.")
    ] = False
    num_inference_steps: Annotated[
        int | None, typer.Option("--num-inference-steps", help="Solver steps for each segment.")
    ] = None
    guidance_scale: Annotated[
        float | None,
        typer.Option("--guidance-scale", help="Text guidance of the diffusion transformer; 1 is off."),
    ] = None
    negative_prompt: Annotated[str | None, typer.Option("--negative-prompt", help="What to stay away from.")] = None
    solver: Annotated[str | None, typer.Option("--solver", help="Solver of the diffusion transformer.")] = None

    def read_duration(self) -> Duration | None:
        """Read the length of shots that give none, from the two options that may say it.

        Raises:
            UsageError: If both do, or one is not a length.
        """
        from arlon.data.aspect import NUM_FRAMES
        from arlon.film.storyboard_values import parse_duration

        if self.num_frames is None:
            return super().read_duration()
        if self.duration is not None:
            raise UsageError("give either --duration or --num-frames, not both")
        named = {name: frames for name, frames in NUM_FRAMES.items() if name.endswith("x")}
        if self.num_frames not in named and not self.num_frames.isdecimal():
            known = ", ".join(named)
            raise UsageError(f"--num-frames must be a whole number or one of {known}, got '{self.num_frames}'")
        try:
            return parse_duration(f"{named.get(self.num_frames, self.num_frames)}f")
        except ValueError as error:
            raise UsageError(f"--num-frames {error}") from error

    def film_values(self) -> dict[str, Any]:
        """Film-level values of a storyboard that the options set, by key."""
        from arlon.film.storyboard_values import FILM_READERS

        # The model is chosen before the storyboard is planned; it is no value to plan with.
        names = (field.name for field in fields(self) if field.name in FILM_READERS and field.name != "model")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return given | ({"use_codes": False} if self.base_only else {})

    def media(self, num_shots: int) -> list[tuple[int, dict[str, str]]]:
        """Files that the first and the last shot are given, as pairs of index and values of the shot."""
        given = {"image": self.image, "video": self.video}, {"end_image": self.end_image}
        return [
            (shot, {kind: str(path) for kind, path in files.items() if path is not None})
            for shot, files in zip((0, num_shots - 1), given, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class SettingOptions:
    """How a film is computed."""

    dtype: Annotated[DtypeOption | None, typer.Option("--dtype", help="Precision. [default: float32]")] = None
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, ... [default: cpu]")] = None
    num_threads: Annotated[int | None, typer.Option("--threads", help="Processor threads. [default: all cores]")] = None
    assignments: SetOption = None

    def read(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read the settings, and what --set says of the film: pairs (film-level values, settings).

        Raises:
            UsageError: If --set has an unknown key or no value.
        """
        own = {
            "dtype": None if self.dtype is None else self.dtype.value,
            "device": self.device,
            "num_threads": self.num_threads,
        }
        film, settings = read_assignments(self.assignments or ())
        return film, {name: value for name, value in own.items() if value is not None} | settings


def read_film(film: FilmOptions, how: SettingOptions) -> tuple[Storyboard, dict[str, Any]]:
    """Read everything that the options say about a film: its storyboard, and values of `Settings`.

    Of two options that set the same value, --set counts.

    Raises:
        UsageError: If the options contradict each other or hold a wrong value.
    """
    from arlon.film.storyboard import with_overrides, with_shot

    assigned, settings = how.read()
    storyboard = with_overrides(film.read_shots(), film.film_values() | assigned)
    for shot, files in film.media(len(storyboard.shots)):
        storyboard = with_shot(storyboard, shot, files)
    return storyboard, settings


def read_assignments(assignments: Iterable[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the `key=value` of --set: pairs (film-level values, settings).

    Raises:
        UsageError: If a key is unknown or has no value.
    """
    from arlon.film.settings import Settings
    from arlon.film.storyboard_values import FILM_READERS
    from arlon.film.strict_yaml import parse_yaml, shown

    film_keys = FILM_READERS.keys() - {"model"}
    keys = film_keys | {field.name for field in fields(Settings)}
    given: dict[str, Any] = {}
    for text in assignments:
        key, sign, value = text.partition("=")
        key = key.strip()
        if not sign or not key:
            raise UsageError(f"--set needs KEY=VALUE, got {shown(text)}")
        if key not in keys:
            raise UsageError(f"--set {key}: unknown key; {did_you_mean(key, sorted(keys))}")
        try:
            given[key] = parse_yaml(value)
        except ValueError as error:
            raise UsageError(f"--set {key}: cannot read the value {shown(value)}") from error
        if given[key] is None:
            raise UsageError(f"--set {key}: no value given; leave it out to take the model's own")
    film = {key: value for key, value in given.items() if key in film_keys}
    return film, {key: value for key, value in given.items() if key not in film_keys}


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """Where a film is computed."""

    executor: Annotated[
        Executor, typer.Option("--executor", help="One process, or Ray actors; the film is the same.")
    ] = Executor.local
    address: AddressOption = None
    graph: Annotated[
        Path | None,
        typer.Option("--graph", metavar="FILE.yaml", help="Ray actors of each role; docs/cluster.md."),
    ] = None

    def check(self) -> None:
        """Refuse options that would not be used.

        Raises:
            UsageError: If there are any.
        """

        for name, value in (("--address", self.address), ("--graph", self.graph)):
            if value and self.executor is not Executor.ray:
                raise UsageError(f"{name} needs --executor ray")

    def read_graph(self) -> GraphConfig | None:
        """Read the file of --graph: the actors of each role.

        Raises:
            UsageError: If it cannot be read, or is wrong.
        """
        if self.graph is None:
            return None
        from arlon.config import load_config
        from pipelines.executors.ray_graph import GraphConfig

        try:
            return load_config(GraphConfig, [self.graph])
        except (ValueError, FileNotFoundError) as error:
            raise UsageError(str(error)) from error


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take groups of options: typer sees each field of a dataclass as an option of its own."""
    parameters = list(signature(command, eval_str=True).parameters.values())
    groups: dict[str, Any] = {given.name: given.annotation for given in parameters if is_dataclass(given.annotation)}

    @wraps(command)
    def flat(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    options: list[Parameter] = []
    for given in parameters:
        group = groups.get(given.name)
        options += [given] if group is None else signature(group, eval_str=True).parameters.values()
    flat.__signature__ = Signature(options)  # type: ignore[attr-defined]
    return flat
