"""What the steps of making a film are asked, and what they answer.

A request says what to do in plain values; its last fields, None at first, take the results of earlier steps. So every
request of a film is known before anything is computed (`film_requests`), and an executor only has to `fill` them: with
results (`local`), or with references to results (`graph`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from arlon.data.pictures import IMAGE_FPS
from arlon.files import hash_tensor
from arlon.film.appearance import Drift
from arlon.film.plan import Plan, Segment, Take
from arlon.film.settings import Settings
from arlon.film.storyboard import Storyboard
from arlon.models.code_sampling import blend_weight
from arlon.text.encoders import TextFeatures
from arlon.text.prompts import add_scores

R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything the workers of one film need to start."""

    plan: Plan
    settings: Settings
    model_path: str
    model_hash: str
    run_dir: str
    partial_path: str
    """The growing film."""
    hls_path: str = ""
    """Folder of the film as a stream; empty: there is none."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """What the film says about itself; nothing if empty."""

    def component(self, name: str) -> Path:
        """Folder of a component of the model."""
        return Path(self.model_path) / name


@dataclass(frozen=True, kw_only=True)
class Committed:
    """What of a film is on disk already and is not made again."""

    codes: Mapping[int, Tensor] = field(default_factory=dict)
    """First code frames (1, n, cH, cW) int64, by take; all of a take, or some."""
    segments: frozenset[int] = frozenset()
    """Indices of the committed segments; their codes are among `codes`."""


@dataclass(frozen=True, kw_only=True)
class TextRequest:
    """Prompts to encode; each once."""

    prompts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TextResult:
    """Features of prompts, on the CPU."""

    features: dict[str, TextFeatures]


class Schedule(tuple[tuple[str, int, int, int], ...]):
    """For every prompt of a take, in order: the prompt, its seed, code frames it is blended over, its code frames."""

    def prompts(self, start: int, stop: int) -> tuple[str, ...]:
        """Prompts that code frames [start, stop) are written under, each once."""
        if start >= stop:
            return ()
        prompts: dict[str, None] = {}
        for place in range(self.span_at(start), self.span_at(stop - 1) + 1):
            first = self._ends[place - 1] if place else 0
            if place and max(start, first) < first + self[place][2]:
                prompts[self[place - 1][0]] = None
            prompts[self[place][0]] = None
        return tuple(prompts)

    def span_at(self, frame: int) -> int:
        """Index of the prompt in force at a code frame."""
        if not 0 <= frame < self._ends[-1]:
            raise ValueError(f"the take has {self._ends[-1]} code frames, there is no frame {frame}")
        return bisect_right(self._ends, frame)

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(count for *_, count in self))


@dataclass(frozen=True, kw_only=True)
class CodeRequest:
    """Write the codes of a take up to `stop`."""

    take: int
    schedule: Schedule
    start: int
    """Code frames of the take that the segment before needed, 0 if it is the first."""
    stop: int
    """Code frames of the take there must be afterwards."""
    text: TextResult | None = None
    before: CodeResult | None = None
    """Codes written so far, `start` frames or more; None at the start of a take."""
    given: Tensor | None = None
    """Code frames (1, n, cH, cW) int64 that the take begins with, where it was given any."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """Prompts whose features `text` must hold: those in force from `start` to `stop`."""
        return self.schedule.prompts(self.start, self.stop)

    def seed_of(self, frame: int) -> int:
        """Seed of a code frame."""
        return self.schedule[self.schedule.span_at(frame)][1]


@dataclass(frozen=True, kw_only=True)
class CodeResult:
    """The first code frames of a take."""

    codes: Tensor
    """(1, n, cH, cW) int64."""
    elapsed_s: float
    memory_bytes: int = 0
    """Memory of the process afterwards; 0: not measured."""
    ended_s: float = 0.0
    """Clock time at the end of the step, seconds since 1970; 0: not measured."""


@dataclass(frozen=True, kw_only=True)
class Blend:
    """How the prompt before passes into that of a segment."""

    prompt: str
    """The prompt before."""
    weights: tuple[float, ...]
    """Share of the new prompt in each latent frame of the segment, those carried over included."""


@dataclass(frozen=True, kw_only=True)
class RefineRequest:
    """Make the latent of one segment."""

    segment: Segment
    take: Take
    prompt: str
    negative_prompt: str
    """Empty: guidance moves away from the null caption."""
    seed: int
    guidance_scale: float
    num_inference_steps: int
    solver: str
    fps: float
    height: int
    """Of a frame as it is computed, pixels."""
    width: int
    blend: Blend | None = None
    """None: the segment has one prompt."""
    head: Tensor | None = None
    """Latent frames (1, C, n, H, W) that a take begins with; None where it begins with none."""
    tail: Tensor | None = None
    """Latent frames (1, C, n, H, W) that the segment ends on."""
    placed: tuple[Tensor, Tensor] | None = None
    """Latent (1, C, T, H, W) of what a mask strategy places in the segment, and its edit ratio (1, T)."""
    text: TextResult | None = None
    codes: CodeResult | None = None
    before: RefineResult | None = None
    """The segment before in the take; None in its first."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """Prompts whose features `text` must hold."""
        old = () if self.blend is None else (self.blend.prompt,)
        negative = (self.negative_prompt,) if self.negative_prompt else ()
        return (self.prompt, *old, *negative)


@dataclass(frozen=True, kw_only=True)
class RefineResult:
    """The new latent frames of a segment."""

    latent: Tensor
    """(1, C, n, H, W) float32, on the CPU."""
    overlap_hash: str | None
    """SHA-256 of the latent frames carried over; None where there were none."""
    codes_hash: str
    """SHA-256 of the codes used."""
    elapsed_s: float
    memory_bytes: int = 0
    ended_s: float = 0.0


def carried_on(latent: Tensor) -> RefineResult:
    """The stored latent of a segment, as the segment after it needs it."""
    return RefineResult(latent=latent, overlap_hash=None, codes_hash="", elapsed_s=0.0)


@dataclass(frozen=True, kw_only=True)
class DecodeRequest:
    """Turn the new latent frames of a segment into video frames."""

    num_frames: int
    """Frames that the new latent frames hold."""
    lead: int = 0
    """Frames before them that the segment before left out, so that both sides of the border can be blended."""
    held: int = 0
    """Last frames that are left to the segment after."""
    size: tuple[int, int] | None = None
    """Height and width of the frames, which are cut out of the centre; None: as they are decoded."""
    refined: RefineResult | None = None
    before: RefineResult | None = None
    """The segment before in the take; needed for a lead."""


@dataclass(frozen=True, kw_only=True)
class DecodeResult:
    """Video frames."""

    frames: np.ndarray
    """(pT, pH, pW, 3) uint8."""
    elapsed_s: float
    memory_bytes: int = 0
    ended_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class WriteRequest:
    """Store a segment and add it to the film."""

    segment: Segment
    inputs: dict[str, Any]
    """What the segment was made from, in plain values; hashes are added."""
    codes: CodeResult | None = None
    refined: RefineResult | None = None
    decoded: DecodeResult | None = None


@dataclass(frozen=True, kw_only=True)
class WriteResult:
    """A segment is stored."""

    segment: Segment
    fragment_hash: str
    """SHA-256 of the encoded frames."""
    latent_hash: str
    """SHA-256 of the file with its latents."""
    elapsed_s: dict[str, float]
    """Seconds of every step: code, refine, decode, write."""
    drift: Drift
    """From the first segment of the same shot."""


@dataclass(frozen=True, kw_only=True)
class SegmentRequests:
    """The requests of one segment, not yet filled with results."""

    segment: Segment
    code: CodeRequest
    refine: RefineRequest
    decode: DecodeRequest
    write: WriteRequest
    is_take_start: bool


def text_request(plan: Plan) -> TextRequest:
    """All prompts of a film, each once, in order of appearance."""
    film = plan.storyboard
    prompts = dict.fromkeys(spoken_prompt(film, index) for index in range(len(film.shots)))
    if film.negative_prompt:
        prompts[film.negative_prompt] = None
    return TextRequest(prompts=tuple(prompts))


def prompts_to_encode(job: Job, committed: Committed) -> Iterator[str]:
    """Prompts of what of a film is not on disk yet, as they come; many come again."""
    for request in film_requests(job):
        if request.segment.index not in committed.segments:
            codes = committed.codes.get(request.code.take)
            if codes is None or codes.shape[1] < request.code.stop:
                yield from request.code.prompts
            yield from request.refine.prompts


def film_requests(job: Job) -> Iterator[SegmentRequests]:
    """Requests of all segments of a film, in order, one at a time: a long film has many."""
    from arlon.film.media import NOTHING, read_given

    plan, given, fit = job.plan, read_given(job), job.plan.frame_fit
    before: Segment | None = None
    for segment, after in zip_longest(plan.segments, plan.segments[1:]):
        is_take_start = before is None or before.take != segment.take
        if is_take_start:
            take = plan.takes[segment.take]
            schedule = code_schedule(plan, take)
            begins_with = given.get(segment.shot, NOTHING)
        ends_shot = after is None or after.shot != segment.shot
        is_take_end = after is None or after.take != segment.take
        refine = _refine_request(plan, segment, take)
        refine = replace(
            refine,
            head=begins_with.head if is_take_start else None,
            tail=given.get(segment.shot, NOTHING).tail if ends_shot else None,
            placed=begins_with.placed(segment, plan.geometry.grid),
        )
        blended = job.settings.vae_blend_frames if plan.geometry.grid.overlap else 0
        decode = DecodeRequest(
            num_frames=segment.num_frames,
            lead=0 if is_take_start else blended,
            held=0 if is_take_end else blended,
            size=None if fit.is_exact else (fit.height, fit.width),
        )
        yield SegmentRequests(
            segment=segment,
            code=CodeRequest(
                take=take.index,
                schedule=schedule,
                start=0 if is_take_start else before.num_code_frames,
                stop=segment.num_code_frames,
                given=begins_with.codes,
            ),
            refine=refine,
            decode=decode,
            write=WriteRequest(segment=segment, inputs=_inputs(job, refine, decode)),
            is_take_start=is_take_start,
        )
        before = segment


def code_schedule(plan: Plan, take: Take) -> Schedule:
    """Prompt, seed, blend and code frames of every shot of a take that owns any."""
    film = plan.storyboard
    return Schedule(
        (spoken_prompt(film, shot), _seed_of(plan, shot), (film.shots[shot].blend or 0) if place else 0, count)
        for place, (shot, count) in enumerate(take.spans)
    )


def segment_blend(plan: Plan, segment: Segment, take: Take) -> Blend | None:
    """How the prompt before passes into that of a segment, None if it has passed, or at once.

    The weights are those of the code frames that cover the latent frames; a latent frame of the shot in a code frame
    of the shot before has that of the first.
    """
    blend = plan.storyboard.shots[segment.shot].blend
    place, switch = plan.places.get(segment.shot, (0, 0))
    if not place or not blend:
        return None
    ratio = plan.geometry.code_ratio[0]
    latents = range(segment.start_latent, segment.start_latent + segment.num_latents)
    weights = tuple(blend_weight(max(0, latent // ratio - switch), blend) for latent in latents)
    if min(weights[segment.overlap :]) == 1:
        return None
    return Blend(prompt=spoken_prompt(plan.storyboard, take.spans[place - 1][0]), weights=weights)


def spoken_prompt(film: Storyboard, shot: int) -> str:
    """What the text encoder is told of a shot: its prompt, and the scores and camera motion that are asked for."""
    of_shot = film.shots[shot]
    return add_scores(
        of_shot.prompt,
        aesthetic=film.aesthetic_score or None,
        motion=film.motion_score or None,
        camera=of_shot.camera_motion or film.camera_motion,
    )


def _seed_of(plan: Plan, shot: int) -> int:
    own, film = plan.storyboard.shots[shot].seed, plan.storyboard.seed
    assert film is not None
    return film if own is None else own


def _refine_request(plan: Plan, segment: Segment, take: Take) -> RefineRequest:
    film = plan.storyboard
    shot = film.shots[segment.shot]
    resolved = (film.guidance_scale, film.num_inference_steps, film.solver, film.fps, film.height, film.width)
    if None in resolved:
        raise ValueError("the storyboard of a plan must be resolved: call plan.resolve_storyboard first")
    scale, num_steps, solver, fps, *_ = resolved
    fit = plan.frame_fit
    return RefineRequest(
        segment=segment,
        take=take,
        prompt=spoken_prompt(film, segment.shot),
        negative_prompt=film.negative_prompt,
        seed=_seed_of(plan, segment.shot),
        guidance_scale=scale if shot.guidance_scale is None else shot.guidance_scale,
        num_inference_steps=num_steps,
        solver=solver,
        fps=IMAGE_FPS if segment.num_frames == 1 else fps,
        height=fit.made_height,
        width=fit.made_width,
        blend=segment_blend(plan, segment, take),
    )


def _inputs(job: Job, refine: RefineRequest, decode: DecodeRequest) -> dict[str, Any]:
    """The plain part of what a segment is made from."""
    names = (
        "prompt",
        "negative_prompt",
        "seed",
        "guidance_scale",
        "num_inference_steps",
        "solver",
        "fps",
        "height",
        "width",
    )
    segment, settings = refine.segment, job.settings
    given = {"head": refine.head, "tail": refine.tail}
    of_segment = ("take", "index_in_take", "start_latent", "num_latents", "num_frames")
    blend, fit = refine.blend, job.plan.frame_fit
    return {
        **({} if blend is None else {"blend": {"prompt": blend.prompt, "weights": list(blend.weights)}}),
        **settings.newer(),
        **({} if fit.is_exact else {"cut_to": [fit.height, fit.width]}),
        **{name: count for name in ("lead", "held") if (count := getattr(decode, name))},
        "model": job.model_hash,
        **{name: getattr(segment, name) for name in of_segment},
        **{name: getattr(refine, name) for name in names},
        **{name: getattr(settings, name) for name in ("dtype", "num_threads", "device", "crf", "preset")},
        **{name: hash_tensor(latent) for name, latent in given.items() if latent is not None},
        **({} if refine.placed is None else {"placed": [hash_tensor(part) for part in refine.placed]}),
    }


def fill(request: R, **results: Any) -> R:
    """A request with the results it waited for."""
    return replace(request, **results)
