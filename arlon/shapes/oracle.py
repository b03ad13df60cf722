"""The oracle of the shapes world: reads what is in a clip from its frames alone, and scores it against truth.

No learned weights. Background: nearest known picture. Objects: blobs of palette colours followed through time
(`arlon.shapes.tracking`). Colour: vote over frames. Shape: the one it looks most like, blurred as needed, at
whatever place, size and angle (`arlon.shapes.matching`). Motion: path, then radius, then angle.
How often it is right on rendered truth is measured by `benchmarks/oracle_validation.py`.

A reading describes one shot: give it the frames of one prompt. Lengths are in heights, times in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from arlon.shapes import motion, tracking, world
from arlon.shapes.matching import area_factor
from arlon.shapes.prompt_reader import AskedObject, AskedShot
from arlon.shapes.tracking import Track

ATTRIBUTES = ("colour", "shape", "size", "motion", "speed")

MAX_ELONGATION = 0.4
"""Every shape of the world has 0; a longer blob is none of them."""
SHAPE_FRAMES = 12
"""Most frames in which the shape is looked at."""
SIZE_THRESHOLD = math.sqrt(world.SIZES["small"] * world.SIZES["large"])

SAME_RADIUS = 1.25
SAME_PLACE = 0.12


@dataclass(frozen=True)
class ObjectReading:
    """Reading of an object: its attributes, None if one could not be read, and for the speed of a still object.

    colour_confidence: share of the frames that voted for the colour. shape_confidence: how much better it fits
    than the second best, [0, 1]. presence: share of the frames in which it was seen. x, y (unwrapped), radius:
    (F,), NaN where not seen.
    """

    colour: str
    shape: str | None
    size: str
    motion: str | None
    speed: str | None
    colour_confidence: float
    shape_confidence: float
    presence: float
    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray


@dataclass(frozen=True)
class Reading:
    """Reading of a clip: background, confidence in it ([0, 1]), and objects, the most visible first."""

    background: str
    background_confidence: float
    objects: tuple[ObjectReading, ...]
    aspect: float
    """Frame width over height."""


@dataclass(frozen=True)
class ObjectScore:
    """Attributes of an expected object that were found; None if nothing is expected or it cannot be seen."""

    colour: bool | None
    shape: bool | None
    size: bool | None
    motion: bool | None
    speed: bool | None


@dataclass(frozen=True)
class Score:
    """Comparison of a reading with a shot; `objects` follows the expected ones, and one not found is all False."""

    background: bool | None
    """None if no background is expected."""
    count: bool
    objects: tuple[ObjectScore, ...]

    def share(self, attribute: str) -> float:
        """Share of expected objects of which `attribute` is right, [0, 1]; NaN if it can be seen of none."""
        values = [getattr(o, attribute) for o in self.objects if getattr(o, attribute) is not None]
        return sum(values) / len(values) if values else math.nan


@dataclass(frozen=True)
class ObjectKept:
    """Attributes that an object kept across a join of two clips; all False if it is gone."""

    place: bool
    colour: bool
    shape: bool
    size: bool
    motion: bool


@dataclass(frozen=True)
class IdentityKept:
    """Everything that stayed across a join; `objects` follows the order of the reading before it."""

    background: bool
    objects: tuple[ObjectKept, ...]


# --- reading ------------------------------------------------------------------------------------------------


def read_clip(
    frames: np.ndarray | Tensor, *, fps: float = 8.0, backgrounds: Mapping[str, np.ndarray] | None = None
) -> Reading:
    """Read background and objects of one shot.

    Args:
        frames: (pT, pH, pW, 3) uint8, or a video (3, pT, pH, pW) float in [-1, 1].
        fps: Frames a second.
        backgrounds: Name to (pH, pW, 3) in 0..255. The world's own at this size if None.

    Returns:
        The reading; without objects if none is seen in at least 30 % of the frames.

    Raises:
        ValueError: If `frames` is neither of the two, or fps is not positive.
    """
    if not fps > 0:
        raise ValueError(f"fps must be positive, got {fps}")
    pixels = _to_levels(frames)
    height, width = pixels.shape[1:3]
    if backgrounds is None:
        backgrounds = tracking.default_backgrounds(height, width)
    name, confidence = tracking.find_background(pixels, backgrounds)
    tracks = tracking.find_tracks(pixels, np.asarray(backgrounds[name], np.float32))
    return Reading(name, confidence, tuple(_read_object(track, fps) for track in tracks), width / height)


def _to_levels(frames: np.ndarray | Tensor) -> np.ndarray:
    """Either layout as (F, pH, pW, 3) float32 in 0..255."""
    array = frames.detach().cpu() if isinstance(frames, Tensor) else torch.from_numpy(np.ascontiguousarray(frames))
    if array.ndim == 4 and array.numel():
        if array.dtype == torch.uint8 and array.shape[-1] == 3:
            return array.numpy().astype(np.float32)
        if array.is_floating_point() and array.shape[0] == 3:
            return ((array.float().permute(1, 2, 3, 0) + 1) * 127.5).contiguous().numpy()
    raise ValueError(
        "expected frames (pT, pH, pW, 3) uint8 or a video (3, pT, pH, pW) float in [-1, 1], "
        f"got {tuple(array.shape)} {array.dtype}"
    )


def _read_object(track: Track, fps: float) -> ObjectReading:
    votes = np.bincount(track.colour[track.seen])
    good = _trusted(track)
    shape, shape_confidence = _read_shape(track, good)
    radius = np.sqrt(track.area / (math.pi * area_factor(shape or "circle")))
    does, speed = motion.read_motion(track, radius, good, shape, fps)
    start = radius[good][:5] if does in ("grow", "shrink") else radius[good]
    return ObjectReading(
        colour=tracking.COLOUR_NAMES[int(votes.argmax())],
        shape=shape,
        size="small" if np.median(start) < SIZE_THRESHOLD else "large",
        motion=does,
        speed=speed,
        colour_confidence=float(votes.max() / votes.sum()),
        shape_confidence=shape_confidence,
        presence=float(track.seen.mean()),
        x=track.x,
        y=track.y,
        radius=radius,
    )


def _trusted(track: Track) -> np.ndarray:
    """Frames in which no other object is near, or all if those are too few, (F,) bool."""
    measured = track.seen & np.isfinite(track.area)
    alone = measured & ~track.touched
    return alone if alone.sum() >= max(4, 0.2 * measured.sum()) else measured


def _read_shape(track: Track, good: np.ndarray) -> tuple[str | None, float]:
    """Shape and confidence: what the object looks most like in the mean of some frames, the larger the more.

    None if it is too long for any shape.
    """
    if np.median(track.elongation[good]) > MAX_ELONGATION:
        return None, 0.0
    frames = np.flatnonzero(good)
    frames = frames[:: -(-len(frames) // SHAPE_FRAMES)]
    likeness = np.average(track.likeness(frames), axis=0, weights=track.area[frames])
    second, best = np.argsort(likeness)[-2:]
    return world.SHAPES[best], float(1 - (1 - likeness[best]) / max(1 - likeness[second], 1e-9))


# --- scoring ------------------------------------------------------------------------------------------------


def score_clip(
    clip: Reading | np.ndarray | Tensor,
    expected: world.Shot | AskedShot | Sequence[world.ObjectLook],
    *,
    fps: float = 8.0,
) -> Score:
    """Hold a clip against what it should show.

    Objects are matched so that most agrees, colour before shape before the rest. `size` is that at the start
    of the clip.

    Args:
        clip: A reading, or frames as `read_clip` takes them.
        expected: The shot, what a prompt says of it, or just its objects.
        fps: Frames a second, if `clip` holds frames.

    Returns:
        The score, one entry an expected object.

    Raises:
        ValueError: If nothing is expected, or the frames are of a wrong kind.
    """
    reading = clip if isinstance(clip, Reading) else read_clip(clip, fps=fps)
    looks: Sequence[world.ObjectLook | AskedObject]
    if isinstance(expected, world.Shot | AskedShot):
        looks, background = expected.objects, expected.background
    else:
        looks, background = tuple(expected), None
    if not looks:
        raise ValueError("nothing is expected of this clip: give a shot or at least one object")
    match = match_objects(reading, looks)
    found = [None if index is None else reading.objects[index] for index in match]
    return Score(
        background=None if background is None else reading.background == background,
        count=len(reading.objects) == len(looks),
        objects=tuple(_score_object(look, seen) for look, seen in zip(looks, found, strict=True)),
    )


def match_objects(reading: Reading, looks: Sequence[world.ObjectLook | AskedObject]) -> tuple[int | None, ...]:
    """Match the objects of a reading to the expected ones for most agreement, colour before shape before the rest.

    Returns:
        Index into `reading.objects` of each of `looks`; None if fewer objects were seen.
    """
    found = reading.objects[: len(looks) + 2]
    agreement = np.array([[_agreement(look, seen) for seen in found] for look in looks]).reshape(len(looks), len(found))
    match = dict(zip(*(i.tolist() for i in linear_sum_assignment(-agreement)), strict=True))
    return tuple(match.get(index) for index in range(len(looks)))


def _agreement(look: world.ObjectLook | AskedObject, seen: ObjectReading) -> float:
    weights = {"colour": 8.0, "shape": 4.0, "motion": 2.0, "size": 1.0, "speed": 0.5}
    asked = {name: getattr(look, name) for name in weights}
    return sum(weights[name] for name, value in asked.items() if value is not None and value == getattr(seen, name))


def _score_object(look: world.ObjectLook | AskedObject, seen: ObjectReading | None) -> ObjectScore:
    asked = {name: getattr(look, name) for name in ATTRIBUTES}
    if look.motion == "still":
        asked["speed"] = None
    found = {name: seen is not None and getattr(seen, name) == value for name, value in asked.items()}
    return ObjectScore(**{name: None if asked[name] is None else found[name] for name in ATTRIBUTES})


def identity_kept(before: Reading, after: Reading) -> IdentityKept:
    """Attributes that the objects at the end of a clip keep at the start of the next, matched by place.

    Place is kept within 0.12 heights on the torus, size within a factor of 1.25; the caller drops the
    attribute that the new prompt changes. Clips must be adjacent and of one frame size.

    Raises:
        ValueError: If the two readings are of frames of different proportions.
    """
    if not math.isclose(before.aspect, after.aspect):
        raise ValueError(f"cannot compare frames of width / height {before.aspect:.3f} and {after.aspect:.3f}")
    distance = np.array([[_jump(a, b, before.aspect) for b in after.objects] for a in before.objects])
    distance = distance.reshape(len(before.objects), len(after.objects))
    match = dict(zip(*(i.tolist() for i in linear_sum_assignment(distance)), strict=True))
    kept = [
        _keep(a, after.objects[match[i]], distance[i, match[i]]) if i in match else ObjectKept(*[False] * 5)
        for i, a in enumerate(before.objects)
    ]
    return IdentityKept(before.background == after.background, tuple(kept))


def path_followed(given: Reading, shown: Reading) -> float:
    """Distance of the objects of a clip from those of another at the same time.

    Args:
        given: Reading of the clip that sets the paths.
        shown: Reading of the clip that is to follow them, of as many frames.

    Returns:
        Share of the frames that show an object of `given` in which `shown` has one within 0.12 heights on the torus,
        the same one throughout; mean over objects, [0, 1], NaN if `given` has none.

    Raises:
        ValueError: If the two readings are of frames of different proportions.
    """
    if not math.isclose(given.aspect, shown.aspect):
        raise ValueError(f"cannot compare frames of width / height {given.aspect:.3f} and {shown.aspect:.3f}")
    shares = [max((_followed(a, b, given.aspect) for b in shown.objects), default=0.0) for a in given.objects]
    return sum(shares) / len(shares) if shares else math.nan


def _followed(a: ObjectReading, b: ObjectReading, aspect: float) -> float:
    there = np.isfinite(a.x)
    distance = np.hypot(tracking.wrap((b.x - a.x)[there], aspect), tracking.wrap((b.y - a.y)[there], 1.0))
    return float((distance < SAME_PLACE).mean())


def _keep(a: ObjectReading, b: ObjectReading, distance: float) -> ObjectKept:
    ratio = _seen(b.radius)[:3].mean() / _seen(a.radius)[-3:].mean()
    return ObjectKept(
        place=bool(distance < SAME_PLACE),
        colour=a.colour == b.colour,
        shape=a.shape is not None and a.shape == b.shape,
        size=bool(1 / SAME_RADIUS < ratio < SAME_RADIUS),
        motion=a.motion is not None and a.motion == b.motion,
    )


def _jump(a: ObjectReading, b: ObjectReading, aspect: float) -> float:
    """Distance on the torus from the last place of one object to the first of another."""
    dx, dy = _seen(b.x)[0] - _seen(a.x)[-1], _seen(b.y)[0] - _seen(a.y)[-1]
    return math.hypot(tracking.wrap(dx, aspect), tracking.wrap(dy, 1.0))


def _seen(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]
