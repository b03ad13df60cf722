"""Colour and contrast of a segment, so that drift shows while a film is made.

Colour is the mean of each channel, contrast the standard deviation of brightness (Rec. 709 weights), both in levels
from 0 to 255. Drift is the difference from the first segment of the same shot: the prompt is the same there, so nobody
asked for the change. (`arlon.evaluation.metrics` measures drift on another scale, with Rec. 601 weights.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_BRIGHTNESS = np.array([0.2126, 0.7152, 0.0722])
"""Weights of red, green and blue in the brightness of a pixel (Rec. 709)."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """Colour and contrast of a segment."""

    colour: tuple[float, float, float]
    """Mean red, green and blue, 0 to 255."""
    contrast: float
    """Standard deviation of brightness over all pixels of all frames, 0 to 127.5."""


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Difference of a segment from the first one of its shot."""

    colour: float
    """Euclidean distance of the mean colours, in levels."""
    contrast: float
    """Change of contrast, in levels; negative if the picture fades."""


def measure_look(frames: np.ndarray) -> Look:
    """Colour and contrast of frames (pT, pH, pW, 3) uint8."""
    colour = frames.reshape(-1, 3).mean(0, dtype=np.float64)
    contrast = (frames @ _BRIGHTNESS).std()
    red, green, blue = (round(float(level), 2) for level in colour)
    return Look(colour=(red, green, blue), contrast=round(float(contrast), 2))


def measure_drift(look: Look, first: Look) -> Drift:
    """Difference of a segment from the first one of its shot."""
    colour = float(np.linalg.norm(np.subtract(look.colour, first.colour)))
    return Drift(colour=round(colour, 2), contrast=round(look.contrast - first.contrast, 2))
