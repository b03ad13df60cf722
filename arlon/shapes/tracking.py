"""Tracking in frames of the shapes world: position and palette colour of every blob in every frame.

The world is rendered as `pixel = background + cover * (colour - background)`. Knowing palette and
backgrounds, the cover of a pixel by a colour is a projection on (colour - background), so blobs come out with
soft, sub-pixel edges, also after blur. The world is a torus; every neighbourhood, distance and mean here
wraps around the edges.

Dimension key: F frames, pH pW pixels, P colours of the palette. Lengths without a unit are in frame heights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from arlon.shapes import world
from arlon.shapes.matching import shape_likeness

PALETTE = np.array(list(world.COLOURS.values()), np.float32)
COLOUR_NAMES = tuple(world.COLOURS)

FOREGROUND_LEVELS = 24.0
"""Least RGB distance from the background, 0..255, at which a pixel is looked at."""
SOLID_COVER = 0.5
MIN_CORE_PIXELS = 4
"""Least pixels of a blob whose eight neighbours are in it too; fringes of mixed colour have none."""
MIN_AREA = 0.003
"""Least area of a blob in squared heights: a quarter of the smallest disc of the world."""
EDGE_PIXELS = 3
"""Distance to which soft edges are followed outside the solid blob."""
MAX_STEP = 0.22
COLOUR_CHANGE_COST = 0.12
"""A change of colour costs a track as much as a jump of this length."""
MIN_PRESENCE = 0.3
"""Share of the frames in which an object must be seen."""
BACKGROUND_CAP = 60.0
MAX_PIXELS = 8000
"""Most pixels that are compared with pictures of shapes; of more, every second, third ... is taken."""


@dataclass(frozen=True)
class Pixels:
    """Pixels of an object in all frames, (pixels,) each: frame, cover, complex offset from its centre in heights."""

    frame: np.ndarray
    cover: np.ndarray
    offset: np.ndarray


@dataclass(frozen=True)
class Track:
    """One object through time. Arrays have one entry per frame of the clip; NaN if it was not seen.

    x, y: centre in heights, unwrapped (may leave the frame). area: squared heights. moments: complex (F, 3),
    the harmonic moments of order 3, 4, 5, free of position and scale (see `harmonic_moments`). elongation: 0
    for the vocabulary's shapes, 1 for a line. colour: index into the palette, -1 if not seen. touched:
    another object is so near that area, moments and pixels are not to be trusted. pixels: its own pixels, see
    `Pixels`.
    """

    x: np.ndarray
    y: np.ndarray
    area: np.ndarray
    moments: np.ndarray
    elongation: np.ndarray
    colour: np.ndarray
    touched: np.ndarray
    pixels: Pixels

    @property
    def seen(self) -> np.ndarray:
        """Frames in which the object was found, (F,) bool."""
        return self.colour >= 0

    def likeness(self, frames: np.ndarray) -> np.ndarray:
        """Similarity in [0, 1] to each of `shapes_world.SHAPES` in each of `frames` (increasing), (frames, shapes)."""
        row = np.full(len(self.x), -1)
        row[frames] = np.arange(len(frames))
        own = np.flatnonzero(row[self.pixels.frame] >= 0)
        own = own[:: -(-len(own) // MAX_PIXELS)]
        radius = np.sqrt(self.area[frames] / np.pi)
        return shape_likeness(self.pixels.cover[own], self.pixels.offset[own], row[self.pixels.frame[own]], radius)

    def moment_product(self, order: int, good: np.ndarray) -> complex:
        """Mean of m[k + 1] conj(m[k]) of one order over consecutive good frames; 0 if there are none.

        Noise cancels, and a steady rotation turns all products by the same angle. Weighted by area: the
        larger a blob, the sharper its moments.
        """
        moments = self.moments[:, order - 3]
        pairs = good[1:] & good[:-1]
        if not pairs.any():
            return 0j
        weights = (self.area[1:] * self.area[:-1])[pairs]
        return complex((weights * (moments[1:] * moments[:-1].conj())[pairs]).sum() / weights.sum())


@lru_cache(maxsize=8)
def default_backgrounds(height: int, width: int) -> Mapping[str, np.ndarray]:
    """All backgrounds of the world at one size, (pH, pW, 3) float32 in 0..255 each."""
    return {name: world.render_background(name, height, width) for name in world.BACKGROUNDS}


def find_background(frames: np.ndarray, backgrounds: Mapping[str, np.ndarray]) -> tuple[str, float]:
    """Name of the background nearest to the frames, and how sure that is.

    Distances are capped per pixel, so objects count little. The confidence is 1 - nearest / second nearest,
    [0, 1].

    Args:
        frames: (F, pH, pW, 3) float32 in 0..255.
        backgrounds: Name to (pH, pW, 3) in 0..255, at least one.
    """
    few = frames[:: max(1, len(frames) // 12)]
    names = list(backgrounds)
    distance = np.array([np.minimum(np.abs(few - backgrounds[name]).mean(-1), BACKGROUND_CAP).mean() for name in names])
    order = np.argsort(distance)
    if len(order) == 1:
        return names[0], 1.0
    nearest, second = distance[order[0]], distance[order[1]]
    return names[order[0]], float(1 - nearest / second) if second > 0 else 0.0


def find_tracks(frames: np.ndarray, background: np.ndarray) -> list[Track]:
    """Find and follow all objects, the longest seen and largest first.

    Args:
        frames: (F, pH, pW, 3) float32 in 0..255.
        background: (pH, pW, 3) float32 in 0..255.
    """
    difference = _smooth(frames - background)
    labels = label_colours(difference, background)
    blobs = _find_blobs(labels)
    rows = _link(blobs, len(frames))
    least = min(len(frames), max(2, int(np.ceil(MIN_PRESENCE * len(frames)))))
    rows = [row for row in rows if (row >= 0).sum() >= least]
    rows.sort(key=lambda row: -blobs.area[row[row >= 0]].sum())
    return [_measure(row, blobs, labels, difference, background) for row in rows]


def label_colours(difference: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Colour index + 1 of every solid pixel, 0 elsewhere, (F, pH, pW) int16.

    Among all colours c the one whose mixture with the background, cover in [0, 1], explains the pixel best.

    Args:
        difference: Frames minus background, (F, pH, pW, 3).
        background: (pH, pW, 3).
    """
    height, width = background.shape[:2]
    flat = difference.reshape(-1, 3)
    chosen = np.flatnonzero(np.einsum("pk,pk->p", flat, flat) > FOREGROUND_LEVELS**2)
    offset, place = flat[chosen], chosen % (height * width)
    direction = (PALETTE - background.reshape(-1, 1, 3))[place]  # (pixels, P, 3)
    norm = np.einsum("pck,pck->pc", direction, direction)
    raw = np.einsum("pck,pk->pc", direction, offset) / norm
    cover = np.clip(raw, 0, 1)
    residual = (cover * cover - 2 * cover * raw) * norm  # less |offset|^2, the same for all colours
    best = residual.argmin(1)
    solid = np.take_along_axis(raw, best[:, None], 1)[:, 0] > SOLID_COVER
    labels = np.zeros(len(flat), np.int16)
    labels[chosen[solid]] = best[solid] + 1
    return labels.reshape(difference.shape[:3])


