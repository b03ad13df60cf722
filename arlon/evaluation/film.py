"""Evaluation of one film: figures of picture, motion, length, and of how well it follows its prompts.

Frames stay uint8 and are worked on a few at a time, so that a film needs little more memory than its frames.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arlon.data.transforms import frames_to_video
from arlon.evaluation import cases, metrics
from arlon.evaluation.metric_table import FIGURES
from arlon.evaluation.metrics import FrameStatistics
from arlon.evaluation.optical_flow import estimate_flow
from arlon.evaluation.vbench import rules as vbench
from arlon.evaluation.vbench.networks import BACKBONE_KINDS, NO_ARCHITECTURE, Backbone, PromptBackbone
from arlon.shapes import oracle
from arlon.shapes.motion import MIN_FRAMES
from arlon.shapes.oracle import Reading
from arlon.shapes.prompt_reader import AskedShot, read_prompt

CHUNK_FRAMES = 16
CHUNK_PIXELS = 2**20
"""Pixels of the frames that are processed together, at most, unless a single frame has more."""
DRIFT_SHARE = 0.15
"""Part of the film at each end between which drift is measured."""
_BOTH = ("both_colours", "both_objects")
QUARTERS = ("first", "second", "third", "last")
PROMPT_GROUPS = ("prompt", "quarters", "switch")
"""Groups of the figures that the oracle gives."""
NUM_CURVE_POINTS = 60
_KEPT = ("colour", "shape", "motion")
"""Attributes of an object that a prompt may change, and that must stay if it does not."""


@dataclass(frozen=True, kw_only=True)
class FilmShot:
    """A shot of a film."""

    prompt: str
    """Empty if unknown."""
    start_frame: int
    num_frames: int
    is_cut: bool = False
    """Whether the shot starts with a cut; otherwise it continues the shot before."""


@dataclass(frozen=True, kw_only=True)
class Outline:
    """Shots and segments of a film, as far as they are known."""

    shots: tuple[FilmShot, ...]
    segment_starts: tuple[int, ...] | None = None
    """First frame of every segment; None if unknown."""

    @property
    def cuts(self) -> list[int]:
        """First frame of every shot that follows a cut."""
        return [shot.start_frame for shot in self.shots[1:] if shot.is_cut]


def measure_film(
    frames: np.ndarray,
    outline: Outline,
    *,
    fps: float,
    backbones: Mapping[str, Backbone] | None = None,
) -> dict[str, Any]:
    """Compute every figure that can be computed.

    Args:
        frames: (pT, pH, pW, 3) uint8, at least 2 x 2 pixels.
        outline: Shots and segments; shots must lie within the film.
        fps: Frames a second.
        backbones: Networks, by the dimension they are for.

    Returns:
        Plain values for JSON: `figures` by name, None where one could not be computed, `skipped` with the reason;
        `shots` and `joins` with what was asked, read and scored; `curves` over time.

    Raises:
        ValueError: If the frames are of a wrong kind or a shot lies outside the film.
    """
    _check(frames, outline)
    film = _Measurements(frames, outline, fps)
    film.measure_picture()
    film.measure_motion()
    film.measure_prompts()
    film.measure_dimensions(backbones or {})
    return film.result()


class _Measurements:
    """Collects the figures of one film."""

    def __init__(self, frames: np.ndarray, outline: Outline, fps: float) -> None:
        self.frames, self.outline, self.fps = frames, outline, fps
        self.values: dict[str, float] = {}
        self.skipped: dict[str, str] = {}
        self.shots: list[dict[str, Any]] = []
        self.joins: list[dict[str, Any]] = []
        self.seams: dict[int, float] = {}
        """Seam strength by first frame, where segments join and the prompt changes."""
        self.curves: dict[str, Any] = {}

    def result(self) -> dict[str, Any]:
        """Everything found, in plain values."""
        for name in FIGURES:
            if name not in self.skipped and not math.isfinite(self.values.get(name, math.nan)):
                self.skipped[name] = "nothing in this film to measure it on"
        return {
            "figures": {name: plain_number(self.values.get(name, math.nan)) for name in FIGURES},
            "skipped": self.skipped,
            "shots": self.shots,
            "joins": self.joins,
            "curves": self.curves,
        }

    def skip(self, reason: str, *names: str) -> None:
        """Note why figures are missing."""
        self.skipped |= dict.fromkeys(names, reason)

    def measure_picture(self) -> None:
        """Flicker, drift, seams."""
        parts = [metrics.frame_statistics(video) for video in _videos(self.frames, overlap=0)]
        statistics = FrameStatistics.join(parts)
        self._draw_curves(statistics)
        num_frames = len(self.frames)
        if num_frames < 2:
            names = ("temporal_flickering", "drift_colour", "drift_contrast", "drift_sharpness")
            self.skip("the film has one frame", *names, "seam_strength", "seam_strength_switch")
            return
        drift = metrics.film_drift(statistics, window=max(1, int(DRIFT_SHARE * num_frames)))
        self.values |= {f"drift_{name}": value for name, value in asdict(drift).items()}
        steps = torch.cat([metrics.frame_differences(video) for video in _videos(self.frames, overlap=1)])
        self.values["temporal_flickering"] = 1 - steps.mean().item()
        self._measure_seams(steps)

    def _measure_seams(self, steps: Tensor) -> None:
        if self.outline.segment_starts is None:
            reason = "the film does not say where its segments join"
            self.skip(reason, "seam_strength", "seam_strength_switch")
            return
        cuts = self.outline.cuts
        joins = [start for start in self.outline.segment_starts if 0 < start <= len(steps) and start not in cuts]
        starts = {shot.start_frame for shot in self.outline.shots}
        kinds = {
            "seam_strength": [join for join in joins if join not in starts],
            "seam_strength_switch": [join for join in joins if join in starts],
        }
        for name, chosen in kinds.items():
            if not chosen:
                self.skip("no segments of this film join there", name)
            elif len({*joins, *cuts}) == len(steps):
                self.skip("every frame of this film is a join or a cut: nothing to compare with", name)
            else:
                self.values[name] = metrics.seam_ratio(steps, chosen, leave_out=sorted({*joins, *cuts} - {*chosen}))
                if name == "seam_strength_switch":
                    self.seams = {
                        join: metrics.seam_ratio(steps, [join], leave_out=sorted({*joins, *cuts} - {join}))
                        for join in chosen
                    }

    def _draw_curves(self, statistics: FrameStatistics) -> None:
        """Statistics over time, in at most `NUM_CURVE_POINTS` means."""
        groups = np.array_split(np.arange(len(self.frames)), min(NUM_CURVE_POINTS, len(self.frames)))
        self.curves["time_s"] = [round(float(group.mean()) / self.fps, 4) for group in groups]
        for name in ("contrast", "sharpness"):
            values = getattr(statistics, name).numpy()
            self.curves[name] = [round(float(values[group].mean()), 5) for group in groups]
        colour = (statistics.colour.numpy() + 0.5) * 255
        self.curves["colour"] = [[round(float(v), 1) for v in colour[group].mean(0)] for group in groups]

    def measure_motion(self) -> None:
        """Optical flow, and VBench's rule of what is dynamic."""
        stride = vbench.flow_stride(self.fps)
        picked = self.frames[::stride]
        speeds = [vbench.fastest_pixels(estimate_flow(a, b)) for a, b in _pairs(picked)]
        pixels = torch.cat(speeds) if speeds else torch.zeros(0)
        place = torch.arange(len(pixels)) * stride
        shots = [  # a pair across two shots shows what the new prompt changes, not motion
            pixels[(place >= shot.start_frame) & (place + stride < shot.start_frame + shot.num_frames)]
            for shot in self.outline.shots
        ]
        within = torch.cat(shots)
        if not len(within):
            self.skip("the film has no two frames of one shot", "dynamic_degree_lk", "flow_speed")
            return
        # The median does not see the few frames in which an object comes in over an edge.
        speed = sum(len(shot) * shot.median().item() for shot in shots if len(shot)) / len(within)
        self.values["flow_speed"] = speed * self.fps / stride / self.frames.shape[1]
        is_dynamic = vbench.is_dynamic(within, self.frames.shape[1:3], fps=self.fps, num_frames=len(picked))
        self.values["dynamic_degree_lk"] = float(is_dynamic)

    def measure_prompts(self) -> None:
        """Compare the prompts with what the oracle sees in the shots."""
        asked = [_asked(shot) for shot in self.outline.shots]
        readings = [
            self._read(shot) if wanted else None for shot, wanted in zip(self.outline.shots, asked, strict=True)
        ]
        scores = self._score_shots(asked, readings)
        self._score_joins(asked, readings)
        names = [name for name, figure in FIGURES.items() if figure.group in PROMPT_GROUPS]
        if not any(asked):
            known = any(shot.prompt for shot in self.outline.shots)
            self.skip("no prompt is of the shapes world" if known else "its prompts are not known", *names)
            return
        if not self.joins:
            reason = "no two shots, with prompts of the shapes world, continue one another"
            self.skip(reason, *(name for name in names if FIGURES[name].group == "switch"))
        self._average("prompt_accuracy", {index: _accuracy(score) for index, score in scores.items()})
        for name in cases.PROMPT_ATTRIBUTES:
            self._average(f"prompt_{name}", {index: score[name] for index, score in scores.items()})
        for name in _BOTH:
            self.values[f"prompt_{name}"] = _mean(score[name] for score in scores.values())
        for name in {name for join in self.joins for name in join["scores"]}:
            self.values[name] = _mean(join["scores"][name] for join in self.joins)
        for entry in (*self.shots, *self.joins):
            entry["scores"] = {name: plain_number(value) for name, value in entry["scores"].items()}

    def _average(self, name: str, values: Mapping[int, float]) -> None:
        """A figure of values by shot: over the film, over each quarter of it, and how the last differs from the first.

        Values that are no figures of their own are left out of the result.
        """
        quarters = [
            _mean(value for index, value in values.items() if self._quarter(index) == number)
            for number in range(len(QUARTERS))
        ]
        self.values |= {f"{name}_{end}": value for end, value in zip(QUARTERS, quarters, strict=True)}
        self.values |= {name: _mean(values.values()), f"{name}_change": quarters[-1] - quarters[0]}

    def _read(self, shot: FilmShot) -> Reading:
        return oracle.read_clip(self.frames[shot.start_frame : shot.start_frame + shot.num_frames], fps=self.fps)

    def _quarter(self, index: int) -> int:
        shot = self.outline.shots[index]
        return int(len(QUARTERS) * (shot.start_frame + shot.num_frames / 2) / len(self.frames))

    def _score_shots(
        self, asked: Sequence[AskedShot | None], readings: Sequence[Reading | None]
    ) -> dict[int, dict[str, float]]:
        """Scores of the shots that can be scored, by index; every shot is noted."""
        scores: dict[int, dict[str, float]] = {}
        has_size = True
        for index, (shot, wanted, reading) in enumerate(zip(self.outline.shots, asked, readings, strict=True)):
            entry: dict[str, Any] = asdict(shot) | {"asked": None, "read": None, "scores": {}}
            has_size = has_size or shot.is_cut
            if wanted is not None and reading is not None:
                scores[index] = cases.score_prompt(reading, wanted)
                if not has_size:
                    scores[index]["size"] = math.nan
                both = cases.score_both(reading, wanted)
                scores[index] |= dict(zip(_BOTH, both.values(), strict=True))
                has_size = has_size and all(o.motion not in ("grow", "shrink") for o in wanted.objects)
                entry |= {"asked": asdict(wanted), "read": plain_reading(reading), "scores": scores[index]}
            self.shots.append(entry)
        return scores

    def _score_joins(self, asked: Sequence[AskedShot | None], readings: Sequence[Reading | None]) -> None:
        """Score each pair of shots of which the second continues the first."""
        for index, ((before, after), (seen, then)) in enumerate(
            zip(pairwise(asked), pairwise(readings), strict=True), start=1
        ):
            shot = self.outline.shots[index]
            if shot.is_cut or not (before and after and seen and then):
                continue
            scores, seam = score_join(before, after, seen, then), self.seams.get(shot.start_frame)
            self.joins.append({"shot": index, "scores": scores, "seam_strength": seam})

    def measure_dimensions(self, backbones: Mapping[str, Backbone]) -> None:
        """VBench's dimensions that need a network."""
        for name, figure in FIGURES.items():
            if figure.group != "vbench" or not figure.backbone:
                continue
            if name in backbones:
                try:
                    self.values[name] = self._score(backbones[name])
                except ValueError as error:
                    self.skip(str(error), name)
            elif name in BACKBONE_KINDS:
                self.skip(f"needs {figure.backbone}: give --backbone {name}=PLACE", name)
            else:
                self.skip(f"needs {figure.backbone}, {NO_ARCHITECTURE[name]}: use the official suite", name)

    def _score(self, backbone: Backbone) -> float:
        """The figure of a network; of one that needs prompts the mean over shots, as each has its own."""
        if not isinstance(backbone, PromptBackbone):
            return backbone.score(self.frames, fps=self.fps)
        shots = [shot for shot in self.outline.shots if shot.prompt]
        if not shots:
            raise ValueError("its prompts are not known")
        parts = ((self.frames[shot.start_frame :][: shot.num_frames], shot.prompt) for shot in shots)
        return _mean(backbone.agreement(*part) for part in parts)


