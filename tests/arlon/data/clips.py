"""Clips whose frames tell their number, also after coding."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from arlon.data.video_io import VideoWriter

HEIGHT, WIDTH = 32, 48
CRF = 6  # a coarser one skips the small steps between these frames


def make_clip(num_frames: int, first: int = 0) -> np.ndarray:
    """Frames (n, 32, 48, 3): left half green, right half grey of four times their number."""
    frames = np.zeros((num_frames, HEIGHT, WIDTH, 3), np.uint8)
    frames[:, :, : WIDTH // 2] = (30, 200, 90)
    frames[:, :, WIDTH // 2 :] = (4 * (first + np.arange(num_frames)))[:, None, None, None]
    return frames


def write_clip(path: Path, *lengths: int, fps: float = 8.0, tags: dict[str, str] | None = None) -> Path:
    with VideoWriter(path, fps=fps, tags=tags, crf=CRF) as writer:
        for length in lengths:
            writer.append(make_clip(length, writer.num_frames))
    return path


def frame_numbers(frames: np.ndarray) -> list[int]:
    """Which frames of `make_clip` these are."""
    return [round(float(frame[:, WIDTH // 2 + 4 :].mean()) / 4) for frame in frames]
