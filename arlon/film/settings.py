"""How a film is computed and stored, beyond what its storyboard says."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from arlon.models.code_sampling import SamplingConfig

MAX_THREADS = 512
"""More threads than any machine has cores for; far more bring PyTorch down."""
X264_PRESETS = (
    *("ultrafast", "superfast", "veryfast", "faster", "fast"),
    *("medium", "slow", "slower", "veryslow", "placebo"),
)
NEWER_SETTINGS = ("vae_blend_frames", "vae_tile", "vae_micro_batch", "text_dtype")
"""Settings that the first films did not have."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a film is computed and stored, beyond what the storyboard says."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the networks; bfloat16 runs them under autocast."""
    num_threads: int = 1
    """Threads of PyTorch; the last bits of a film depend on it."""
    device: str = "cpu"
    """Where the networks run."""
    ar_temperature: float = 1.0
    """Of the code model; 0 takes the most likely code."""
    ar_top_p: float = 0.95
    """Share of probability that codes are drawn from."""
    ar_guidance_scale: float = 3.0
    """Text guidance of the code model; 1 turns it off."""
    crf: int = 16
    """Constant rate factor of the film, 0 (best) to 51."""
    preset: str = "medium"
    """x264 preset of the film."""
    vae_blend_frames: int = 0
    """Frames on each side of a border between two chunks of the VAE, or two segments, that are blended; 0: none, as in
    Open-Sora."""
    vae_tile: int | None = None
    """Side in pixels of the tiles that the VAE works on, where frames do not fit into memory; None: whole frames.

    Smaller than the frames that the VAE was trained on, they spoil the picture: group norms see one tile at a time.
    """
    vae_micro_batch: int | None = None
    """Frames that go through the per-frame VAE together; 1 takes the least memory. None: the model's own."""
    text_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the text encoder's weights; bfloat16 halves its memory, and changes features a little."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_threads <= MAX_THREADS:
            raise ValueError(f"num_threads must be between 1 and {MAX_THREADS}, got {self.num_threads}")
        if not 0 <= self.crf <= 51:
            raise ValueError(f"crf must be between 0 and 51, got {self.crf}")
        if self.vae_blend_frames < 0:
            raise ValueError(f"vae_blend_frames must be 0 or more, got {self.vae_blend_frames}")
        if self.vae_micro_batch is not None and self.vae_micro_batch < 1:
            raise ValueError(f"vae_micro_batch must be 1 frame or more, got {self.vae_micro_batch}")
        if self.preset not in X264_PRESETS:
            raise ValueError(f"preset must be one of {', '.join(X264_PRESETS)}, got {self.preset!r}")
        for name in ("ar_temperature", "ar_top_p", "ar_guidance_scale"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number, got {getattr(self, name)}")
        SamplingConfig(temperature=self.ar_temperature, top_p=self.ar_top_p, guidance_scale=self.ar_guidance_scale)

    def to_plain(self) -> dict[str, Any]:
        """Plain values for JSON; what is newer than the first films is told where it is not at its default."""
        newer = self.newer()
        return {name: value for name, value in asdict(self).items() if name in newer or name not in NEWER_SETTINGS}

    def newer(self) -> dict[str, Any]:
        """Settings that the first films did not have, where they are not at their default."""
        chosen = {name: getattr(self, name) for name in NEWER_SETTINGS}
        return {name: value for name, value in chosen.items() if value != getattr(Settings, name)}