def score_join(before: AskedShot, after: AskedShot, seen: Reading, then: Reading) -> dict[str, float]:
    """Effect of a prompt switch.

    Args:
        before: What was asked for in the shot before.
        after: What is asked for in the shot after.
        seen: Reading of the shot before.
        then: Reading of the shot after.

    Returns:
        By figure, shares in [0, 1] or NaN: `switch_appears`, and `kept_...` of the objects of which the switch does
        not change it, each found in the shot before by what was asked of it. One that is not there keeps nothing.
    """
    same_cast = len(before.objects) == len(after.objects)
    pairs = list(zip(before.objects, after.objects, strict=True)) if same_cast else []
    found = oracle.score_clip(then, after)
    appears = [
        getattr(score, name)
        for (old, new), score in zip(pairs, found.objects, strict=False)
        for name in ("colour", "shape", "motion", "speed")
        if None not in (getattr(old, name), getattr(new, name), getattr(score, name))
        and getattr(old, name) != getattr(new, name)
    ]
    if None not in (before.background, after.background) and before.background != after.background:
        appears.append(found.background)
    kept = oracle.identity_kept(seen, then)
    match = oracle.match_objects(seen, before.objects)
    values: dict[str, list[bool]] = {name: [] for name in (*_KEPT, "place", "size")}
    for index, (old, new) in zip(match, pairs, strict=False):
        same = [name for name in _KEPT if getattr(old, name) is not None and getattr(old, name) == getattr(new, name)]
        for name in (*same, "place", "size"):
            values[name].append(index is not None and getattr(kept.objects[index], name))
    values["background"] = [kept.background] if before.background == after.background else []
    return {"switch_appears": _mean(map(float, appears))} | {
        f"kept_{name}": _mean(map(float, stays)) for name, stays in values.items()
    }


