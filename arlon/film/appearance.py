"""How a segment looks, in a few numbers, so that drift is seen while a film is made.

Colour is the mean of each channel, contrast the standard deviation of brightness (Rec. 709 weights), both in levels of
0 to 255. Drift is measured against the first segment of the same shot: there the prompt is the same, so what changes
was not asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_BRIGHTNESS = np.array([0.2126, 0.7152, 0.0722])


@dataclass(frozen=True, kw_only=True)
class Look:
    """Colour and contrast of a segment."""

    colour: tuple[float, float, float]
    """Mean red, green and blue, 0 to 255."""
    contrast: float
    """Standard deviation of brightness over all pixels of all frames, 0 to 127.5."""


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How far a segment is from the first of its shot."""

    colour: float
    """Euclidean distance of the mean colours, in levels."""
    contrast: float
    """Change of contrast, in levels; negative: it fades."""


def measure_look(frames: np.ndarray) -> Look:
    """Colour and contrast of frames (pT, pH, pW, 3) uint8."""
    colour = frames.reshape(-1, 3).mean(0, dtype=np.float64)
    contrast = (frames @ _BRIGHTNESS).std()
    red, green, blue = (round(float(level), 2) for level in colour)
    return Look(colour=(red, green, blue), contrast=round(float(contrast), 2))


def measure_drift(look: Look, first: Look) -> Drift:
    """Drift of a segment from the first of its shot."""
    colour = float(np.linalg.norm(np.subtract(look.colour, first.colour)))
    return Drift(colour=round(colour, 2), contrast=round(look.contrast - first.contrast, 2))
