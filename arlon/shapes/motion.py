"""Motion of an object from its track: direction of its path, change of its radius and of its angle.

Decided in this order: an object that leaves its place moves in a line, in a circle or bounces; one that
stays spins, grows, shrinks or is still. Lengths are in frame heights, times in seconds.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import ndimage

from arlon.shapes import world
from arlon.shapes.matching import FOLD
from arlon.shapes.tracking import Track

MIN_FRAMES = 4
"""Fewest frames with the object from which its motion can be read."""
STATIONARY_EXTENT = 0.06
STRAIGHT_R2 = 0.8
"""Share of the variance of a path that uniform motion explains, from which it is a translation."""
ROUND_RATIO = 0.45
"""Width over length of a path from which it is a circle and no bounce."""
SPIN_THRESHOLD = 0.5 * world.SPIN_RATE["slow"]
RADIUS_CHANGE = 0.022
SPEED_THRESHOLDS = {
    "translation": math.sqrt(world.MOVE_SPEED["slow"] * world.MOVE_SPEED["fast"]),
    "circle": 2 * math.pi * world.CIRCLE_RADIUS / math.sqrt(math.prod(world.CIRCLE_PERIOD.values())),
    "bounce": 2 * world.BOUNCE_HEIGHT / math.sqrt(math.prod(world.BOUNCE_PERIOD.values())),
    "grow": math.sqrt(math.prod(world.GROW_RATE.values())),
    "spin": math.sqrt(math.prod(world.SPIN_RATE.values())),
}
"""Geometric mean of slow and fast: heights a second of path or radius, radians a second for `spin`."""


def read_motion(
    track: Track, radius: np.ndarray, good: np.ndarray, shape: str | None, fps: float
) -> tuple[str | None, str | None]:
    """Motion and speed class of an object; (None, None) for too few frames."""
    if good.sum() < MIN_FRAMES:
        return None, None
    time_s = np.flatnonzero(good) / fps
    path = np.stack([_steady(track.x[good]), _steady(track.y[good])], axis=1)
    # Percentiles instead of extremes, because single frames may be misread.
    extent = np.percentile(path, 97, axis=0) - np.percentile(path, 3, axis=0)
    # A slow object in a short take moves less than the usual threshold.
    slowest = min(world.MOVE_SPEED.values()) * (time_s[-1] - time_s[0])
    if extent.max() >= min(STATIONARY_EXTENT, 0.5 * slowest):
        return _read_path(time_s, path)
    rate = _spin_rate(track, good, shape, fps)
    if rate >= SPIN_THRESHOLD:
        return "spin", _speed("spin", rate)
    return _read_growth(time_s, ndimage.median_filter(radius[good], 5, mode="nearest"))


def _read_path(time_s: np.ndarray, path: np.ndarray) -> tuple[str | None, str | None]:
    """Translation, circle or bounce of a path (n, 2) at times (n,); motion None if it is none of them."""
    centred_time, centred = time_s - time_s.mean(), path - path.mean(0)
    # Least-squares line through the path.
    velocity = centred_time @ centred / (centred_time @ centred_time)
    axis = int(np.abs(velocity).argmax())
    explained = 1 - ((centred - centred_time[:, None] * velocity) ** 2).sum() / (centred**2).sum()
    if explained >= STRAIGHT_R2:
        names = (("left", "right"), ("up", "down"))[axis]
        return names[int(velocity[axis] > 0)], _speed("translation", abs(velocity[axis]))
    # Principal axes: a circle has two of about equal spread, a bounce one, upright.
    spread, axes = np.linalg.eigh(centred.T @ centred)
    if math.sqrt(max(spread[0], 0) / spread[1]) > ROUND_RATIO:
        return "circle", _speed("circle", _path_speed(time_s, path))
    if abs(axes[1, 1]) > abs(axes[0, 1]):
        return "bounce", _speed("bounce", _path_speed(time_s, path))
    return None, None


def _path_speed(time_s: np.ndarray, path: np.ndarray) -> float:
    """Mean speed along a path, in heights a second, from neighbouring frames only: gaps cut curves off."""
    step_s, steps = np.diff(time_s), np.hypot(*np.diff(path, axis=0).T)
    # Steps over frames in which the object was not found are left out.
    near = step_s < 1.5 * step_s.min()
    return float(steps[near].sum() / step_s[near].sum())


def _spin_rate(track: Track, good: np.ndarray, shape: str | None, fps: float) -> float:
    """Angular speed in radians a second, from the phase of the shape's own moment; 0 for a disc."""
    if shape not in FOLD:
        return 0.0
    order = FOLD[shape]
    # A turn by one symmetry angle is a full turn of the moment's phase.
    return abs(float(np.angle(track.moment_product(order, good)))) / order * fps


def _read_growth(time_s: np.ndarray, radius: np.ndarray) -> tuple[str, str | None]:
    """grow, shrink or still, from a radius (n,) at times (n,). Growth ends at the world's limits."""
    few = max(1, len(radius) // 10)
    change = float(np.median(radius[-few:]) - np.median(radius[:few]))
    slowest = min(world.GROW_RATE.values()) * (time_s[-1] - time_s[0])
    if abs(change) < min(RADIUS_CHANGE, 0.5 * slowest):
        return "still", None
    # Share of the change that is done; the middle of it tells the rate, as growth stops at a limit.
    done = (radius - radius[:few].mean()) / change
    first, last = (int(np.argmax(done >= part)) for part in (0.15, 0.85))
    rate = abs(radius[last] - radius[first]) / max(time_s[last] - time_s[first], 1e-6)
    return ("grow" if change > 0 else "shrink"), _speed("grow", rate)


def _speed(kind: str, value: float) -> str:
    return "fast" if value > SPEED_THRESHOLDS[kind] else "slow"


def _steady(values: np.ndarray) -> np.ndarray:
    """Mean of three neighbours, so that jitter adds little to the length of a path."""
    return ndimage.uniform_filter1d(values, 3, mode="nearest")
