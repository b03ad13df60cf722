"""Comparison of tensors whose tolerance follows the scale of what is compared."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_close_to_scale(actual: Tensor, expected: Tensor, relative: float = 1e-5, name: str = "tensors") -> None:
    """Fail unless max |actual - expected| <= relative * max |expected|.

    Sums in float32 are off by a share of their largest terms, and by how much depends on the order in which a processor
    adds them; a small value beside large ones may be off by the same amount as its neighbours. So one bound holds for
    the whole tensor: it follows the tensor's largest value and not each single one.

    Args:
        actual: What the code under test gave.
        expected: What it should be; shape and dtype must be the same as those of `actual`.
        relative: Largest error allowed, as a share of the largest absolute value of `expected`.
        name: What is compared, for the message.
    """
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype}, expected {expected.dtype}"
    if not expected.numel():
        return
    error = (actual.detach().double() - expected.detach().double()).abs()
    scale, largest = float(expected.detach().double().abs().max()), float(error.max())
    if not largest <= relative * scale:  # also for NaN, which compares as False
        place = tuple(int(i) for i in torch.unravel_index(error.nan_to_num(torch.inf).argmax(), error.shape))
        raise AssertionError(
            f"{name}: largest error {largest:.3g} at {place} ({float(actual[place]):.6g}, expected "
            f"{float(expected[place]):.6g}) is {largest / scale if scale else torch.inf:.2g} of the largest value "
            f"{scale:.6g}; allowed is {relative:.2g} of it"
        )
