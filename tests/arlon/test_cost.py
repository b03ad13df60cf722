"""Costs are held against formulas, against PyTorch's own counter, and against a run with real tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from arlon import cost
from arlon.models.ar import CodeTransformer, CodeTransformerConfig
from arlon.models.injection import InjectionConfig, SemanticInjection
from arlon.models.stdit import STDiT3, STDiT3Config
from arlon.models.video_vae import SpatialVAEConfig, TemporalVAEConfig, VideoVAE, VideoVAEConfig
from arlon.models.vqvae import LatentVQVAE, LatentVQVAEConfig
from arlon.text.encoders import TextEncoderConfig

DIT = STDiT3Config(hidden_size=32, depth=4, num_heads=2, caption_channels=24, model_max_length=7)
AR = CodeTransformerConfig(
    codebook_size=16, text_dim=24, max_text=7, dim=16, depth=3, num_heads=2, grid=(2, 3), max_code_frames=6
)
VAE = VideoVAEConfig(
    spatial=SpatialVAEConfig(layers_per_block=1, block_out_channels=(4, 4, 8, 8), norm_num_groups=2),
    temporal=TemporalVAEConfig(filters=4, num_res_blocks=1, channel_multipliers=(1, 1, 1, 1), num_groups=2),
)


def on_meta(kind: type, config: Any) -> Any:
    with torch.device("meta"):
        return kind(config).eval().requires_grad_(False)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


def counted(run: Callable[[], Any]) -> int:
    """By PyTorch's counter, on the meta device: it does not know the fused attention of CPUs."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in model.buffers())


def test_memory_is_the_most_that_is_alive_at_once() -> None:
    """Views take nothing, what goes out of use is given back, and inputs are not counted."""
    given = torch.empty(1000, device="meta")

    def run() -> torch.Tensor:
        a = given + 1  # 4000 bytes
        b = a.view(10, 100).t()
        c = torch.cat((b, b))  # 8000 more: 12000
        del a, b, c
        return (given * 2).to(torch.float64)  # 4000 + 8000

    assert cost.measure(run).working_bytes == 12_000


def test_the_dense_part_of_the_dit_is_the_known_formula() -> None:
    """2 (14 D^2 2 depth) a token for mlp_ratio 4, and what every token shares: text, times, first and last layer."""
    size, length, batch = (3, 4, 6), 7, 2
    d, depth, tokens, frames = DIT.hidden_size, DIT.depth, 3 * 2 * 3, 3
    dense = 2 * tokens * 14 * d * d * 2 * depth  # qkv 3, proj 1, q_linear 1, proj 1, mlp 8
    text = 2 * length * (2 * d * d) * 2 * depth + 2 * length * (24 * d + d * d)
    attention = 4 * tokens * d * depth * (tokens // frames + frames + 2 * length)
    edges = 2 * tokens * (4 * 4 * d + d * 4 * 8)
    times = 3 * 2 * (256 * d + d * d) + 2 * 2 * 6 * d * d
    expected = batch * (dense + text + attention + edges + times)
    assert cost.dit_cost(DIT, size, text_length=length, batch=batch).flops == expected


def test_the_dit_costs_what_a_run_of_the_whole_model_counts() -> None:
    """All blocks at once; the memory is that of real tensors."""
    found = cost.dit_cost(DIT, (3, 4, 6), text_length=7, batch=2)

    def run(device: str) -> Callable[[], torch.Tensor]:
        with torch.device(device):
            dit = STDiT3(DIT).eval().requires_grad_(False)
            inputs = {"latent": torch.rand(2, 4, 3, 4, 6), "t": torch.rand(2), "text": torch.rand(2, 7, 24)}
            masks = {"text_mask": torch.ones(2, 7, dtype=torch.bool), "frame_mask": torch.ones(2, 3, dtype=torch.bool)}
        assert found.num_parameters == num_parameters(dit)
        return lambda: dit(**inputs, **masks, fps=24.0, height=1.0, width=1.0)

    assert found.flops == counted(run("meta"))
    assert found.working_bytes == pytest.approx(cost.measure(run("cpu")).working_bytes, rel=0.02)


def test_precision_halves_weights_and_not_quite_the_memory() -> None:
    full = cost.dit_cost(DIT, (3, 4, 6), text_length=7)
    half = cost.dit_cost(DIT, (3, 4, 6), text_length=7, dtype=torch.bfloat16)
    assert half.flops == full.flops
    assert 0.45 < half.working_bytes / full.working_bytes < 0.95


def test_a_size_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"text_length": 5, "batch": 1}
    found = [cost.dit_cost(DIT, (2, 2, 2), **sizes), cost.ar_read_cost(AR, text_length=5)]
    monkeypatch.setattr(cost, "measure", None)
    assert found == [cost.dit_cost(replace(DIT), (2, 2, 2), **sizes), cost.ar_read_cost(replace(AR), text_length=5)]
    with pytest.raises(TypeError):
        cost.dit_cost(DIT, (2, 2, 4), **sizes)


def test_the_injection_keeps_its_modulations() -> None:
    config = InjectionConfig(dim=32, num_blocks=5)
    found = cost.injection_cost(config, (3, 4, 6))
    model = on_meta(SemanticInjection, config)
    assert found.num_parameters == num_parameters(model)
    assert found.flops == counted(lambda: model(empty(1, 4, 3, 4, 6)))
    assert found.working_bytes > 5 * 18 * 3 * 32 * 4


def test_the_vqvae_costs_what_a_run_counts() -> None:
    config = LatentVQVAEConfig(latent_channels=4, ratio=(2, 2, 2), hidden_dim=16, codebook_size=8, kmeans_init=False)
    model, codes = on_meta(LatentVQVAE, config), empty(1, 3, 2, 2, dtype=torch.int64)
    assert cost.vqvae_cost(config, (3, 2, 2)).flops == counted(lambda: model.decode(codes))


