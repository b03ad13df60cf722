"""Messages between the steps of making a film: one request and one result for each step.

    TextRequest -> CodeRequest -> RefineRequest -> DecodeRequest -> WriteRequest

A request says in plain values what to do. Its last fields, None at first, take the results of earlier steps. So all
requests of a film are known before anything is computed (`arlon.film.schedule.film_requests`). An executor puts the
results in with `dataclasses.replace`: results themselves in one process, or references to them with Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from arlon.film.appearance import Drift
from arlon.film.plan import Plan, Segment, Take
from arlon.film.prompt_schedule import Blend, PromptSchedule
from arlon.film.settings import Settings
from arlon.film.take_media import TakeMedia
from arlon.text.encoders import TextFeatures

MAX_KNOWN_PROMPTS = 64
"""Most prompts whose features are kept: a film may have thousands, and the features of one can take megabytes."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What film to make, with which model: all that the workers of a film need to start."""

    plan: Plan
    settings: Settings
    model_path: str
    model_hash: str

    def component(self, name: str) -> Path:
        """Folder of a component of the model."""
        return Path(self.model_path) / name


@dataclass(frozen=True, kw_only=True)
class Committed:
    """Parts of a film that exist already and are not made again."""

    codes: Mapping[int, Tensor] = field(default_factory=dict)
    """First code frames (1, n, cH, cW) int64, by take; all code frames of the take, or some."""
    segments: frozenset[int] = frozenset()
    """Indices of the committed segments; their codes are among `codes`."""
    media: Mapping[int, TakeMedia] = field(default_factory=dict)
    """Encoded pictures and videos that the film is given, by shot."""


@dataclass(frozen=True, kw_only=True)
class TextRequest:
    """Encode prompts."""

    prompts: tuple[str, ...]
    """Each once."""


@dataclass(frozen=True, kw_only=True)
class TextResult:
    """Features of prompts, on the CPU."""

    features: dict[str, TextFeatures]
    """Features of each prompt."""


