"""Sizes on the four grids a film lives on, and how it is cut into segments.

    pixels (pT, pH, pW)  --VAE-->  latent (T, H, W)  --VQ-VAE-->  codes (cT, cH, cW)
                                   latent (T, H, W)  --patch--->  DiT tokens (nT, nH, nW)

The video VAE works in chunks of 17 frames; a chunk is front-padded to a multiple of 4 and becomes 5 latent frames
(Open-Sora v1.2, `VideoAutoencoderPipeline`). A film is a row of *takes*: a `cut` starts a new take, `continue` stays in
it. A take is rendered in segments; each segment but the first starts with the last `overlap` latent frames before it.
"""

from __future__ import annotations

from dataclasses import dataclass

CHUNK_FRAMES = 17
TIME_STRIDE = 4


def ceil_div(a: int, b: int) -> int:
    """Smallest integer >= a / b."""
    return -(-a // b)


def num_latent_frames(num_frames: int, chunk_frames: int | None = CHUNK_FRAMES, time_stride: int = TIME_STRIDE) -> int:
    """Latent frames of a video of `num_frames` frames: 17 -> 5, 34 -> 10, 1 -> 1, 32 -> 9; None = one single chunk."""
    if num_frames < 1:
        raise ValueError(f"a video needs at least one frame, got {num_frames}")
    if chunk_frames is None:
        return ceil_div(num_frames, time_stride)
    full, rest = divmod(num_frames, chunk_frames)
    return full * ceil_div(chunk_frames, time_stride) + ceil_div(rest, time_stride)


def num_pixel_frames(latent_frames: int, chunk_frames: int = CHUNK_FRAMES, time_stride: int = TIME_STRIDE) -> int:
    """Most video frames that `latent_frames` latent frames hold: 5 -> 17, 10 -> 34, 1 -> 4, 6 -> 21."""
    full, rest = divmod(latent_frames, ceil_div(chunk_frames, time_stride))
    return full * chunk_frames + rest * time_stride


@dataclass(frozen=True, kw_only=True)
class SegmentGrid:
    """How a take is cut: `segment` latent frames a segment, of which `overlap` are carried over from the one before.

    Both count latent frames and are multiples of the latent frames of one VAE chunk, so that every segment starts at a
    chunk border and its new frames decode by themselves. At most half of a segment is carried over: what is carried
    over are new frames of the one segment before.

    Raises:
        ValueError: If the two do not fit the chunks or each other.
    """

    segment: int = 15
    overlap: int = 5
    chunk_frames: int = CHUNK_FRAMES
    time_stride: int = TIME_STRIDE

    def __post_init__(self) -> None:
        chunk = self.chunk_latents
        if self.segment % chunk or self.overlap % chunk or not 0 < 2 * self.overlap <= self.segment:
            raise ValueError(
                f"segment ({self.segment}) and overlap ({self.overlap}) count latent frames: both must be multiples of "
                f"{chunk} (one VAE chunk) with 0 < overlap <= segment / 2; try segment={3 * chunk} overlap={chunk}"
            )

    @property
    def chunk_latents(self) -> int:
        """Latent frames of one VAE chunk (5)."""
        return ceil_div(self.chunk_frames, self.time_stride)

    @property
    def stride(self) -> int:
        """New latent frames of every segment of a take but the first."""
        return self.segment - self.overlap

    @property
    def segment_frames(self) -> int:
        """Video frames of the first segment of a take."""
        return self.segment // self.chunk_latents * self.chunk_frames

    @property
    def stride_frames(self) -> int:
        """New video frames of every later segment of a take."""
        return self.stride // self.chunk_latents * self.chunk_frames

    def take_latents(self, num_segments: int) -> int:
        """Latent frames of a take of `num_segments` segments."""
        return self.segment + (num_segments - 1) * self.stride

    def take_frames(self, num_segments: int) -> int:
        """Video frames of a take of `num_segments` segments."""
        return self.segment_frames + (num_segments - 1) * self.stride_frames

    def segment_slice(self, index: int) -> slice:
        """Latent frames [start, stop) that segment `index` of a take covers, carried-over ones included."""
        start = index * self.stride
        return slice(start, start + self.segment)

    def num_segments_for(self, num_frames: int, *, first: bool) -> int:
        """Segments whose new frames come nearest to `num_frames`; at least one. `first`: they start a take."""
        extra = num_frames - (self.segment_frames if first else 0)
        return max(1, int(first) + max(0, round(extra / self.stride_frames)))


def code_grid(latent_grid: tuple[int, int, int], ratio: tuple[int, int, int]) -> tuple[int, int, int]:
    """Code grid (cT, cH, cW) of a latent grid (T, H, W) under a VQ-VAE ratio (t, h, w), rounded up on every axis."""
    t, h, w = (ceil_div(size, r) for size, r in zip(latent_grid, ratio, strict=True))
    return t, h, w