def harmonic_moments(cover: np.ndarray, z: np.ndarray, group: np.ndarray, num_groups: int) -> np.ndarray:
    """Moments sum(cover z^n) / area^((n + 2) / 2) of order n = 3, 4, 5, (num_groups, 3) complex.

    z^n is harmonic, so that an isotropic blur leaves these sums as they are (mean value property). The moment
    of a shape with k-fold symmetry is zero unless n is a multiple of k: triangle 3, square 4, star 5, disc
    none.

    Args:
        cover: (pixels,) cover of each pixel.
        z: (pixels,) complex offset of each pixel from the centre of its group.
        group: (pixels,) index of the group of each pixel.
        num_groups: Number of groups.
    """
    area = np.bincount(group, cover, num_groups)
    scale = np.sqrt(np.where(area > 0, area, np.nan))
    powers = [cover * z**n for n in (3, 4, 5)]
    sums = [np.bincount(group, p.real, num_groups) + 1j * np.bincount(group, p.imag, num_groups) for p in powers]
    with np.errstate(invalid="ignore"):  # complex division by NaN
        return np.stack([s / scale ** (n + 2) for n, s in zip((3, 4, 5), sums, strict=True)], axis=1)


@dataclass(frozen=True)
class _Blobs:
    """Solid one-coloured components; `index` (F, pH, pW) holds the blob of each pixel, -1 where none."""

    index: np.ndarray
    frame: np.ndarray
    colour: np.ndarray
    centre: np.ndarray
    area: np.ndarray


