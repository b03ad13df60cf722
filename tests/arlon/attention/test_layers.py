"""Kernels chosen per layer, and attention maps of a running model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from arlon.attention import KERNELS, attention_layers, attention_maps, set_kernel, wrapped_kernels, written_out
from arlon.attention.kernels import sdpa
from arlon.models.ar import CodeTransformer, CodeTransformerConfig
from arlon.models.stdit import STDiT3, STDiT3Config
from tests.closeness import assert_close_to_scale

FRAMES, PLACES, HEADS, TOKENS = 3, 6, 2, 4


@pytest.fixture(scope="module")
def dit() -> STDiT3:
    torch.manual_seed(0)
    config = STDiT3Config(hidden_size=16, depth=2, num_heads=HEADS, caption_channels=5, model_max_length=TOKENS)
    dit = STDiT3(config).eval().requires_grad_(False)
    for parameter in dit.parameters():
        parameter.normal_(std=0.3)
    return dit


def run(dit: STDiT3, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latent, text = (
        torch.randn(batch, 4, FRAMES, 4, 6, generator=generator),
        torch.randn(batch, TOKENS, 5, generator=generator),
    )
    with torch.no_grad():
        return dit(latent, torch.full((batch,), 0.5), text, fps=8.0, height=32.0, width=48.0)


def test_every_attention_of_the_networks_is_a_layer_whose_kernel_can_be_chosen(dit: STDiT3) -> None:
    names = attention_layers(dit)
    assert len(names) == 2 * 2 * 2  # spatial and temporal; self and cross; two blocks
    assert list(attention_layers(dit, "temporal_blocks.1")) == [
        "temporal_blocks.1.attn",
        "temporal_blocks.1.cross_attn",
    ]
    config = CodeTransformerConfig(codebook_size=8, text_dim=4, max_text=3, dim=16, depth=2, num_heads=2, grid=(2, 2))
    assert len(attention_layers(CodeTransformer(config))) == 2


def test_kernels_give_the_same_result_and_are_called_in_the_chosen_layers_only(dit: STDiT3) -> None:
    expected, calls = run(dit), []

    def counted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        calls.append(q.shape)
        return written_out(q, k, v, mask)

    chosen = set_kernel(dit, counted, "spatial_blocks.*.attn")
    try:
        assert_close_to_scale(run(dit), expected)
    finally:
        set_kernel(dit, "auto")
    assert chosen == ["spatial_blocks.0.attn", "spatial_blocks.1.attn"]
    assert calls == [(FRAMES, HEADS, PLACES, 8)] * 2
    assert torch.equal(run(dit), expected)


@pytest.mark.parametrize("mask", [None, "bool", "additive"])
def test_kernels_agree(mask: str | None) -> None:
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    seen = torch.rand(2, 1, 5, 7) > 0.3
    seen[..., 0] = True
    given = {None: None, "bool": seen, "additive": torch.randn(2, 1, 5, 7)}[mask]
    results = [KERNELS[name](q, k, v, given) for name in sorted(KERNELS)]
    for result in results:
        torch.testing.assert_close(result, sdpa(q, k, v, given))


@pytest.mark.parametrize("batch", [1, 2])
def test_attention_maps_are_those_the_model_attends_with(dit: STDiT3, batch: int) -> None:
    expected, values = run(dit, batch), {}

    def keep_values(name: str, kernel: object) -> object:
        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
            values[name] = (v, out := written_out(q, k, v, mask))
            return out

        return attend

    with wrapped_kernels(dit, keep_values), attention_maps(dit) as maps:
        assert_close_to_scale(run(dit, batch), expected)
    assert maps["spatial_blocks.0.attn"][0].shape == (batch * FRAMES, HEADS, PLACES, PLACES)
    assert maps["temporal_blocks.1.attn"][0].shape == (batch * PLACES, HEADS, FRAMES, FRAMES)
    assert maps["temporal_blocks.0.cross_attn"][0].shape == (batch, HEADS, FRAMES * PLACES, TOKENS)
    for name, (weights,) in maps.items():
        assert_close_to_scale(weights.sum(-1), torch.ones(weights.shape[:-1]))
        v, out = values[name]
        again = weights.view(*out.shape[:-1], v.shape[-2]) @ v
        assert_close_to_scale(again, out)
    assert torch.equal(run(dit, batch), expected)  # the old kernels are back


def test_kernels_are_put_back_after_an_error(dit: STDiT3) -> None:
    before = {name: layer.kernel for name, layer in attention_layers(dit).items()}
    with pytest.raises(ZeroDivisionError), attention_maps(dit):
        raise ZeroDivisionError
    assert {name: layer.kernel for name, layer in attention_layers(dit).items()} == before


def test_unknown_names_are_refused(dit: STDiT3) -> None:
    with pytest.raises(ValueError, match=r"attention kernel 'written', did you mean 'written_out'\?"):
        set_kernel(dit, "written")
    with pytest.raises(ValueError, match=r"no attention layer of STDiT3 matches 'blocks\.9'"):
        set_kernel(dit, "sdpa", "blocks.9")
