"""Classifier-free guidance: v = v_null + g (v_cond - v_null), both halves in one batch.

Source: arXiv:2207.12598, eq. 6, for velocities as in Open-Sora v1.2; the conditional half comes first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from arlon.diffusion.samplers import VelocityFn


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
    Weights must not change between calls: without gradients, the text is prepared at the first of them.

    Args:
        model: Called as model(latent, t, text, text_mask=..., **conditions) -> velocity, such as an STDiT3. If it has
            `prepare_text`, it gets what that makes of text and mask in their place.
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
    if guidance_scale == 1:
        return _bind_text(model, text, text_mask, conditions)
    if null_text.shape[-2:] != text.shape[-2:]:
        raise ValueError(
            f"text and null text must agree in (L, E), got {tuple(text.shape[-2:])} and "
            f"{tuple(null_text.shape[-2:])}. Pad both to one length."
        )
    batch = text.shape[0]
    both_texts = torch.cat((text, _null_half("null_text", null_text.to(text), text.shape)))
    both_masks = _both_masks(text_mask, null_mask, text)
    doubled = {name: _twice(value, batch) for name, value in conditions.items()}
    both_halves = _bind_text(model, both_texts, both_masks, doubled)

    def velocity_fn(x: Tensor, t: Tensor) -> Tensor:
        conditional, null = both_halves(torch.cat((x, x)), torch.cat((t, t))).chunk(2)
        return null + guidance_scale * (conditional - null)

    return velocity_fn


def _bind_text(
    model: Callable[..., Tensor], text: Tensor, text_mask: Tensor | None, conditions: dict[str, Any]
) -> VelocityFn:
    """The model as a function of x and t; its text is prepared once, but not where it should get gradients."""
    prepare = getattr(model, "prepare_text", None)
    prepared: Any = None

    def velocity_fn(x: Tensor, t: Tensor) -> Tensor:
        nonlocal prepared
        if prepare is None or torch.is_grad_enabled():
            return model(x, t, text, text_mask=text_mask, **conditions)
        if prepared is None:
            prepared = prepare(text, text_mask)  # here and not before: under the autocast of the steps
        return model(x, t, prepared, **conditions)

    return velocity_fn


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
    """What the null half is given, for one sample or for each, as one for each: `shape`, (B, ...)."""
    if value.shape not in {shape, shape[1:], (1, *shape[1:])}:
        rest = tuple(shape[1:])
        expected = f"{rest}, {(1, *rest)} or {tuple(shape)}"
        raise ValueError(
            f"{name} must be for one sample or for each of {shape[0]}: {expected}, got {tuple(value.shape)}"
        )
    return value.expand(shape)


def _twice(value: Any, batch: int) -> Any:
    """A tensor with one row a sample repeated for both halves; anything else unchanged."""
    if isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == batch:
        return torch.cat((value, value))
    return value
