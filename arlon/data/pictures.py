"""Reading picture files: PNG, JPEG, WebP and whatever else Pillow knows, as one frame."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
MAX_PIXELS = 100_000_000
IMAGE_FPS = 120.0
"""Frame rate that the DiT is given for a picture (Open-Sora v1.2)."""


def read_picture(path: Path) -> np.ndarray:
    """The frame (1, pH, pW, 3) uint8 of a picture file, turned as its camera was; of an animation the first one.

    Raises:
        ValueError: If it is no picture, is damaged or cut off, or is larger than `MAX_PIXELS`.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise ValueError(f"at most {MAX_PIXELS} pixels, got {picture.width} x {picture.height}")
                return np.array(ImageOps.exif_transpose(picture).convert("RGB"))[None]
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, EOFError) as error:
        raise ValueError("this is no picture that can be read, such as a PNG or a JPEG") from error
    except OSError as error:
        raise ValueError(f"the picture cannot be read: {error.strerror or error}") from error


def is_picture_file(path: Path) -> bool:
    """Whether a file is a picture, as far as its first bytes tell."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path):
            return True
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError):
        return False