def plain_reading(reading: Reading) -> dict[str, Any]:
    """A reading without its paths, for JSON."""
    names = (*oracle.ATTRIBUTES, "colour_confidence", "shape_confidence", "presence")
    objects = [{name: getattr(seen, name) for name in names} for seen in reading.objects]
    return {"background": reading.background, "objects": objects}


def plain_number(value: float) -> float | None:
    """A number for JSON: None if it is not finite."""
    return value if math.isfinite(value) else None


def _asked(shot: FilmShot) -> AskedShot | None:
    """Expectations of a prompt for a shot, without motion and speed if the shot is too short to show any."""
    asked = read_prompt(shot.prompt)
    if asked is None or shot.num_frames >= MIN_FRAMES:
        return asked
    return replace(asked, objects=tuple(replace(look, motion=None, speed=None) for look in asked.objects))


def _accuracy(score: Mapping[str, float]) -> float:
    """Mean of all attributes; direction is part of motion."""
    return _mean(score[name] for name in cases.PROMPT_ATTRIBUTES if name != "direction")


def _mean(values: Any) -> float:
    finite = [value for value in values if not math.isnan(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _check(frames: np.ndarray, outline: Outline) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise ValueError(f"expected frames (pT, pH, pW, 3) uint8, got {tuple(frames.shape)} {frames.dtype}")
    for number, shot in enumerate(outline.shots, start=1):
        if shot.num_frames < 1 or shot.start_frame < 0 or shot.start_frame + shot.num_frames > len(frames):
            last = shot.start_frame + shot.num_frames - 1
            raise ValueError(f"shot {number} is frames {shot.start_frame}-{last}, but the film has {len(frames)}")


def _videos(frames: np.ndarray, *, overlap: int) -> Iterator[Tensor]:
    """A film in pieces (3, pT, pH, pW) float32 in [-1, 1], each with `overlap` frames of the next."""
    count = min(CHUNK_FRAMES, max(1, CHUNK_PIXELS // math.prod(frames.shape[1:3])))
    for start in range(0, max(1, len(frames) - overlap), count):
        yield frames_to_video(frames[start : start + count + overlap])


def _pairs(frames: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
    """Consecutive frames, before and after, (n, 3, pH, pW) in [0, 1]."""
    for video in _videos(frames, overlap=1) if len(frames) > 1 else ():
        pictures = (video.transpose(0, 1) + 1) / 2
        yield pictures[:-1], pictures[1:]
