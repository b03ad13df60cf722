"""Similarity of a blob to each shape of the world, whatever its place, size, angle and blur.

A blob is compared with pictures of every shape of its area around its centre: turned, and blurred more or less, since
a decoder rounds corners off. The likeness is the greatest correlation of the two covers. Unlike a single moment it
counts the whole outline, so a dent or a bulge that no shape has does not decide.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from scipy import ndimage

from arlon.shapes import world

FOLD = {"triangle": 3, "square": 4, "star": 5}
"""Rotational symmetry: how often a shape coincides with itself in a full turn; a circle always does."""
ANGLE_STEP = math.radians(6)
BLURS = (0.08, 0.16, 0.26, 0.38, 0.52)
"""Standard deviations of the blur, in radii of the disc of the same area."""
PIXELS_PER_RADIUS = 30
"""Pixels per radius in the reference pictures."""
MIDDLE = 78
"""Row and column of the centre of a picture: it reaches 2.6 radii far, beyond every shape and its blur."""


def shape_likeness(cover: np.ndarray, z: np.ndarray, group: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Likeness of each group of pixels to each of `shapes_world.SHAPES`, (groups, shapes) in [0, 1].

    Args:
        cover: (pixels,) cover of each pixel.
        z: (pixels,) complex offset of each pixel from the centre of its group.
        group: (pixels,) index of the group of each pixel.
        radius: (groups,) that of the disc of the same area, in the unit of z. A group without pixels gets 0.
    """
    num_groups = len(radius)
    offset = (z * (PIXELS_PER_RADIUS / radius[group])).astype(np.complex64)
    energy = np.bincount(group, cover * cover, num_groups)
    likeness = np.zeros((num_groups, len(world.SHAPES)))
    for column, shape in enumerate(world.SHAPES):
        for angle in _angles(shape):
            # Turning the pixels is cheaper than turning the picture, and needs no interpolation of it.
            turned = offset * np.complex64(np.exp(1j * angle))
            x, y = (
                np.clip(np.rint(part) + MIDDLE, 0, 2 * MIDDLE).astype(np.intp) for part in (turned.real, turned.imag)
            )
            place = y * (2 * MIDDLE + 1) + x
            for picture in _pictures(shape):
                ideal = picture[place]
                product = np.bincount(group, cover * ideal, num_groups)
                # Normalised correlation: 1 if the cover is a multiple of the picture.
                scale = np.sqrt(energy * np.bincount(group, ideal * ideal, num_groups))
                here = np.divide(product, scale, out=np.zeros(num_groups), where=scale > 0)
                np.maximum(likeness[:, column], here, out=likeness[:, column])
    return likeness


def area_factor(shape: str) -> float:
    """Area of a shape over that of the disc of its radius."""
    return _area(shape) / math.pi


def _angles(shape: str) -> np.ndarray:
    return np.arange(0, math.tau / FOLD[shape] - 1e-9, ANGLE_STEP) if shape in FOLD else np.zeros(1)


@lru_cache
def _area(shape: str) -> float:
    """Area at radius 1, which reaches no further than 1.5."""
    axis = (np.arange(801) + 0.5) / 801 * 4 - 2
    x, y = np.meshgrid(axis, axis)
    return float((world.signed_distance(shape, x, y, np.float64(1)) < 0).sum() * (axis[1] - axis[0]) ** 2)


@lru_cache
def _pictures(shape: str) -> np.ndarray:
    """The shape with the area of a disc of radius 1 under each blur, (blurs, pixels) row by row."""
    axis = np.arange(-MIDDLE, MIDDLE + 1) / PIXELS_PER_RADIUS
    x, y = np.meshgrid(axis, axis)
    cover = (world.signed_distance(shape, x, y, np.float64(area_factor(shape) ** -0.5)) < 0).astype(float)
    return np.stack([ndimage.gaussian_filter(cover, blur * PIXELS_PER_RADIUS).ravel() for blur in BLURS])