def _smooth(difference: np.ndarray) -> np.ndarray:
    """Binomial 3 x 3 filter that wraps around the edges: takes pixel noise down to three eighths."""
    for axis in (1, 2):
        difference = (2 * difference + np.roll(difference, 1, axis) + np.roll(difference, -1, axis)) / 4
    return difference


def _find_blobs(labels: np.ndarray) -> _Blobs:
    height, width = labels.shape[1:]
    parts, colour = _components(labels)
    where = np.flatnonzero(parts.ravel() >= 0)
    part = parts.ravel()[where]
    frame = np.zeros(len(colour), int)
    frame[part] = where // (height * width)
    row, column = where // width % height, where % width
    area = np.bincount(part, minlength=len(colour)) / height**2
    centre = np.stack(
        [
            _circular_mean((column + 0.5) / width, part, len(colour)) * width / height,
            _circular_mean((row + 0.5) / height, part, len(colour)),
        ],
        axis=1,
    )
    core = _core(labels).ravel()[where]
    keep = (np.bincount(part, core, len(colour)) >= MIN_CORE_PIXELS) & (area >= MIN_AREA)
    renumber = np.where(keep, np.cumsum(keep) - 1, -1)
    index = np.full(parts.size, -1)
    index[where] = renumber[part]
    return _Blobs(index.reshape(parts.shape), frame[keep], colour[keep], centre[keep], area[keep])


