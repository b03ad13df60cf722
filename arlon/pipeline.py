"""`ArlonPipeline`: films from Python, in memory.

    from arlon import ArlonPipeline

    pipe = ArlonPipeline.from_pretrained("shapes")
    film = pipe(["a red circle moves left", "a green circle moves left"], seconds=6, seed=7)
    film.frames                             # (T, H, W, 3) uint8
    film.save("film.mp4")

The same storyboard, seed and settings give the same bits as `arlon generate`. What the command line adds - a run folder
that survives crashes, Ray, batches - is in the package `pipelines`, which builds on the same parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from arlon.checkpoint import ModelFolder
from arlon.data.video_io import VideoWriter
from arlon.errors import UsageError, did_you_mean
from arlon.files import make_folder, temporary_beside
from arlon.film.container import encoder_options, finalise
from arlon.film.encode_media import encode_references
from arlon.film.geometry import ModelGeometry, open_model, read_geometry
from arlon.film.make import KeptWorkers, MadeSegment, make_segments
from arlon.film.media import check_references
from arlon.film.messages import Committed, Job
from arlon.film.plan import Plan
from arlon.film.prepare import DEFAULT_MODEL, make_settings, plan_storyboard
from arlon.film.record import film_record, film_tags
from arlon.film.settings import Settings
from arlon.film.storyboard import (
    Storyboard,
    load_storyboard,
    parse_storyboard,
    storyboard_from_prompts,
    with_overrides,
)
from arlon.film.storyboard_values import Transition, parse_duration
from arlon.film.take_media import take_media
from arlon.film.workers import RefineWorker
from arlon.protocols import Backbone

Script = str | Sequence[str] | Mapping[str, Any] | Path | Storyboard
"""A film to make: one prompt, prompts of shots in order, plain values of a storyboard, a storyboard file, or a
storyboard."""

_SETTINGS = frozenset(field.name for field in fields(Settings))
_FILM_VALUES = frozenset(field.name for field in fields(Storyboard)) - {"shots", "model"}


@dataclass(frozen=True, kw_only=True)
class FilmSegment:
    """One segment of a film: the frames that one pass of the diffusion transformer adds."""

    index: int
    """Number in the film, from 0."""
    shot: int
    """Number of its shot, from 0."""
    take: int
    """Number of its take, from 0; a cut starts a take."""
    prompt: str
    """Prompt of its shot."""
    start_frame: int
    """First frame of the segment in the film. With `vae_blend_frames`, a segment begins with the last few frames of the
    one before it, which both decide."""
    frames: np.ndarray
    """(T, H, W, 3) uint8."""
    latent: Tensor
    """New latent frames, (1, C, T', H', W') float32."""
    codes: Tensor
    """All codes of the take that the segment depends on, up to its own, (1, n, cH, cW) int64; zeros for a base without
    codes."""


@dataclass(frozen=True, kw_only=True)
class Film:
    """A film in memory: frames, latents, codes, and everything it was made from."""

    segments: tuple[FilmSegment, ...]
    """Segments in order."""
    plan: Plan
    """Frames, takes and segments of every shot, and the storyboard with all values that the model has added."""
    settings: Settings
    """Settings that it was made with, such as precision and threads."""
    record: Mapping[str, Any]
    """Everything the film was made from, as plain values; see `arlon.film.record`."""

    @property
    def fps(self) -> float:
        """Frames a second."""
        return self.plan.fps

    @property
    def seed(self) -> int:
        """Seed, also if none was given."""
        return self.plan.storyboard.seed

    @cached_property
    def frames(self) -> np.ndarray:
        """All frames, (T, H, W, 3) uint8."""
        return np.concatenate([segment.frames for segment in self.segments])

    @cached_property
    def latents(self) -> tuple[Tensor, ...]:
        """Latent of every take, (1, C, T', H', W') float32."""
        return tuple(
            torch.cat([segment.latent for segment in self.segments if segment.take == take.index], dim=2)
            for take in self.plan.takes
        )

    @property
    def codes(self) -> tuple[Tensor, ...]:
        """Codes of every take, (1, cT, cH, cW) int64; empty for a base without codes."""
        last = {segment.take: segment.codes for segment in self.segments}
        return tuple(last.values()) if self.plan.geometry.has_codes else ()

    def save(self, path: str | Path, *, metadata: bool = True) -> Path:
        """Write the film as MP4: the same bytes as `arlon generate` writes.

        Args:
            path: File name that ends in `.mp4`; an existing film is replaced once the new one is complete.
            metadata: Store in the film what it was made from, so that it can be made again.

        Returns:
            The path.

        Raises:
            UsageError: If the name does not end in `.mp4`.
            OSError: If the file cannot be written.
        """
        path = Path(path).expanduser()
        if path.suffix.lower() != ".mp4":
            raise UsageError(f"films are written as .mp4, got {str(path)!r}: name it '{path.with_suffix('.mp4')}'")
        make_folder(path.parent)
        tags = film_tags(self.record, self.plan.storyboard.shots[0].prompt) if metadata else {}
        growing = temporary_beside(path.with_suffix(".partial.mp4"))  # `finalise` uses the name beside `path` itself
        try:
            with VideoWriter(growing, **encoder_options(self.plan, self.settings), tags=tags) as writer:
                for segment in self.segments:
                    writer.append(segment.frames)
            finalise(growing, path, num_frames=self.plan.num_frames)
        finally:
            growing.unlink(missing_ok=True)
        return path


class ArlonPipeline:
    """A model that makes films from prompts; networks stay loaded between films.

    Call it with prompts to get a `Film`, `stream` to get segments while the film is made, `plan` to see its timeline:

        pipe = ArlonPipeline.from_pretrained("shapes")
        film = pipe(["a red circle moves left", "a green circle moves left"], seconds=6, seed=7)
        film.save("film.mp4")

    Attributes:
        geometry: Sizes and generation defaults of the model.
    """

    def __init__(self, model: ModelFolder, name: str, settings: Mapping[str, Any]) -> None:
        """Use a checked model folder; `from_pretrained` is the usual way to build a pipeline.

        Args:
            model: The folder.
            name: Name under which films tell of the model.
            settings: Values of `arlon.film.settings.Settings` that hold for every film, by name.

        Raises:
            UsageError: If a setting is unknown or impossible.
        """
        self.geometry: ModelGeometry = read_geometry(model)
        self._identity = {"name": name, "hash": model.model_hash}
        self._model_path = model.path.resolve()
        self._settings = _given_options(settings, _SETTINGS)
        make_settings(self.geometry, self._settings)  # refuse now what no film could be made with
        self._workers = KeptWorkers()

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path = DEFAULT_MODEL, **settings: Any) -> Self:
        """Open a model and check it; weights are loaded when the first film is made.

        Args:
            name_or_path: Name of a packaged model, model folder, model file (.yaml) or hub id.
            **settings: Fields of `arlon.film.settings.Settings` that hold for every film, such as `device="cuda"`,
                `dtype="bfloat16"` or `num_threads=2`.

        Raises:
            UsageError: If there is no such model, or a setting is unknown or impossible.
            CheckpointError: If the model is damaged, or its parts do not fit each other.
        """
        try:
            folder, identity = open_model(str(name_or_path))
        except FileNotFoundError as error:
            raise UsageError(str(error)) from error
        return cls(folder, identity["name"], settings)

    def __call__(
        self,
        script: Script,
        *,
        seconds: float | None = None,
        seed: int | None = None,
        transition: Transition = "continue",
        progress: bool = True,
        **options: Any,
    ) -> Film:
        """Make a film.

        Args:
            script: A prompt, prompts of shots in order, or a storyboard (object, plain values or file).
            seconds: Duration of shots that give none; rounded to whole segments. Default: 5.
            seed: Seed. None: that of the storyboard, or a random one if it has none; `Film.seed` gives it.
            transition: How prompts given as strings follow each other: `continue` carries frames over, `cut` does not.
            progress: Show a progress bar on stderr.
            **options: Film-level values of a storyboard (`fps`, `height`, `width`, `guidance_scale`,
                `num_inference_steps`, `solver`, `negative_prompt`, `use_codes` ...) or settings (`num_threads` ...).

        Returns:
            The film, all of it in memory.

        Raises:
            UsageError: If something asked for is not possible; StoryboardError lists everything wrong with a script.
            CheckpointError: If weights are damaged.
        """
        job, segments = self._start(script, seconds, seed, transition, options)
        record = film_record(job.plan, self._identity, job.settings)
        made: list[FilmSegment] = []
        # A segment may take minutes at full size, so the bar moves by segments.
        with _progress_bar(job.plan) if progress else nullcontext(lambda: None) as advance:
            for segment in segments:
                made.append(segment)
                advance()
        return Film(segments=tuple(made), plan=job.plan, settings=job.settings, record=record)

    def stream(
        self,
        script: Script,
        *,
        seconds: float | None = None,
        seed: int | None = None,
        transition: Transition = "continue",
        **options: Any,
    ) -> Iterator[FilmSegment]:
        """Make a film and hand over each segment when it is ready; arguments and errors are those of a call.

        Input is checked before this returns; segments are made while the iterator is read.
        """
        return self._start(script, seconds, seed, transition, options)[1]

    @property
    def backbone(self) -> Backbone:
        """Backbone with its weights, for kernels to be chosen and hooks to be set; the next films use it as it is.

        A film whose call changes a setting, such as the number of threads, loads its networks again.
        """
        job = self._job("any", None, 0, "continue", {})  # the networks do not depend on the film
        worker: RefineWorker = self._workers(RefineWorker, job)
        return worker.backbone

    def plan(self, script: Script, *, seconds: float | None = None, seed: int | None = None, **options: Any) -> Plan:
        """Lay a film out frame by frame without making it; arguments and errors are those of a call."""
        return self._job(script, seconds, seed, "continue", options).plan

    def _start(
        self,
        script: Script,
        seconds: float | None,
        seed: int | None,
        transition: Transition,
        options: Mapping[str, Any],
    ) -> tuple[Job, Iterator[FilmSegment]]:
        job = self._job(script, seconds, seed, transition, options)
        references = check_references(job.plan)

        def segments() -> Iterator[FilmSegment]:
            media = take_media(job.plan, encode_references(job, references))
            for made in make_segments(job, Committed(media=media), worker=self._workers):
                yield _film_segment(job.plan, made)

        return job, segments()

    def _job(
        self,
        script: Script,
        seconds: float | None,
        seed: int | None,
        transition: Transition,
        options: Mapping[str, Any],
    ) -> Job:
        film_options = _given_options(options, _SETTINGS | _FILM_VALUES)
        film = _read_script(script, seconds, transition)
        values = {name: value for name, value in film_options.items() if name in _FILM_VALUES}
        film = with_overrides(film, values if seed is None else values | {"seed": seed})
        plan = plan_storyboard(replace(film, model=self._identity["name"]), self.geometry)
        own = {name: value for name, value in film_options.items() if name in _SETTINGS}
        settings = make_settings(plan.geometry, {**self._settings, **own})
        return Job(plan=plan, settings=settings, model_path=str(self._model_path), model_hash=self._identity["hash"])


