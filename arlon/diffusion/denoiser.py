"""The velocity of a film segment under everything that steers it.

    v(x, t) = lerp(v_old, v_new, share)       between two prompts, share by latent frame, while a switch is blended
    v_p     = v_null + g (v_text - v_null)    guidance of each prompt
    inject                                    coarse features of the AR model's codes, in both halves of the guidance
    frame mask                                frames that are given, which the model sees as clean

A `Denoiser` binds these to a backbone; a sampler only sees a function of latent, time and frame mask.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arlon.diffusion.guidance import combine, guided_texts, repeat_rows
from arlon.protocols import Backbone, VideoSize
from arlon.text.encoders import TextFeatures


@dataclass(frozen=True, kw_only=True)
class GuidedPrompt:
    """A text to move towards, and one to move away from."""

    text: TextFeatures
    """Features of the prompt, one sample."""
    guidance_scale: float
    """g; 1 turns guidance off, for half the work."""
    negative: TextFeatures | None = None
    """Features of the negative prompt; None: the backbone's null text."""


class Denoiser:
    """Velocity of one segment; texts are prepared once, when it is built.

    Args:
        backbone: The model.
        prompt: Prompt of the segment.
        size: Of its video.
        inject: What is injected into the backbone's blocks; None: nothing.
        old_prompt: Prompt before, while a switch is blended; None: there is one prompt only.
        new_share: Share of the new prompt in each latent frame, (T,), in [0, 1]; needed with an old prompt.
        precision: Makes the context that networks run in, such as autocast.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompt: GuidedPrompt,
        *,
        size: VideoSize,
        inject: Any = None,
        old_prompt: GuidedPrompt | None = None,
        new_share: Tensor | None = None,
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        if (old_prompt is None) != (new_share is None):
            raise ValueError("a blend needs both the old prompt and the share of the new one in each latent frame")
        self.backbone, self.size, self.inject, self.precision = backbone, size, inject, precision
        self._prompt, self._text = prompt, self._prepare(prompt)
        self._old_prompt, self._old_text = old_prompt, None if old_prompt is None else self._prepare(old_prompt)
        self._new_share = None if new_share is None else new_share[:, None, None]  # broadcasts over (B, C, T, H, W)

    def __call__(self, x: Tensor, t: Tensor, frame_mask: Tensor) -> Tensor:
        """Velocity d x / d t.

        Args:
            x: Noisy latent, (1, C, T, H, W).
            t: Flow time, (1,).
            frame_mask: True = noisy frame, (1, T).

        Returns:
            (1, C, T, H, W).
        """
        velocity = self._guided(self._prompt, self._text, x, t, frame_mask)
        if self._old_prompt is None or self._new_share is None:
            return velocity
        old = self._guided(self._old_prompt, self._old_text, x, t, frame_mask)
        return torch.lerp(old.float(), velocity.float(), self._new_share)

    def _prepare(self, prompt: GuidedPrompt) -> Any:
        text, negative = prompt.text, prompt.negative
        null = self.backbone.null_text(text.tokens.shape[1]) if negative is None else negative.tokens
        tokens, mask = guided_texts(
            text.tokens,
            null,
            guidance_scale=prompt.guidance_scale,
            text_mask=text.mask,
            null_mask=None if negative is None else negative.mask,
        )
        with self.precision():
            return self.backbone.prepare_text(tokens, mask)

    def _guided(self, prompt: GuidedPrompt, text: Any, x: Tensor, t: Tensor, frame_mask: Tensor) -> Tensor:
        """Velocity under one prompt."""
        halves = 1 if prompt.guidance_scale == 1 else 2
        x, t, frame_mask = (repeat_rows(value, 1, halves) for value in (x, t, frame_mask))
        with self.precision():
            both = self.backbone.velocity(x, t, text, size=self.size, frame_mask=frame_mask, inject=self.inject)
        return combine(both, prompt.guidance_scale)
