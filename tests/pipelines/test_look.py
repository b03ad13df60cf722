from __future__ import annotations

import numpy as np
import pytest

from arlon.film.appearance import Drift, Look, measure_drift, measure_look


def test_look_of_known_frames() -> None:
    """Half black, half pure green: the mean is half, and brightness is 0 or 0.7152 * 200."""
    frames = np.zeros((2, 4, 6, 3), np.uint8)
    frames[:, :, :3, 1] = 200
    look = measure_look(frames)
    assert look.colour == (0.0, 100.0, 0.0)
    assert look.contrast == pytest.approx(0.7152 * 100, abs=0.01)


def test_drift_is_the_distance_of_colours_and_the_change_of_contrast() -> None:
    first, later = Look(colour=(10, 20, 30), contrast=50), Look(colour=(13, 24, 30), contrast=44)
    assert measure_drift(later, first) == Drift(colour=5.0, contrast=-6.0)