def _read_script(script: Script, seconds: float | None, transition: Transition) -> Storyboard:
    """Storyboard of whatever describes a film."""
    try:
        duration = None if seconds is None else parse_duration(seconds)
    except ValueError as error:
        raise UsageError(f"seconds: {error}") from error
    if isinstance(script, Storyboard):
        return script
    if isinstance(script, Path):
        return load_storyboard(script, default_duration=duration)
    if isinstance(script, Mapping):
        return parse_storyboard(script, default_duration=duration)
    prompts = [script] if isinstance(script, str) else list(script)
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise UsageError(f"a film needs at least one prompt, each a string, got {script!r}")
    return storyboard_from_prompts(prompts, duration=duration, transition=transition)


def _given_options(options: Mapping[str, Any], known: frozenset[str]) -> Mapping[str, Any]:
    """Options that are given; unknown names are refused."""
    for name in options:
        if name not in known:
            raise UsageError(f"unknown option {name!r}, {did_you_mean(name, sorted(known))}")
    return {name: value for name, value in options.items() if value is not None}


@contextmanager
def _progress_bar(plan: Plan) -> Iterator[Callable[[], None]]:
    """Progress bar on stderr; the function it gives moves it on by a segment."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("segment"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("film", total=len(plan.segments))
        yield lambda: bar.advance(task)


def _film_segment(plan: Plan, made: MadeSegment) -> FilmSegment:
    segment, decode = made.request.segment, made.request.decode
    return FilmSegment(
        index=segment.index,
        shot=segment.shot,
        take=segment.take,
        prompt=plan.storyboard.shots[segment.shot].prompt,
        start_frame=segment.start_frame - decode.lead,
        frames=made.decoded.frames,
        latent=made.refined.latent,
        codes=made.codes.codes,
    )
