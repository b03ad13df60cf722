"""The frame-exact plan of a film: its takes and segments, and which shot owns which code frame.

A film is a row of takes; a `cut` starts one. A take is divided into segments on the latent grid
(`arlon.grids.SegmentGrid`). A shot owns whole segments, so its length is rounded to theirs, and the plan says by how
much. The codes of a take are one stream: code frame c covers latent frames [c r, (c + 1) r), where r is the time ratio
of the VQ-VAE, and belongs to the shot that owns the first of these latent frames.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

from arlon.data import aspect as aspects
from arlon.film.geometry import GenerationDefaults, ModelGeometry
from arlon.film.storyboard import ResolvedStoryboard, Shot, Storyboard, StoryboardError
from arlon.grids import SegmentGrid, ceil_div, code_grid, num_latent_frames

MAX_SEGMENTS = 20_000
"""Most segments of a film: about 23 hours with the small model, 12 hours at full size."""


@dataclass(frozen=True, kw_only=True)
class ShotSpan:
    """Place of a shot on the time line of the film."""

    shot: int
    """Index in the storyboard."""
    take: int
    start_frame: int
    num_frames: int
    asked_frames: int
    """Frames that the storyboard asked for; `num_frames` are those of whole segments."""
    num_segments: int
    num_code_frames: int


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Frames made by one pass of the diffusion transformer."""

    index: int
    """Number in the film, from 0."""
    take: int
    shot: int
    index_in_take: int
    start_latent: int
    """First latent frame in the take, those carried over included."""
    num_latents: int
    overlap: int
    """Latent frames carried over from the segment before; 0 in the first segment of a take."""
    start_frame: int
    """First new frame in the film."""
    num_frames: int
    """New frames, without those of the latent frames carried over."""
    start_code_frame: int
    """First code frame of the take that this segment depends on."""
    num_code_frames: int
    """Code frames of the take, from its start, that must be written before this segment can be refined."""
    ends_take: bool
    """Whether no segment of the same take follows."""
    ends_shot: bool
    """Whether no segment of the same shot follows."""

    @property
    def starts_take(self) -> bool:
        """Whether this is the first segment of its take."""
        return self.index_in_take == 0

    def to_plain(self) -> dict[str, int]:
        """Plain values for JSON: those that are set, without `ends_take` and `ends_shot`, which follow from a plan."""
        return {name: value for name, value in asdict(self).items() if name not in ("ends_take", "ends_shot")}


@dataclass(frozen=True, kw_only=True)
class Take:
    """A stretch without a cut."""

    index: int
    num_latents: int
    num_code_frames: int
    spans: tuple[tuple[int, int], ...]
    """Pairs (shot, number of its code frames), in order; the numbers add up to `num_code_frames`."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that is known about a film before anything is computed."""

    storyboard: ResolvedStoryboard
    """Its `height` and `width` are those of the film. Frames are computed at the size of `frame_fit`, the next larger
    one that the model makes, and cropped to their centre."""
    geometry: ModelGeometry
    shots: tuple[ShotSpan, ...]
    takes: tuple[Take, ...]
    segments: tuple[Segment, ...]

    @property
    def num_frames(self) -> int:
        """Frames of the film."""
        return sum(shot.num_frames for shot in self.shots)

    @property
    def duration_s(self) -> float:
        """Seconds of the film."""
        return self.num_frames / self.fps

    @property
    def fps(self) -> float:
        """Frames a second."""
        return self.storyboard.fps

    @cached_property
    def places(self) -> dict[int, tuple[int, int]]:
        """Index among the spans of its take, and first code frame, of every shot that owns code frames."""
        return {
            shot: (place, stop - count)
            for take in self.takes
            for (place, (shot, count)), stop in zip(
                enumerate(take.spans), accumulate(count for _, count in take.spans), strict=True
            )
        }

    @property
    def frame_fit(self) -> aspects.FrameCrop:
        """Size of a frame of the film, and the size at which it is computed."""
        return _frame_fit(self.storyboard, self.geometry)

    def to_plain(self) -> dict[str, Any]:
        """Plain values for JSON."""
        film, fit = self.storyboard, self.frame_fit
        return {
            "num_frames": self.num_frames,
            "duration_s": self.duration_s,
            "fps": self.fps,
            "height": film.height,
            "width": film.width,
            **({} if fit.is_exact else {"computed_at": [fit.made_height, fit.made_width]}),
            "seed": film.seed,
            "shots": [
                asdict(span) | {"prompt": film.shots[span.shot].prompt, "transition": film.shots[span.shot].transition}
                for span in self.shots
            ],
            "takes": [asdict(take) for take in self.takes],
            "segments": [segment.to_plain() for segment in self.segments],
        }


