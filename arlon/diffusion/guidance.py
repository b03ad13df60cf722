"""Classifier-free guidance: v = v_null + g (v_cond - v_null), both halves in one batch.

Source: arXiv:2207.12598, eq. 6, for velocities as in Open-Sora v1.2; the conditional half comes first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from arlon.protocols import VelocityFn


def guide(
    model: Callable[..., Tensor],
    text: Tensor,
    null_text: Tensor,
    *,
    guidance_scale: float,
    text_mask: Tensor | None = None,
    null_mask: Tensor | None = None,
    **conditions: Any,
) -> VelocityFn:
    """Bind a model to its conditions and guide it.

    Only the text differs between the halves: every other condition, injected features included, is in both.

    Args:
        model: Called as model(latent, t, text, text_mask=..., **conditions) -> velocity, such as an STDiT3.
        text: Text features of the prompts, (B, L, E).
        null_text: Features to move away from, (L, E), (1, L, E) or (B, L, E): `STDiT3.null_text` or a negative prompt.
        guidance_scale: g. 1 is the conditional velocity itself, for half the work.
        text_mask: True = real text token, (B, L).
        null_mask: The same for `null_text`, (L,), (1, L) or (B, L). That of the prompts if None: released models
            expect it.
        **conditions: Further arguments of the model. Tensors with B rows are given twice, all else as it is.

    Returns:
        velocity_fn(x (B, ...), t (B,)) -> (B, ...), for `samplers.sample`.

    Raises:
        ValueError: If the two texts have not the same length and width, or a mask does not fit them.
    """
    texts, masks = guided_texts(
        text, null_text, guidance_scale=guidance_scale, text_mask=text_mask, null_mask=null_mask
    )
    halves = texts.shape[0] // text.shape[0]
    repeated = {name: repeat_rows(value, text.shape[0], halves) for name, value in conditions.items()}

    def velocity_fn(x: Tensor, t: Tensor) -> Tensor:
        both = model(_repeat(x, halves), _repeat(t, halves), texts, text_mask=masks, **repeated)
        return combine(both, guidance_scale)

    return velocity_fn


def guided_texts(
    text: Tensor,
    null_text: Tensor,
    *,
    guidance_scale: float,
    text_mask: Tensor | None = None,
    null_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Texts that one guided velocity needs, and their masks; arguments and errors as of `guide`.

    Returns:
        Text features (k B, L, E) and masks (k B, L) or None: k = 2, prompts before null texts; k = 1 without guidance.
    """
    if guidance_scale == 1:
        return text, text_mask
    if null_text.shape[-2:] != text.shape[-2:]:
        raise ValueError(
            f"text and null text must agree in (L, E), got {tuple(text.shape[-2:])} and "
            f"{tuple(null_text.shape[-2:])}. Pad both to one length."
        )
    texts = torch.cat((text, _null_half("null_text", null_text.to(text), text.shape)))
    return texts, _both_masks(text_mask, null_mask, text)


def combine(velocities: Tensor, guidance_scale: float) -> Tensor:
    """Guided velocity (B, ...) from those of `guided_texts`, (k B, ...)."""
    if guidance_scale == 1:
        return velocities
    conditional, null = velocities.chunk(2)
    return null + guidance_scale * (conditional - null)


def _repeat(value: Tensor, halves: int) -> Tensor:
    """A tensor (B, ...) for every half of the batch, (k B, ...)."""
    return value if halves == 1 else torch.cat((value,) * halves)


def repeat_rows(value: Any, batch: int, halves: int) -> Any:
    """A tensor with one row for each of `batch` samples, for every half; anything else unchanged."""
    if isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == batch:
        return _repeat(value, halves)
    return value


def _both_masks(text_mask: Tensor | None, null_mask: Tensor | None, text: Tensor) -> Tensor | None:
    """Masks (2 B, L) of [conditional; null]; None if neither half has one."""
    if text_mask is None and null_mask is None:
        return None
    if text_mask is None:
        text_mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
    if text_mask.shape != text.shape[:2]:
        raise ValueError(f"text_mask must be (B, L) = {tuple(text.shape[:2])}, got {tuple(text_mask.shape)}")
    null_mask = text_mask if null_mask is None else _null_half("null_mask", null_mask.to(text.device), text_mask.shape)
    return torch.cat((text_mask, null_mask))


def _null_half(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    """Expand an unconditional input, given once or for each sample, to one per sample: `shape`, (B, ...)."""
    if value.shape not in {shape, shape[1:], (1, *shape[1:])}:
        rest = tuple(shape[1:])
        expected = f"{rest}, {(1, *rest)} or {tuple(shape)}"
        raise ValueError(
            f"{name} must be for one sample or for each of {shape[0]}: {expected}, got {tuple(value.shape)}"
        )
    return value.expand(shape)
