"""Settings of a film: everything beyond its storyboard that decides how it is computed and stored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from arlon.models.code_sampling import SamplingConfig

MAX_THREADS = 512
"""Highest number of threads allowed: more than any machine has cores for; far more bring PyTorch down."""
X264_PRESETS = (
    *("ultrafast", "superfast", "veryfast", "faster", "fast"),
    *("medium", "slow", "slower", "veryslow", "placebo"),
)
NEWER_SETTINGS: Mapping[str, Any] = {
    "vae_blend_frames": 0,
    "vae_tile": None,
    "vae_micro_batch": None,
    "text_dtype": "float32",
    "x264_cpu_independent": False,
}
"""Settings added after the first version, and the value that a record stands for if it does not name them.

That value never changes, though the default of a setting may: a record says what its film was made with.
"""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides how a film is computed and stored, beyond its storyboard."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the networks; bfloat16 runs them under autocast."""
    num_threads: int = 1
    """Number of threads of PyTorch; the last bits of a film depend on it."""
    device: str = "cpu"
    """PyTorch device that the networks run on."""
    ar_temperature: float = 1.0
    """Sampling temperature of the code transformer; 0 takes the most likely code."""
    ar_top_p: float = 0.95
    """Share of the probability, from the most likely code down, among which the code transformer draws."""
    ar_guidance_scale: float = 3.0
    """Scale of the text guidance of the code transformer; 1 turns it off."""
    crf: int = 16
    """Constant rate factor of x264: 0 is the best picture, 51 the smallest file."""
    preset: str = "medium"
    """Preset of x264, one of `X264_PRESETS`."""
    vae_blend_frames: int = 0
    """Number of frames that are blended on each side of a border between two chunks of the VAE or two segments; 0, as
    in Open-Sora, blends none."""
    vae_tile: int | None = None
    """Side in pixels of the tiles that the VAE decodes one by one if frames do not fit into memory; None: whole frames.

    Smaller than the frames that the VAE was trained on, they spoil the picture: group norms see one tile at a time.
    """
    vae_micro_batch: int | None = None
    """Number of frames that the per-frame VAE decodes together; 1 takes the least memory. None: as the model says."""
    text_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the text encoder's weights; bfloat16 halves its memory, and changes features a little."""
    x264_cpu_independent: bool = True
    """Let x264 plan its bit rate with code that gives the same bytes on every processor.

    False is what the first version did: code for the processor at hand, which on one with AVX-512 reads memory that was
    never written, so that the same frames may give other bytes; see `arlon.data.video_io.REPEATABLE`.
    """

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

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Self:
        """Settings from what `to_plain` returned, in this version or an earlier one.

        Raises:
            ConfigError: If a name is unknown or a value has the wrong type.
            ValueError: If a value is out of range.
        """
        from arlon.config import config_from_dict

        return config_from_dict(cls, {**NEWER_SETTINGS, **values})

    def to_plain(self) -> dict[str, Any]:
        """Plain values for JSON; settings added after the first version only if they differ from what that did."""
        values = asdict(self)
        as_before = {name for name, value in NEWER_SETTINGS.items() if values[name] == value}
        return {name: value for name, value in values.items() if name not in as_before}
