"""The comparison other tests rest on: its bound follows the scale, and neither NaN nor another form passes."""

from __future__ import annotations

import pytest
import torch

from tests.closeness import assert_close_to_scale

EXPECTED = torch.tensor([[1e-3, -2.0], [40.0, 0.0]])


def test_errors_are_measured_against_the_largest_value() -> None:
    error = torch.zeros(2, 2)
    error[1, 1] = 39e-5  # beside a value of 0, but below 1e-5 of 40
    assert_close_to_scale(EXPECTED + error, EXPECTED)
    with pytest.raises(AssertionError, match=r"\(1, 1\)"):
        assert_close_to_scale(EXPECTED + 1.1 * error, EXPECTED)
    assert_close_to_scale(EXPECTED + 1.1 * error, EXPECTED, relative=2e-5)


@pytest.mark.parametrize(
    "actual",
    [
        torch.full((2, 2), torch.nan),
        EXPECTED.double(),
        EXPECTED[:1],
        torch.where(EXPECTED > 30, torch.inf, EXPECTED),
    ],
    ids=["NaN", "dtype", "shape", "infinity"],
)
def test_other_values_or_forms_fail(actual: torch.Tensor) -> None:
    with pytest.raises(AssertionError):
        assert_close_to_scale(actual, EXPECTED)


def test_zeros_are_compared_exactly_and_nothing_with_nothing() -> None:
    assert_close_to_scale(torch.zeros(3), torch.zeros(3))
    assert_close_to_scale(torch.zeros(0, 2), torch.zeros(0, 2))
    with pytest.raises(AssertionError):
        assert_close_to_scale(torch.tensor([1e-30]), torch.zeros(1))