def resolve_storyboard(storyboard: Storyboard, defaults: GenerationDefaults, seed: int) -> ResolvedStoryboard:
    """Fill in what a storyboard leaves open: with the values of the model, and `seed` if it names none."""
    names = ("fps", "height", "width", "guidance_scale", "num_inference_steps", "solver", "aesthetic_score")
    filled = {name: getattr(defaults, name) for name in names if getattr(storyboard, name) is None}
    return ResolvedStoryboard.of(storyboard, seed=seed if storyboard.seed is None else storyboard.seed, **filled)


def with_frame_size(storyboard: Storyboard, geometry: ModelGeometry) -> Storyboard:
    """Turn the aspect and resolution of a storyboard into a frame size in pixels.

    A resolution names an exact size; an odd side loses one row or column, since H.264 needs even sides. An aspect alone
    gives a size that the model makes, with about as many pixels as the model's own.

    Raises:
        StoryboardError: If a storyboard has both a name and another size, or the resolution has no such aspect.
    """
    if storyboard.aspect is None and storyboard.resolution is None:
        return storyboard
    multiple, defaults = geometry.size_multiple, geometry.defaults
    try:
        if storyboard.resolution is not None:
            size = aspects.frame_size(storyboard.resolution, storyboard.aspect or "square")
            height, width = (side // 2 * 2 for side in size)
        else:
            ratio, area = aspects.aspect_ratio(storyboard.aspect or "square"), defaults.height * defaults.width
            wanted = (math.sqrt(area * ratio), math.sqrt(area / ratio))
            height, width = (max(multiple, round(side / multiple) * multiple) for side in wanted)
    except ValueError as error:
        raise StoryboardError([str(error)]) from error
    if (storyboard.height, storyboard.width) not in ((None, None), (height, width)):
        raise StoryboardError(["give either height and width, or aspect and resolution"])
    return replace(storyboard, height=height, width=width, aspect=None, resolution=None)


def make_plan(storyboard: ResolvedStoryboard, geometry: ModelGeometry) -> Plan:
    """Lay a resolved storyboard out on the grids of a model.

    Args:
        storyboard: The film, from `resolve_storyboard`.
        geometry: Sizes of the model.

    Raises:
        StoryboardError: If the frame size does not fit the model or the film is too long.
    """
    if storyboard.use_codes and not geometry.has_codes:
        raise StoryboardError(["use_codes is true, but the model is a base alone, without codes: leave it out"])
    if storyboard.use_codes is False:
        geometry = geometry.without_codes()
    geometry = _with_segments(storyboard, geometry)
    _check_size(storyboard, geometry)
    _check_length(storyboard, geometry)
    spans: list[ShotSpan] = []
    takes: list[Take] = []
    segments: list[Segment] = []
    for group in _take_groups(storyboard.shots):
        frame = spans[-1].start_frame + spans[-1].num_frames if spans else 0
        new = _TakeLayout(group, len(takes), len(segments), frame, storyboard.fps, geometry)
        takes.append(new.take())
        spans += new.spans()
        segments += new.segments()
    plan = Plan(
        storyboard=storyboard,
        geometry=geometry,
        shots=tuple(spans),
        takes=tuple(takes),
        segments=tuple(segments),
    )
    only = storyboard.shots[0]
    is_one_pass = len(segments) == 1 and not geometry.has_codes and not only.video
    return clip_plan(plan, spans[0].asked_frames) if is_one_pass and spans[0].asked_frames < plan.num_frames else plan


def clip_plan(plan: Plan, num_frames: int) -> Plan:
    """Shorten the plan of a film of one segment to exactly `num_frames` frames, fewer than a segment has.

    The base alone makes any length in one pass, as Open-Sora v1.2 does; a picture is such a film of one frame.
    """
    grid, ratio = plan.geometry.grid, plan.geometry.code_ratio[0]
    span, take, segment = plan.shots[0], plan.takes[0], plan.segments[0]
    latents = num_latent_frames(num_frames, grid.chunk_frames, grid.time_stride)
    codes = ceil_div(latents, ratio)
    return replace(
        plan,
        shots=(replace(span, num_frames=num_frames, num_segments=1, num_code_frames=codes),),
        takes=(replace(take, num_latents=latents, num_code_frames=codes, spans=((0, codes),)),),
        segments=(
            replace(
                segment,
                num_latents=latents,
                num_frames=num_frames,
                start_code_frame=0,
                num_code_frames=codes,
                ends_take=True,
                ends_shot=True,
            ),
        ),
    )


def _with_segments(storyboard: Storyboard, geometry: ModelGeometry) -> ModelGeometry:
    """Geometry with the segment length and overlap that a storyboard asks for."""
    names = ("segment", "overlap")
    given = {name: getattr(storyboard, name) for name in names if getattr(storyboard, name) is not None}
    try:
        return replace(geometry, grid=replace(geometry.grid, **given)) if given else geometry
    except ValueError as error:
        raise StoryboardError([str(error)]) from error


def _asked_frames(shot: Shot, fps: float, grid: SegmentGrid, *, first: bool) -> int:
    """Frames that a shot asks for; `first` if it starts a take."""
    if shot.duration.segments is None:
        return shot.duration.num_frames(fps)
    if first:  # the first segment of a take has no frames carried over, so all of its frames are new
        return grid.segment_frames + (shot.duration.segments - 1) * grid.stride_frames
    return shot.duration.segments * grid.stride_frames


@dataclass(frozen=True)
class _TakeLayout:
    """Arithmetic of one take: how its shots are rounded to segments, and what they own."""

    group: list[tuple[int, Shot]]
    index: int
    first_segment: int
    """Index of its first segment in the film."""
    first_frame: int
    """Its first frame in the film."""
    fps: float
    geometry: ModelGeometry

    @property
    def counts(self) -> list[int]:
        """Number of segments of every shot."""
        grid = self.geometry.grid
        return [grid.num_segments_for(asked, first=number == 0) for number, asked in enumerate(self.asked_frames)]

    @cached_property
    def asked_frames(self) -> list[int]:
        """Number of frames that every shot asks for."""
        grid = self.geometry.grid
        return [_asked_frames(shot, self.fps, grid, first=number == 0) for number, (_, shot) in enumerate(self.group)]

    @property
    def code_counts(self) -> list[int]:
        """Number of code frames of every shot."""
        grid, ratio = self.geometry.grid, self.geometry.code_ratio[0]
        ends = [ceil_div(grid.take_latents(total), ratio) for total in accumulate(self.counts)]
        return [end - start for start, end in pairwise([0, *ends])]

    def take(self) -> Take:
        """The take; shots too short to own a code frame are not among its spans."""
        counts = self.code_counts
        return Take(
            index=self.index,
            num_latents=self.geometry.grid.take_latents(sum(self.counts)),
            num_code_frames=sum(counts),
            spans=tuple((shot, n) for (shot, _), n in zip(self.group, counts, strict=True) if n),
        )

    def spans(self) -> Iterator[ShotSpan]:
        """Shots of the take on the time line of the film."""
        grid = self.geometry.grid
        counts, code_counts = self.counts, self.code_counts
        ends = [grid.take_frames(total) for total in accumulate(counts)]
        for number, (shot_index, _) in enumerate(self.group):
            start = ends[number - 1] if number else 0
            yield ShotSpan(
                shot=shot_index,
                take=self.index,
                start_frame=self.first_frame + start,
                num_frames=ends[number] - start,
                asked_frames=self.asked_frames[number],
                num_segments=counts[number],
                num_code_frames=code_counts[number],
            )

    def segments(self) -> Iterator[Segment]:
        """Segments of the take."""
        grid, take = self.geometry.grid, self.take()
        owners = [shot for (shot, _), n in zip(self.group, self.counts, strict=True) for _ in range(n)]
        for place, shot in enumerate(owners):
            latents = grid.segment_slice(place)
            ratio, halo = self.geometry.code_ratio[0], self.geometry.code_halo
            yield Segment(
                index=self.first_segment + place,
                take=self.index,
                shot=shot,
                index_in_take=place,
                start_latent=latents.start,
                num_latents=grid.segment,
                overlap=grid.overlap if place else 0,
                start_frame=self.first_frame + (grid.take_frames(place) if place else 0),
                num_frames=grid.stride_frames if place else grid.segment_frames,
                start_code_frame=max(0, latents.start // ratio - halo),
                num_code_frames=min(ceil_div(latents.stop, ratio) + halo, take.num_code_frames),
                ends_take=place + 1 == len(owners),
                ends_shot=owners[place + 1 : place + 2] != [shot],  # the slice is empty behind the last segment
            )


def _take_groups(shots: tuple[Shot, ...]) -> Iterator[list[tuple[int, Shot]]]:
    """Shots of each take, with their indices."""
    group: list[tuple[int, Shot]] = []
    for index, shot in enumerate(shots):
        if group and shot.transition == "cut":
            yield group
            group = []
        group.append((index, shot))
    yield group


def _frame_fit(storyboard: ResolvedStoryboard, geometry: ModelGeometry) -> aspects.FrameCrop:
    """Frame size of a film, and the size at which it is computed: the next multiple that the model needs."""
    return aspects.fit_frame(storyboard.height, storyboard.width, geometry.size_multiple)


def _check_size(storyboard: ResolvedStoryboard, geometry: ModelGeometry) -> None:
    sizes = {"height": storyboard.height, "width": storyboard.width}
    problems = [
        f"{name} ({size}) must be even, as H.264 needs it: nearest are {max(2, size - 1)} and {size + 1}"
        for name, size in sizes.items()
        if size % 2 or not size
    ]
    if problems:
        raise StoryboardError(problems)
    fit = _frame_fit(storyboard, geometry)
    latent = geometry.latent_size(fit.made_height, fit.made_width)
    codes = code_grid((1, *latent), geometry.code_ratio)[1:]
    if geometry.code_grid not in (None, codes):
        defaults = geometry.defaults
        raise StoryboardError(
            [
                f"this model makes films of {defaults.width} x {defaults.height} (width x height), "
                f"got {sizes['width']} x {sizes['height']}: leave height and width out, or make it with the base alone "
                "(--base-only)"
            ]
        )


def _check_length(storyboard: ResolvedStoryboard, geometry: ModelGeometry) -> None:
    """Raise a StoryboardError if a film is too long, before its segments are laid out."""
    grid, fps = geometry.grid, storyboard.fps
    total = sum(
        grid.num_segments_for(_asked_frames(shot, fps, grid, first=number == 0), first=number == 0)
        for group in _take_groups(storyboard.shots)
        for number, (_, shot) in enumerate(group)
    )
    if total > MAX_SEGMENTS:
        raise StoryboardError([f"the film has {total} segments, at most {MAX_SEGMENTS} are possible"])


def timeline_rows(plan: Plan, shots: Iterable[ShotSpan] | None = None) -> list[dict[str, str]]:
    """Rows of the printed timeline, one for each shot, in texts ready to print; of `shots` only, if given."""
    rows = []
    for span in plan.shots if shots is None else shots:
        shot = plan.storyboard.shots[span.shot]
        change = span.num_frames - span.asked_frames
        rows.append(
            {
                "shot": str(span.shot + 1),
                "join": "start" if span.shot == 0 else shot.transition,
                "frames": f"{span.start_frame}-{span.start_frame + span.num_frames - 1}",
                "start": f"{span.start_frame / plan.fps:.2f} s",
                "length": f"{span.num_frames / plan.fps:.2f} s",
                "rounded": f"{change / plan.fps:+.2f} s" if change else "exact",
                "segs": str(span.num_segments),
                "codes": str(span.num_code_frames),
                "prompt": shot.prompt,
            }
        )
    return rows
