"""Sample pictures: contact sheets of validation clips and of what a stage makes of them.

Dimension key: n clips, C latent channels, T H W latent grid, pT pH pW frames and pixels, k chosen frames.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from arlon.data.samples import Sample, SampleSet, stack_samples
from arlon.files import make_folder, write_bytes
from arlon.models.video_vae import VideoVAE

NUM_EXAMPLES = 4
"""Clips of a contact sheet."""
BETWEEN = 24
"""Grey value of the gaps between frames."""


def example_batch(samples: SampleSet) -> Sample:
    """Stack the first `NUM_EXAMPLES` samples of a set."""
    return stack_samples([samples.sample(number) for number in range(NUM_EXAMPLES)])


def picture_of_pairs(vae: VideoVAE, truth: Tensor, made: Tensor) -> np.ndarray:
    """Contact sheet of latents (n, C, T, H, W): a row for each clip of `truth`, and below it the one `made` of it."""
    pairs = torch.stack([truth, made.to(truth)], dim=1).flatten(0, 1)
    with torch.no_grad():
        return picture_of_videos(vae.decode(pairs))


def picture_of_videos(videos: Tensor, *, columns: int = 8, gap: int = 2) -> np.ndarray:
    """Contact sheet with a row for each video (n, 3, pT, pH, pW) in [-1, 1]: `columns` frames spread evenly over it.

    Returns:
        (pH', pW', 3) uint8, with `gap` dark pixels between frames.
    """
    chosen = torch.linspace(0, videos.shape[2] - 1, min(columns, videos.shape[2])).round().long()
    frames = ((videos[:, :, chosen].float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    frames = F.pad(frames, (0, gap, 0, gap), value=BETWEEN)  # (n, 3, k, pH + gap, pW + gap)
    n, _, k, height, width = frames.shape
    sheet = frames.permute(0, 3, 2, 4, 1).reshape(n * height, k * width, 3)
    return sheet[: n * height - gap, : k * width - gap].numpy()


def write_png(path: Path, picture: np.ndarray) -> None:
    """Write a picture (pH, pW, 3) uint8 that appears complete or not at all."""
    from PIL import Image

    encoded = io.BytesIO()
    Image.fromarray(picture).save(encoded, format="PNG")
    make_folder(path.parent)
    write_bytes(path, encoded.getvalue())
