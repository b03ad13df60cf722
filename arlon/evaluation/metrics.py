"""Figures of merit that need no network: fidelity, flicker, seams, drift and code statistics.

Videos are (..., 3, pT, pH, pW) float in [-1, 1], as everywhere; sums are taken in float64. Every function
returns plain floats, so that a figure can be logged or written to JSON as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

VIDEO_RANGE = 2.0
"""Largest minus smallest value of a video in [-1, 1]."""
STILL = 0.1 / 255
"""Frame difference that counts as none, in units of the full range: a tenth of a level of 256, on average."""


def psnr(video: Tensor, reference: Tensor, *, data_range: float = VIDEO_RANGE) -> float:
    """Peak signal-to-noise ratio in dB: 10 log10(data_range^2 / mean squared error).

    Args:
        video: Any shape; a video in [-1, 1] by default.
        reference: The shape of `video`.
        data_range: Largest minus smallest possible value.

    Returns:
        Decibels over all elements together; infinity for equal inputs.

    Raises:
        ValueError: If the shapes differ or there is nothing to compare.
    """
    _check_pair(video, reference, "psnr")
    error = (video.double() - reference.double()).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(data_range**2 / error)


def ssim(
    video: Tensor,
    reference: Tensor,
    *,
    data_range: float = VIDEO_RANGE,
    window_size: int = 11,
    sigma: float = 1.5,
) -> float:
    """Structural similarity, averaged over all frames and channels.

    Gaussian window, population moments, K1 = 0.01, K2 = 0.03, only windows that lie fully inside the frame.
    Source: Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004, eq.
        13.

    Args:
        video: (..., pH, pW), each side at least `window_size` pixels.
        reference: The shape of `video`.
        data_range: Largest minus smallest possible value.
        window_size: Side of the window, pixels.
        sigma: Standard deviation of the window, pixels.

    Returns:
        A value up to 1; 1 for equal inputs.

    Raises:
        ValueError: If the shapes differ or a frame is smaller than the window.
    """
    _check_pair(video, reference, "ssim")
    if min(video.shape[-2:]) < window_size:
        raise ValueError(f"ssim needs frames of at least {window_size} x {window_size}, got {tuple(video.shape[-2:])}")
    x, y = (a.double().reshape(-1, 1, *a.shape[-2:]) for a in (video, reference))
    offsets = torch.arange(window_size, dtype=torch.double, device=x.device) - (window_size - 1) / 2
    window = torch.softmax(-offsets.square() / (2 * sigma**2), dim=0)

    def local_mean(a: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(a, window.view(1, 1, 1, -1)), window.view(1, 1, -1, 1))

    mean_x, mean_y = local_mean(x), local_mean(y)
    var_x, var_y = local_mean(x * x) - mean_x.square(), local_mean(y * y) - mean_y.square()
    covariance = local_mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (likeness / ((mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2))).mean().item()


def r_squared(latent: Tensor, reconstruction: Tensor) -> float:
    """Share of the variance of a latent that its reconstruction explains: 1 - SSE / SSE of the channel means.

    Args:
        latent: (B, C, ...).
        reconstruction: The shape of `latent`.

    Returns:
        1 for a perfect reconstruction, 0 for one no better than the mean of each channel, below 0 for a worse
        one; NaN if every channel is constant.

    Raises:
        ValueError: If the shapes differ or there is no channel axis.
    """
    _check_pair(latent, reconstruction, "r_squared")
    if latent.ndim < 2:
        raise ValueError(f"r_squared needs a latent (B, C, ...), got {tuple(latent.shape)}")
    target, guess = (a.double().movedim(1, 0).flatten(1) for a in (latent, reconstruction))  # (C, all other axes)
    error = (guess - target).square().sum(1).sum()
    variance = (target - target.mean(1, keepdim=True)).square().sum(1).sum()
    return (1 - error / variance).item() if variance > 0 else math.nan


def temporal_flickering(video: Tensor) -> float:
    """VBench's temporal flickering: (255 - mean absolute difference of consecutive frames) / 255, at 0..255.

    Source: VBench, arXiv:2311.17982, supplement on temporal flickering. Higher is steadier: a still video has
        1.

    Args:
        video: (..., 3, pT, pH, pW) in [-1, 1], at least two frames.

    Raises:
        ValueError: If there are fewer than two frames.
    """
    return 1 - frame_differences(video).mean().item()


def frame_differences(video: Tensor) -> Tensor:
    """Mean absolute difference of each two consecutive frames, (pT - 1,) float64, in units of the full range.

    Raises:
        ValueError: If `video` is not (..., 3, pT, pH, pW) or has fewer than two frames.
    """
    _check_video(video)
    if video.shape[-3] < 2:
        raise ValueError(f"a difference of frames needs at least 2 frames, got {video.shape[-3]}")
    steps = video.double().diff(dim=-3).abs() / VIDEO_RANGE
    return steps.movedim(-3, 0).flatten(1).mean(1)


def seam_strength(video: Tensor, joins: Sequence[int]) -> float:
    """Ratio of the change of the picture at the joins of segments to that elsewhere; see `seam_ratio`.

    Args:
        video: (..., 3, pT, pH, pW) in [-1, 1].
        joins: Index of the first frame after each join, each in [1, pT).

    Raises:
        ValueError: If there is no join, a join is outside the video, or every frame is a join.
    """
    return seam_ratio(frame_differences(video), joins)


def seam_ratio(steps: Tensor, joins: Sequence[int], *, leave_out: Sequence[int] = ()) -> float:
    """Mean frame difference across the joins over the mean of all other frame differences, each at least `STILL`.

    So a film that stands still has a ratio too: 1 if nothing changes at its joins either.

    Args:
        steps: Frame differences, (pT - 1,); see `frame_differences`.
        joins: Index of the first frame after each join, each in [1, pT).
        leave_out: Frames, counted likewise, whose change is neither a join nor anything to compare with: cuts.

    Returns:
        1 if joins look like any other frame; always finite and above 0.

    Raises:
        ValueError: If there is no join, a frame is outside the video, or nothing is left to compare with.
    """
    outside = sorted(frame for frame in {*joins, *leave_out} if not 1 <= frame <= len(steps))
    if not joins or outside:
        raise ValueError(f"joins must name frames in [1, {len(steps)}], got {outside or 'none'}")
    at_join = torch.zeros(len(steps), dtype=torch.bool)
    at_join[[join - 1 for join in joins]] = True
    inner = ~at_join
    inner[[frame - 1 for frame in leave_out]] = False
    if not inner.any():
        raise ValueError(f"every one of the {len(steps)} frame changes is a join: nothing to compare with")
    seam, usual = (max(STILL, steps[chosen].mean().item()) for chosen in (at_join, inner))
    return seam / usual


@dataclass(frozen=True)
class FrameStatistics:
    """Colour, contrast and sharpness of every frame, float64, in units of the full range of a pixel."""

    colour: Tensor
    """Mean (red, green, blue), (pT, 3)."""
    contrast: Tensor
    """Standard deviation of luma (BT.601), (pT,)."""
    sharpness: Tensor
    """Mean length of the luma gradient, a pixel, (pT,)."""

    @staticmethod
    def join(parts: Sequence[FrameStatistics]) -> FrameStatistics:
        """Concatenate the statistics of consecutive pieces of a video."""
        return FrameStatistics(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(FrameStatistics)))


def frame_statistics(video: Tensor) -> FrameStatistics:
    """Statistics of every frame, averaged over leading dimensions.

    Args:
        video: (..., 3, pT, pH, pW) in [-1, 1], at least 2 x 2 pixels.

    Raises:
        ValueError: If it is no such video.
    """
    _check_video(video)
    if min(video.shape[-2:]) < 2:
        raise ValueError(f"sharpness needs frames of at least 2 x 2 pixels, got {tuple(video.shape[-2:])}")
    rgb = video.double().movedim(-4, 0) / VIDEO_RANGE  # (3, ..., pT, pH, pW)
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.double, device=video.device)
    luma = torch.tensordot(weights, rgb, dims=1)
    gradient = torch.hypot(luma[..., :-1, :].diff(dim=-1), luma[..., :-1].diff(dim=-2))
    return FrameStatistics(
        colour=rgb.movedim(-3, 0).movedim(1, -1).flatten(1, -2).mean(1),
        contrast=_by_frame(luma.flatten(-2).std(-1, correction=0)),
        sharpness=_by_frame(gradient.flatten(-2).mean(-1)),
    )


@dataclass(frozen=True)
class FilmDrift:
    """Change between the first and the last frames of a film, in units of the full range of a pixel.

    `arlon.film.appearance.Drift` is another figure: of a segment against the first of its shot, in levels of 0 to 255.
    """

    colour: float
    """Euclidean distance of the mean (red, green, blue) of the two ends, [0, sqrt 3]."""
    contrast: float
    """Mean contrast of a frame at the end minus that at the start; negative = washed out."""
    sharpness: float
    """Mean sharpness of a frame at the end minus that at the start; negative = blurred."""


def film_drift(statistics: FrameStatistics, *, window: int | None = None) -> FilmDrift:
    """Compare the means of the first and the last frames.

    Args:
        statistics: Of pT frames.
        window: Frames at each end, [1, pT // 2]. A tenth of the video, at least one, if None.

    Raises:
        ValueError: If the two windows would overlap.
    """
    num_frames = len(statistics.contrast)
    window = max(1, num_frames // 10) if window is None else window
    if not 1 <= window <= num_frames // 2:
        raise ValueError(f"drift window must be in [1, {num_frames // 2}] for {num_frames} frames, got {window}")

    def change(values: Tensor) -> Tensor:
        return values[-window:].mean(0) - values[:window].mean(0)

    return FilmDrift(
        colour=change(statistics.colour).norm().item(),
        contrast=change(statistics.contrast).item(),
        sharpness=change(statistics.sharpness).item(),
    )


def unigram_entropy(codes: Tensor) -> float:
    """Entropy of the empirical distribution of codes, -sum p ln p, in nats.

    A model that knows only how frequent each code is cannot have a lower loss on these codes.

    Args:
        codes: Integers >= 0, any shape, not empty.

    Raises:
        ValueError: If there are no codes, or they are not integers.
    """
    if codes.numel() == 0 or codes.is_floating_point() or codes.is_complex() or codes.min() < 0:
        raise ValueError(f"codes must be integers >= 0, at least one, got {codes.dtype} of shape {tuple(codes.shape)}")
    counts = torch.bincount(codes.flatten().long()).double()
    share = counts[counts > 0] / counts.sum()
    return max(0.0, -(share * share.log()).sum().item())


def _check_pair(a: Tensor, b: Tensor, name: str) -> None:
    if a.shape != b.shape or a.numel() == 0:
        raise ValueError(
            f"{name} compares two tensors of one non-empty shape, got {tuple(a.shape)} and {tuple(b.shape)}"
        )


def _check_video(video: Tensor) -> None:
    if video.ndim < 4 or video.shape[-4] != 3 or video.numel() == 0:
        raise ValueError(f"expected a video (..., 3, pT, pH, pW) with values in [-1, 1], got {tuple(video.shape)}")


def _by_frame(values: Tensor) -> Tensor:
    """Values (..., pT) averaged to (pT,)."""
    return values.reshape(-1, values.shape[-1]).mean(0)
