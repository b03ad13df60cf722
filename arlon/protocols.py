"""What a sampler may ask of a video model, whichever it is.

A `Backbone` predicts velocities of noisy latents. STDiT3 is the first (`arlon.backbones.stdit3`); others have to offer
the same methods. Everything in `arlon.diffusion` is written against this file.

Dimension key
    B  batch    C T H W  latent grid    L  text tokens    E  width of text features    N  tokens    D  width
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

VelocityFn = Callable[[Tensor, Tensor], Tensor]
"""(x (B, ...), t (B,)) -> d x / d t, like x."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Memory and operations of one call of a network."""

    num_parameters: int
    """Number of parameters and buffers; tied ones count once."""
    flops: int
    """Floating-point operations of matrix products, convolutions and attention; a multiply-add is two."""
    working_bytes: int
    """Most memory of tensors at once, besides weights and inputs."""


@dataclass(frozen=True, kw_only=True)
class BackboneSpec(ABC):
    """Sizes and costs of a backbone, known from its config files before any weight is read."""

    family: str
    """Name under which the family is registered in `arlon.backbones.FAMILIES`."""
    channels: int
    """Latent channels C."""
    patch_size: tuple[int, int, int]
    """Latent frames, rows and columns of one token."""
    width: int
    """Width D of a token."""
    num_injection_points: int
    """Blocks whose self-attention output an injection may change."""
    text_width: int
    """Width E of the text features it reads."""
    max_text_length: int
    """Most text tokens L."""

    @abstractmethod
    def cost(self, size: tuple[int, int, int], *, text_length: int, batch: int = 1, injection: Any = None) -> Cost:
        """Memory and operations of one pass, without weights.

        Args:
            size: Latent frames, rows and columns (T, H, W).
            text_length: Text tokens L, padding included.
            batch: Samples that pass together; 2 with guidance.
            injection: Config of what is injected; designs that run in every pass cost more. None: nothing.
        """


@dataclass(frozen=True, kw_only=True)
class VideoSize:
    """What a backbone is told about the video that a latent stands for."""

    height: float
    """Frame height in pixels."""
    width: float
    """Frame width in pixels."""
    fps: float
    """Frames a second."""


class Backbone(Protocol):
    """A video diffusion model with its text conditioning."""

    @property
    def spec(self) -> BackboneSpec:
        """Latent and conditioning sizes of the backbone."""
        ...

    def null_text(self, length: int) -> Tensor:
        """Text features (length, E) that stand for "no prompt", for the unconditional half of guidance."""
        ...

    def prepare_text(self, tokens: Tensor, mask: Tensor | None) -> Any:
        """Do what does not depend on latent and time once.

        Args:
            tokens: Text features, (B, L, E).
            mask: True = real text token, (B, L). All are real if None.

        Returns:
            What `velocity` takes as `text`.
        """
        ...

    def velocity(
        self, latent: Tensor, t: Tensor, text: Any, *, size: VideoSize, frame_mask: Tensor | None, inject: Any
    ) -> Tensor:
        """Predict d noisy / d t = noise - clean, one sample for each sample of the text.

        Args:
            latent: Noisy latent, (B, C, T, H, W).
            t: Flow times, (B,), 1 = noise.
            text: From `prepare_text`.
            size: Of the video.
            frame_mask: True = noisy frame, False = clean frame that is a condition, (B, T). None: all are noisy.
            inject: What changes the self-attention's output in some blocks, or None; see `arlon.models.injection`.

        Returns:
            (B, C, T, H, W), float32.
        """
        ...

    def times(self, num_steps: int, *, size: VideoSize, num_frames: int) -> Tensor:
        """Flow times (num_steps + 1,) from 1 to 0 that the model is best sampled on."""
        ...
