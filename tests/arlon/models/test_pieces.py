"""Without gradients blocks run piece by piece, with other kernels: the same numbers as with gradients, in one piece."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from arlon.attention import automatic
from arlon.models import chunking, layers
from arlon.models.chunking import plan_pieces, run_block
from arlon.models.layers import RotaryTime, STDiT3Block, TextTokens, gelu_
from tests.closeness import assert_close_to_scale

B, FRAMES, PLACES, DIM = 2, 5, 7, 16


def make_block(temporal: bool) -> STDiT3Block:
    torch.manual_seed(0)
    block = STDiT3Block(DIM, 2, temporal=temporal).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return block


def make_inputs(temporal: bool, time_rows: int, masked: bool) -> dict[str, Any]:
    torch.manual_seed(1)
    mask = torch.tensor([[True, True, False], [False, False, False]]) if masked else None
    return {
        "x": torch.randn(B, FRAMES, PLACES, DIM),
        "time": torch.randn(B, time_rows, 6, DIM),
        "text": TextTokens(torch.randn(B, 3, DIM), mask),
        "rotation": RotaryTime(DIM // 2)(FRAMES).detach() if temporal else None,
    }


def small_pieces(monkeypatch: pytest.MonkeyPatch, rows: int, temporal: bool) -> None:
    monkeypatch.setattr(chunking, "CHUNK_VALUES", rows * DIM * (FRAMES if temporal else PLACES))
    monkeypatch.setattr(layers, "SHORT", 0)
    monkeypatch.setattr(layers, "GELU_VALUES", 50)


@pytest.mark.parametrize("temporal", [False, True])
@pytest.mark.parametrize("time_rows", [1, FRAMES])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_pieces_give_what_one_piece_gives(
    temporal: bool, time_rows: int, masked: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, inputs = make_block(temporal), make_inputs(temporal, time_rows, masked)
    before = {name: value.clone() for name, value in inputs.items() if isinstance(value, Tensor)}
    expected = block(**inputs)
    small_pieces(monkeypatch, rows, temporal)
    with torch.no_grad():
        pieces = plan_pieces(inputs["x"], temporal=temporal)
        got = run_block(block, **inputs)
    if rows == 100:
        assert len(pieces) == 1
    else:
        assert len(pieces) == B * -(-(PLACES if temporal else FRAMES) // rows)
    assert_close_to_scale(got, expected.detach())
    assert all(torch.equal(value, before[name]) for name, value in inputs.items() if name in before)


def test_an_injection_sees_whole_tokens_and_the_identity_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    block, inputs = make_block(temporal=True), make_inputs(True, 1, masked=False)
    with_gradients = []
    block(**inputs, inject=lambda y: with_gradients.append(y.detach()) or y)
    small_pieces(monkeypatch, 2, temporal=True)
    seen = []
    with torch.no_grad():
        plain = run_block(block, **inputs)
        same = run_block(block, **inputs, inject=lambda y: seen.append(y) or y)
        other = run_block(block, **inputs, inject=lambda y: y + torch.eye(FRAMES * PLACES)[:, 8:9])  # frame 1, place 1
    assert len(seen) == 1
    assert_close_to_scale(seen[0], with_gradients[0])
    assert torch.equal(same, plain)
    changed = (other - plain).abs().amax(dim=(0, 3))
    assert changed[1, 1] > 0.01
    assert (changed > 0).sum() == 1


def test_gradients_keep_everything_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    small_pieces(monkeypatch, 1, temporal=False)
    block, inputs = make_block(temporal=False), make_inputs(False, 1, masked=False)
    assert len(plan_pieces(inputs["x"], temporal=False)) == 1
    assert len(plan_pieces(inputs["x"].to("meta"), temporal=False)) == 1
    run_block(block, **inputs).square().sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())


@pytest.mark.parametrize("place", ["block", "attn", "kernel"])
def test_hooks_and_chosen_kernels_see_all_tokens(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_pieces(monkeypatch, 1, temporal=True)
    block, inputs, seen = make_block(temporal=True), make_inputs(True, 1, masked=False), []
    if place == "kernel":
        block.attn.kernel = lambda q, k, v, mask: seen.append(q.numel()) or automatic(q, k, v, mask)
    else:
        module = block if place == "block" else block.attn
        module.register_forward_hook(lambda module, args, out: seen.append(out.numel()))
    with torch.no_grad():
        run_block(block, **inputs)
    assert seen == [inputs["x"].numel()]


def test_gelu_is_the_formula_up_to_its_ends() -> None:
    x = torch.cat((torch.linspace(-12, 12, layers.SHORT + 1001), torch.tensor([-1e30, 1e30, -0.0, torch.inf])))
    exact = x.double()
    exact = exact / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (exact + 0.044715 * exact**3)))
    got = gelu_(x.clone())
    torch.testing.assert_close(got.double(), exact, rtol=2**-23, atol=1e-6)
    below = x.clone()
    assert gelu_(below) is below


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gelu_of_other_precisions_is_that_of_pytorch(dtype: torch.dtype) -> None:
    x = torch.linspace(-5, 5, layers.SHORT + 1, dtype=dtype)
    expected = torch.nn.functional.gelu(x, approximate="tanh")
    assert torch.equal(gelu_(x), expected)