@pytest.mark.slow
def test_the_vae_costs_what_a_run_of_all_chunks_does() -> None:
    found = cost.vae_decode_cost(VAE, 51, (2, 3))
    vae, latent = on_meta(VideoVAE, VAE), empty(1, 4, 15, 2, 3)
    assert found.flops == counted(lambda: vae.decode(latent, 51))
    assert found.working_bytes == cost.measure(lambda: vae.decode(latent, 51)).working_bytes
    assert found.num_parameters == num_parameters(vae)


@pytest.mark.slow
def test_blended_borders_cost_what_a_run_of_all_chunks_does() -> None:
    vae, latent = on_meta(VideoVAE, VAE), empty(1, 4, 15, 2, 3)
    blended = counted(lambda: vae.decode(latent, 51, blend_frames=2))
    assert cost.vae_decode_cost(VAE, 51, (2, 3), blend_frames=2).flops == blended
    assert blended > counted(lambda: vae.decode(latent, 51))
    assert cost.vae_decode_cost(VAE, 1, (2, 3), blend_frames=2) == cost.vae_decode_cost(VAE, 1, (2, 3))
    joined = counted(lambda: vae.decode(latent, 51, blend_frames=2, part=slice(15, 49)))
    assert cost.vae_decode_cost(VAE, 34, (2, 3), blend_frames=2, is_joined=True).flops == joined
    assert cost.vae_decode_cost(VAE, 34, (2, 3), is_joined=True) == cost.vae_decode_cost(VAE, 34, (2, 3))


@pytest.mark.slow
def test_tiles_cost_what_a_run_of_all_tiles_does() -> None:
    vae, latent = on_meta(VideoVAE, VAE), empty(1, 4, 15, 6, 11)
    run = cost.measure(lambda: vae.decode(latent, 51, blend_frames=2, tile=32))
    found = cost.vae_decode_cost(VAE, 51, (6, 11), blend_frames=2, tile=32)
    assert found.flops == run.flops
    assert found.working_bytes == pytest.approx(run.working_bytes, rel=0.1)
    assert cost.vae_decode_cost(VAE, 51, (6, 11), tile=88) == cost.vae_decode_cost(VAE, 51, (6, 11))


def test_a_frame_of_codes_costs_its_steps() -> None:
    model, text, mask = on_meta(CodeTransformer, AR), empty(2, 7, 24), empty(2, 7, dtype=torch.bool)
    codes = empty(2, 5 * 6, dtype=torch.int64)
    _, cache = model.prefill(codes, text, mask, max_codes=36)
    step = counted(lambda: model.step(codes[:, 0], cache))
    found = cost.ar_frame_cost(AR, text_length=7, batch=2)
    assert found.flops == AR.codes_per_frame * step
    read = cost.ar_read_cost(AR, text_length=7, batch=2)
    window = codes[:, : (AR.max_code_frames - AR.hop) * 6]
    assert read.flops == counted(lambda: model.prefill(window, text, mask, max_codes=36))
    assert read.num_parameters == found.num_parameters == num_parameters(model)
    assert read.working_bytes > 2 * AR.depth * 2 * (8 + 36) * AR.dim * 4  # keys and values of all slots


def test_depth_is_extrapolated_exactly() -> None:
    costs = [cost.dit_cost(replace(DIT, depth=depth), (2, 4, 4), text_length=3) for depth in (2, 3, 9)]
    assert costs[2].flops - costs[0].flops == 7 * (costs[1].flops - costs[0].flops)
    assert costs[2].num_parameters == num_parameters(STDiT3(replace(DIT, depth=9)))


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (TextEncoderConfig(kind="t5", source="owner/name", max_length=300, dim=4096), 4762),
        (TextEncoderConfig(), 22.7),
    ],
)
def test_text_encoders_have_their_published_sizes(config: TextEncoderConfig, millions: float) -> None:
    found = cost.text_cost(config)
    assert found.num_parameters / 1e6 == pytest.approx(millions, rel=0.01)
    assert found.flops > 2 * config.max_length * 0.4 * found.num_parameters


def test_the_full_size_has_the_known_parameters_and_work() -> None:
    """2.08 GFLOP of dense work a token; spec of Open-Sora v1.2."""
    found = cost.dit_cost(STDiT3Config(), (20, 64, 64), text_length=300)
    assert found.num_parameters == 1_207_643_972 + 300 * 4096
    tokens = 20 * 32 * 32
    attention = 4 * tokens * 1152 * 28 * (1024 + 20 + 2 * 300)
    assert found.flops == pytest.approx(tokens * 2.08e9 + attention, rel=0.02)


def test_a_control_branch_works_in_every_pass_of_the_dit() -> None:
    sizes = {"text_length": 7, "batch": 2}
    config = InjectionConfig(dim=DIT.hidden_size, num_blocks=1, num_heads=DIT.num_heads, design="controlnet")
    plain, controlled = (cost.dit_cost(DIT, (3, 4, 6), **sizes, injection=i) for i in (None, config))
    shallow, deep = (cost.dit_cost(replace(DIT, depth=depth), (3, 4, 6), **sizes).flops for depth in (1, 2))
    leave = 2 * 2 * 18 * DIT.hidden_size**2
    assert controlled.flops - plain.flops == deep - shallow + leave
    adaptive = replace(config, design="adaptive_norm")
    assert cost.dit_cost(DIT, (3, 4, 6), **sizes, injection=adaptive).flops == plain.flops