@dataclass(frozen=True, kw_only=True)
class CodeRequest:
    """Write the codes of a take up to `stop`."""

    take: int
    schedule: PromptSchedule
    start: int
    """Code frames that the segment before needed; 0 for the first segment of the take."""
    stop: int
    """Code frames that the take must have afterwards."""
    text: TextResult | None = None
    before: CodeResult | None = None
    """Codes written so far, `start` frames or more; None at the start of a take."""
    given: Tensor | None = None
    """Code frames (1, n, cH, cW) int64 of the media that the take begins with, if any."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """Prompts whose features `text` must hold: those in force from `start` to `stop`."""
        return self.schedule.prompts(self.start, self.stop)

    def seed_of(self, frame: int) -> int:
        """Seed of a code frame."""
        return self.schedule.at(frame).seed


@dataclass(frozen=True, kw_only=True)
class CodeResult:
    """The first code frames of a take."""

    codes: Tensor
    """(1, n, cH, cW) int64."""
    elapsed_s: float
    memory_bytes: int = 0
    """Memory of the process afterwards; 0 if not measured."""
    ended_s: float = 0.0
    """Clock time at the end of the step, seconds since 1970; 0 if not measured."""


@dataclass(frozen=True, kw_only=True)
class RefineRequest:
    """Make the latent of one segment."""

    segment: Segment
    take: Take
    prompt: str
    negative_prompt: str
    """Prompt that guidance moves away from; if empty, the null caption."""
    seed: int
    guidance_scale: float
    num_inference_steps: int
    solver: str
    fps: float
    height: int
    """Height in pixels of a frame as it is computed."""
    width: int
    """Width in pixels of a frame as it is computed."""
    blend: Blend | None = None
    """None if the segment has one prompt."""
    head: Tensor | None = None
    """Latent frames (1, C, n, H, W) of the media that the take begins with, in its first segment; None without any."""
    tail: Tensor | None = None
    """Latent frames (1, C, n, H, W) of the media that the segment ends on; None without any."""
    placed: tuple[Tensor, Tensor] | None = None
    """Latent (1, C, T, H, W) of what a mask strategy places in the segment, and its edit ratio (1, T)."""
    text: TextResult | None = None
    codes: CodeResult | None = None
    before: RefineResult | None = None
    """The segment before in the take; None for the first."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """Prompts whose features `text` must hold."""
        old = () if self.blend is None else (self.blend.prompt,)
        negative = (self.negative_prompt,) if self.negative_prompt else ()
        return (self.prompt, *old, *negative)


@dataclass(frozen=True, kw_only=True)
class RefineResult:
    """The new latent frames of a segment."""

    latent: Tensor
    """(1, C, n, H, W) float32, on the CPU."""
    overlap_hash: str | None
    """SHA-256 of the latent frames carried over; None if there were none."""
    codes_hash: str
    """SHA-256 of the codes used."""
    elapsed_s: float
    memory_bytes: int = 0
    """Memory of the process afterwards; 0 if not measured."""
    ended_s: float = 0.0
    """Clock time at the end of the step, seconds since 1970; 0 if not measured."""

    @classmethod
    def from_disk(cls, latent: Tensor) -> RefineResult:
        """Result of a segment that was made earlier, with all that the segment after it needs: the stored latent."""
        return cls(latent=latent, overlap_hash=None, codes_hash="", elapsed_s=0.0)


@dataclass(frozen=True, kw_only=True)
class DecodeRequest:
    """Turn the new latent frames of a segment into video frames."""

    num_frames: int
    """Frames that the new latent frames hold."""
    lead: int = 0
    """Frames before them that the segment before left out, so that both sides of the border can be blended."""
    held: int = 0
    """Last frames that are left to the segment after."""
    size: tuple[int, int] | None = None
    """Height and width of the frames after cropping to the centre; None keeps the decoded size."""
    refined: RefineResult | None = None
    before: RefineResult | None = None
    """The segment before in the take; needed if there is a `lead`."""


@dataclass(frozen=True, kw_only=True)
class DecodeResult:
    """Video frames of a segment."""

    frames: np.ndarray
    """(pT, pH, pW, 3) uint8."""
    elapsed_s: float
    memory_bytes: int = 0
    """Memory of the process afterwards; 0 if not measured."""
    ended_s: float = 0.0
    """Clock time at the end of the step, seconds since 1970; 0 if not measured."""


@dataclass(frozen=True, kw_only=True)
class SegmentInputs:
    """Everything that decides the bits of a segment and is known before it is made; tensors by their SHA-256.

    It is the provenance of a segment: `segment.json` stores it, and a stored segment is used again only if its values
    are still the same. The hashes of the codes and of the latent frames carried over join them when they exist.

    A field with a default is not stored while it has that default. The default is what the first version did, even if
    that of the setting is another today. So segments made before the field existed still match; a new one needs one.
    """

    blend: Blend | None = None
    vae_blend_frames: int = 0
    vae_tile: int | None = None
    vae_micro_batch: int | None = None
    text_dtype: str = "float32"
    x264_cpu_independent: bool = False
    cut_to: tuple[int, int] | None = None
    """Height and width that frames are cropped to, if they are computed larger."""
    lead: int = 0
    held: int = 0
    model: str
    """Content hash of the model."""
    take: int
    index_in_take: int
    start_latent: int
    num_latents: int
    num_frames: int
    prompt: str
    negative_prompt: str
    seed: int
    guidance_scale: float
    num_inference_steps: int
    solver: str
    fps: float
    height: int
    width: int
    dtype: str
    num_threads: int
    device: str
    crf: int
    preset: str
    head: str | None = None
    """Hash of the latent frames of the media that the take begins with."""
    tail: str | None = None
    """Hash of the latent frames of the media that the segment ends on."""
    placed: tuple[str, str] | None = None
    """Hashes of the latent and of the edit ratio of what a mask strategy places in the segment."""

    def to_plain(self) -> dict[str, Any]:
        """Plain values for JSON, in the order of the fields."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return {name: _plain_value(value) for name, value in values.items()}


def _plain_value(value: Any) -> Any:
    """A value as JSON reads it back: dataclasses as mappings, tuples as lists."""
    if isinstance(value, Blend):
        return {name: _plain_value(part) for name, part in asdict(value).items()}
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True, kw_only=True)
class WriteRequest:
    """Store a segment and add it to the film."""

    segment: Segment
    inputs: SegmentInputs
    codes: CodeResult | None = None
    refined: RefineResult | None = None
    decoded: DecodeResult | None = None


@dataclass(frozen=True, kw_only=True)
class WriteResult:
    """A segment is stored."""

    segment: Segment
    fragment_hash: str
    """SHA-256 of the encoded frames."""
    latent_hash: str
    """SHA-256 of the file with its latents."""
    elapsed_s: dict[str, float]
    """Seconds of every step: code, refine, decode, write."""
    drift: Drift
    """Difference from the first segment of the same shot."""


@dataclass(frozen=True, kw_only=True)
class SegmentRequests:
    """The requests of one segment, without results."""

    segment: Segment
    code: CodeRequest
    refine: RefineRequest
    decode: DecodeRequest
    write: WriteRequest