def _components(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Components per frame and colour on the torus: number of each pixel (-1 where none), colour of each."""
    plane = np.zeros((3, 3, 3), bool)
    plane[1] = True
    parts, colour, total = np.full(labels.shape, -1), [], 0
    for value in np.unique(labels[labels > 0]):
        own, count = ndimage.label(labels == value, structure=plane)
        merged, number = _merge_over_edges(own, count)
        inside = own > 0
        parts[inside] = merged[own[inside] - 1] + total
        colour += [int(value) - 1] * number
        total += number
    return parts, np.array(colour, int)


def _merge_over_edges(own: np.ndarray, count: int) -> tuple[np.ndarray, int]:
    """New number of each of the `count` components in `own` (from 1 on), merged across opposite edges."""
    first = np.concatenate([own[:, 0].ravel(), own[:, :, 0].ravel()])
    last = np.concatenate([own[:, -1].ravel(), own[:, :, -1].ravel()])
    both = (first > 0) & (last > 0)
    links = coo_array((np.ones(both.sum()), (first[both] - 1, last[both] - 1)), shape=(count, count))
    number, merged = connected_components(links, directed=False)
    return merged, number


def _core(labels: np.ndarray) -> np.ndarray:
    """Pixels whose eight neighbours (on the torus) have the same label, (F, pH, pW) bool."""
    core = labels > 0
    for axis in (1, 2):
        core = core & np.roll(core, 1, axis) & np.roll(core, -1, axis)
    for axis in (1, 2):
        core = core & (labels == np.roll(labels, 1, axis)) & (labels == np.roll(labels, -1, axis))
    return core


def _circular_mean(turns: np.ndarray, group: np.ndarray, num_groups: int) -> np.ndarray:
    """Mean of positions on a circle of length 1 per group, [0, 1)."""
    angle = 2 * np.pi * turns
    east = np.bincount(group, np.cos(angle), num_groups)
    north = np.bincount(group, np.sin(angle), num_groups)
    return np.mod(np.arctan2(north, east) / (2 * np.pi), 1.0)


def wrap(offset: np.ndarray, length: float) -> np.ndarray:
    """Shortest equivalent of an offset on a circle of `length`, [-length / 2, length / 2)."""
    return np.mod(offset + length / 2, length) - length / 2


def _link(blobs: _Blobs, num_frames: int) -> list[np.ndarray]:
    """Rows of blob numbers, (F,) each, -1 where unseen: nearest blobs of later frames."""
    aspect = blobs.index.shape[2] / blobs.index.shape[1]
    rows: list[np.ndarray] = []
    last: list[int] = []
    for frame in range(num_frames):
        here = np.flatnonzero(blobs.frame == frame)
        free = set(here.tolist())
        if len(rows) and len(here):
            cost = _link_cost(blobs, np.array(last), here, aspect)
            for r, h in zip(*linear_sum_assignment(cost), strict=True):
                if cost[r, h] < MAX_STEP:
                    rows[r][frame] = last[r] = here[h]
                    free.discard(int(here[h]))
        for blob in sorted(free):
            rows.append(np.full(num_frames, -1))
            rows[-1][frame] = blob
            last.append(blob)
    return rows


def _link_cost(blobs: _Blobs, last: np.ndarray, here: np.ndarray, aspect: float) -> np.ndarray:
    """Cost (rows, blobs) in heights of continuing a track with a blob."""
    step = blobs.centre[here][None] - blobs.centre[last][:, None]
    distance = np.hypot(wrap(step[..., 0], aspect), wrap(step[..., 1], 1.0))
    recoloured = blobs.colour[here][None] != blobs.colour[last][:, None]
    growth = np.abs(np.log(blobs.area[here][None] / blobs.area[last][:, None]))
    return distance + COLOUR_CHANGE_COST * recoloured + 0.02 * growth


def _measure(
    row: np.ndarray, blobs: _Blobs, labels: np.ndarray, difference: np.ndarray, background: np.ndarray
) -> Track:
    """Measure one object, given its blob in each frame, with its soft edges."""
    num_frames, height, width = labels.shape
    aspect = width / height
    seen = row >= 0
    colour = np.where(seen, blobs.colour[row], -1)
    own = blobs.index == np.where(seen, row, -2)[:, None, None]
    near = _dilate(own, EDGE_PIXELS)
    foreign = near & (labels > 0) & (labels != (colour + 1)[:, None, None])
    # Thin fringes of mixed colours do not make an object a touched one; another object does.
    touched = (foreign & (blobs.index >= 0)).any((1, 2))

    frame, y, x = np.nonzero(near & (own | (labels == 0) | (labels == (colour + 1)[:, None, None])))
    direction = PALETTE[colour[frame]] - background[y, x]
    cover = (difference[frame, y, x] * direction).sum(1) / (direction * direction).sum(1)
    dx = wrap((x + 0.5) / height - blobs.centre[row[frame], 0], aspect)
    dy = wrap((y + 0.5) / height - blobs.centre[row[frame], 1], 1.0)
    area = np.bincount(frame, cover, num_frames)
    safe = np.where(seen & (area > 0), area, np.nan)
    shift_x, shift_y = (np.bincount(frame, cover * d, num_frames) / safe for d in (dx, dy))
    z = (dx - shift_x[frame]) + 1j * (dy - shift_y[frame])
    second, spread = cover * z * z, np.bincount(frame, cover * np.abs(z) ** 2, num_frames)
    skew = np.bincount(frame, second.real, num_frames) + 1j * np.bincount(frame, second.imag, num_frames)
    return Track(
        x=_unwrap(np.where(seen, blobs.centre[row, 0] + shift_x, np.nan), aspect),
        y=_unwrap(np.where(seen, blobs.centre[row, 1] + shift_y, np.nan), 1.0),
        area=safe / height**2,
        moments=harmonic_moments(cover, z * height, frame, num_frames),
        elongation=np.abs(skew) / np.where(seen & (spread > 0), spread, np.nan),
        colour=colour,
        touched=touched,
        pixels=Pixels(frame, cover, z),
    )


def _dilate(mask: np.ndarray, radius: int) -> np.ndarray:
    """Pixels within about `radius` of the mask, on the torus.

    Steps along the axes and diagonal ones take turns: the neighbourhood is an octagon, since a square one
    would cut soft edges off at four corners and give every blob something of a square.
    """
    for step in range(radius):
        rows = mask | np.roll(mask, 1, 1) | np.roll(mask, -1, 1)
        across = rows if step % 2 else mask
        mask = rows | np.roll(across, 1, 2) | np.roll(across, -1, 2)
    return mask


def _unwrap(values: np.ndarray, length: float) -> np.ndarray:
    """Remove jumps by whole turns from a path with gaps (NaN)."""
    out = values.copy()
    seen = ~np.isnan(values)
    out[seen] = np.unwrap(values[seen], period=length)
    return out
