"""Semantic injection: identity when fresh, gradient from the first step, statistics as in the formula."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from arlon.models.injection import (
    DESIGNS,
    InjectionConfig,
    SemanticInjection,
)
from arlon.models.stdit import BlockInputs, STDiT3, STDiT3Config
from arlon.models.uncertainty import LearnedUncertainty, StatisticsUncertainty
from tests.closeness import assert_close_to_scale


def make_injection(**changes) -> SemanticInjection:
    torch.manual_seed(0)
    defaults = {"dim": 16, "num_blocks": 1, "num_adapters": 2, "num_heads": 2}
    return SemanticInjection(InjectionConfig(**defaults | changes))


def make_dit() -> STDiT3:
    torch.manual_seed(1)
    config = STDiT3Config(
        hidden_size=16, depth=2, num_heads=2, caption_channels=6, model_max_length=5, class_dropout_prob=0.0
    )
    dit = STDiT3(config)
    for block in dit.temporal_blocks:
        torch.nn.init.normal_(block.attn.proj.weight, std=0.3)
    return dit


def run(dit: STDiT3, latent: Tensor, **extra) -> Tensor:
    batch = latent.shape[0]
    text = torch.linspace(-1, 1, 30).view(1, 5, 6).expand(batch, -1, -1)
    return dit(latent, torch.full((batch,), 0.7), text, fps=8, height=40, width=56, **extra)


@pytest.mark.parametrize("uncertainty", ["none", "dsu", "learned"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("design", sorted(DESIGNS))
def test_fresh_injection_is_the_identity_bit_for_bit(design: str, uncertainty: str, training: bool):
    dit, injection = make_dit().eval(), make_injection(design=design, uncertainty=uncertainty).train(training)
    latent, coarse = torch.randn(2, 2, 4, 3, 5, 7)
    inject = injection.condition(coarse)
    torch.testing.assert_close(run(dit, latent, inject=inject), run(dit, latent), rtol=0, atol=0)


def test_gradient_reaches_every_fresh_linear():
    dit, injection = make_dit().requires_grad_(False), make_injection(num_blocks=2)
    latent, coarse = torch.randn(2, 2, 4, 3, 4, 6)
    run(dit, latent, inject=injection.condition(coarse)).square().mean().backward()
    for linear in injection.to_modulation:
        gate = linear.weight.grad[:16]
        assert gate.abs().max() > 0, "the gate must learn from step 0, or nothing ever does"


@pytest.mark.parametrize("design", sorted(DESIGNS))
def test_training_follows_the_coarse_latent(design: str):
    dit = make_dit().requires_grad_(False)
    injection = make_injection(design=design, num_blocks=2, uncertainty="none")
    injection.init_from(dit)
    latent, coarse = torch.randn(2, 2, 4, 3, 4, 6)
    optimizer = torch.optim.Adam(injection.parameters(), lr=0.02)
    losses = []
    for _ in range(12):
        loss = (run(dit, latent, inject=injection.condition(coarse)) - coarse).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    with torch.no_grad():
        with_coarse = run(dit, latent, inject=injection.condition(coarse))
        with_other = run(dit, latent, inject=injection.condition(coarse.flip(0)))
    assert (with_coarse - with_other).abs().max() > 1e-3


def test_modulation_is_the_stated_formula_at_the_right_token():
    injection = make_injection(uncertainty="none").eval()
    torch.nn.init.normal_(injection.to_modulation[0].weight)
    coarse, y = torch.randn(1, 4, 2, 5, 7), torch.randn(1, 24, 16)
    got = injection.condition(coarse)(0, y)
    padded = torch.nn.functional.pad(coarse, (0, 1, 0, 1))
    frame, row, column = 1, 2, 3  # the last token, which covers padding
    patch = padded[0, :, frame, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
    c = (injection.projection.proj.weight[:, :, 0] * patch).sum((1, 2, 3)) + injection.projection.proj.bias
    for adapter in injection.adapters:
        c = c + adapter(c)
    gate, scale, shift = injection.to_modulation[0](torch.nn.functional.silu(c)).chunk(3)
    token = y[0, -1]
    normed = (token - token.mean()) / (token.var(correction=0) + 1e-6).sqrt()
    assert_close_to_scale(got[0, -1], token + gate * (normed * (1 + scale) + shift))


@pytest.mark.parametrize("design", ["adaptive_norm", "mlp_adapter"])
@pytest.mark.parametrize(("first", "count"), [(0, 1), (1, 1), (1, 2)])
def test_only_the_blocks_of_the_config_are_changed(design: str, first: int, count: int):
    injection = make_injection(design=design, first_block=first, num_blocks=count)
    for linear in injection.design.output_layers():
        torch.nn.init.normal_(linear.weight)
    inject = injection.condition(torch.randn(1, 4, 2, 4, 4))
    y = torch.randn(1, 8, 16)
    changed = [i for i in range(4) if not torch.equal(inject(i, y), y)]
    assert changed == list(range(first, first + count))


def test_mlp_adapter_adds_an_mlp_of_the_features():
    injection = make_injection(design="mlp_adapter", uncertainty="none")
    mlp = injection.to_residual.blocks[0]
    torch.nn.init.normal_(mlp.fc2.weight)
    coarse, y = torch.randn(1, 4, 2, 4, 6), torch.randn(1, 12, 16)
    c = injection.projection(coarse).flatten(1, 2)
    for adapter in injection.adapters:
        c = c + adapter(c)
    hidden = torch.nn.functional.gelu(mlp.fc1(torch.nn.functional.silu(c)), approximate="tanh")
    torch.testing.assert_close(injection.condition(coarse)(0, y), y + mlp.fc2(hidden))


@pytest.mark.parametrize("first", [0, 1])
def test_fresh_control_branch_is_a_copy_of_the_blocks_of_the_base(first: int):
    """Without features, what leaves the branch at block i is the state of the base behind block i."""
    dit = make_dit().eval()
    injection = make_injection(design="controlnet", num_blocks=2 - first, first_block=first).eval()
    injection.init_from(dit)
    for linear in injection.control.leave:
        torch.nn.init.eye_(linear.weight)
    seen: list[Tensor] = []
    started: list[BlockInputs] = []
    for i in range(first, 2):
        dit.temporal_blocks[i].register_forward_hook(lambda module, args, out: seen.append(out))

    class Spy:
        def begin(self, inputs: BlockInputs):
            started.append(inputs)
            return lambda i, y: y

    latent = torch.randn(2, 4, 3, 4, 6)
    with torch.no_grad():
        run(dit, latent, inject=Spy())
        inputs = started[0]
        if first:  # the branch begins with the tokens: compare it with blocks that do the same
            tokens = inputs.tokens
            for block in (dit.spatial_blocks[1], dit.temporal_blocks[1]):
                rotation = inputs.rotation if block.temporal else None
                tokens = block(tokens, inputs.time, inputs.text, rotation=rotation)
            seen = [tokens]
        residuals = injection.condition(torch.randn(2, 4, 3, 4, 6)).begin(inputs)
    assert len(residuals.values) == len(seen) == 2 - first
    for value, state in zip(residuals.values, seen, strict=True):
        torch.testing.assert_close(value, state.flatten(1, 2))


def test_control_branch_reads_a_prepared_text_and_serves_both_halves_of_guidance():
    dit, injection = make_dit().eval(), make_injection(design="controlnet", num_blocks=2, uncertainty="none").eval()
    injection.init_from(dit)
    for linear in injection.design.output_layers():
        torch.nn.init.normal_(linear.weight, std=0.3)
    latent, coarse = torch.randn(2, 2, 4, 3, 4, 6)
    inject = injection.condition(coarse)
    text, mask = torch.randn(2, 5, 6), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    size = {"fps": 8, "height": 32, "width": 48}
    t = torch.tensor([0.7, 0.2])
    with torch.no_grad():
        plain = dit(latent, t, text, mask, inject=inject, **size)
        prepared = dit(latent, t, dit.prepare_text(text, mask), inject=inject, **size)
        doubled = dit(
            torch.cat((latent, latent)), t.repeat(2), text.repeat(2, 1, 1), mask.repeat(2, 1), inject=inject, **size
        )
        without = dit(latent, t, text, mask, **size)
        padded = dit(latent, t, text.masked_fill(~mask[..., None], 9.0), mask, inject=inject, **size)
    torch.testing.assert_close(prepared, plain)
    torch.testing.assert_close(doubled, plain.repeat(2, 1, 1, 1, 1))
    torch.testing.assert_close(padded, plain)
    assert (plain - without).abs().max() > 1e-2


def test_control_branch_of_another_base_is_refused():
    with pytest.raises(ValueError, match="needs a DiT of 3 blocks"):
        make_injection(design="controlnet", num_blocks=2, first_block=1).init_from(make_dit())
    with pytest.raises(ValueError, match="must have dim, num_heads, mlp_ratio"):
        make_injection(design="controlnet", mlp_ratio=2.0).init_from(make_dit())


def test_both_halves_of_guidance_share_the_features():
    injection = make_injection(uncertainty="none")
    torch.nn.init.normal_(injection.to_modulation[0].weight)
    inject = injection.condition(torch.randn(2, 4, 2, 4, 4))
    one, two = torch.randn(2, 2, 8, 16)
    torch.testing.assert_close(inject(0, torch.cat((one, two))), torch.cat((inject(0, one), inject(0, two))))


@pytest.mark.parametrize("design", sorted(DESIGNS))
def test_every_design_refuses_a_misaligned_coarse_latent(design: str):
    inject = make_injection(design=design).condition(torch.randn(1, 4, 2, 4, 4))
    with pytest.raises(ValueError, match="must be aligned with the DiT tokens"):
        run(make_dit(), torch.randn(1, 4, 3, 4, 6), inject=inject)


def test_misaligned_coarse_is_refused():
    inject = make_injection().condition(torch.randn(2, 4, 2, 4, 4))
    with pytest.raises(ValueError, match="must be aligned with the DiT tokens"):
        inject(0, torch.randn(2, 12, 16))
    with pytest.raises(ValueError, match=r"coarse_latent must be \(B, 4, T, H, W\)"):
        make_injection().condition(torch.randn(2, 3, 2, 4, 4))


def test_init_from_copies_the_patch_embedding():
    dit, injection = make_dit(), make_injection()
    injection.init_from(dit)
    latent = torch.randn(1, 4, 2, 5, 6)
    torch.testing.assert_close(injection.projection(latent), dit.x_embedder(latent), rtol=0, atol=0)
    with pytest.raises(ValueError, match="must have the injection's dim"):
        make_injection(dim=8).init_from(dit)


def test_statistics_uncertainty_is_the_published_formula():
    c = torch.randn(3, 7, 5, dtype=torch.double) * 2 + 1
    got = StatisticsUncertainty(5).double()(c, torch.Generator().manual_seed(4))
    e1, e2 = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(4)).double()
    mu, sg = c.mean(1), (c.var(1) + 1e-6).sqrt()
    s_mu, s_sg = (mu.var(0) + 1e-6).sqrt(), (sg.var(0) + 1e-6).sqrt()
    expected = (sg + e2 * s_sg)[:, None] * ((c - mu[:, None]) / sg[:, None]) + (mu + e1 * s_mu)[:, None]
    torch.testing.assert_close(got, expected)


def test_running_statistics_stand_in_for_a_batch_of_one():
    torch.manual_seed(0)
    module = StatisticsUncertainty(3)
    features = torch.randn(60, 1, 11, 3) + 2 * torch.randn(60, 1, 1, 3)
    for c in features:
        module(c, None)
    means = features.mean(dim=2)[:, 0]
    torch.testing.assert_close(module.running_mean[0], means.mean(0))
    torch.testing.assert_close(module.running_var[0], means.var(0, correction=0))
    state = {name: value.clone() for name, value in module.state_dict().items()}
    moved = []
    for _ in range(400):
        module.load_state_dict(state)
        moved.append(module(features[0], None).mean((0, 1)))
    torch.testing.assert_close(torch.stack(moved).std(0), means.std(0), rtol=0.15, atol=0)


@pytest.mark.parametrize("uncertainty", ["dsu", "learned"])
def test_uncertainty_is_for_training_only_and_follows_the_generator(uncertainty: str):
    injection = make_injection(uncertainty=uncertainty, uncertainty_prob=1.0)
    certain = make_injection(uncertainty="none")
    certain.load_state_dict({k: v for k, v in injection.state_dict().items() if not k.startswith("uncertainty")})
    for module in (injection, certain):
        torch.nn.init.ones_(module.to_modulation[0].weight)
    coarse, y = torch.randn(2, 4, 2, 4, 4), torch.randn(2, 8, 16)

    def out(module: SemanticInjection, seed: int) -> Tensor:
        return module.condition(coarse, torch.Generator().manual_seed(seed))(0, y)

    torch.testing.assert_close(out(injection, 1), out(injection, 1), rtol=0, atol=0)
    assert not torch.equal(out(injection, 1), out(injection, 2))
    torch.testing.assert_close(out(injection.eval(), 1), out(certain, 1))


def test_uncertainty_comes_with_its_probability():
    injection = make_injection(uncertainty="dsu", uncertainty_prob=0.3)
    generator, c = torch.Generator().manual_seed(0), torch.randn(2, 4, 16)
    applied = sum(not torch.equal(injection._perturb(c, generator), c) for _ in range(400))
    assert 0.22 < applied / 400 < 0.38


def test_learned_uncertainty_has_the_stated_spread():
    module = LearnedUncertainty(4)
    torch.nn.init.zeros_(module.to_logvar.weight)
    module.to_logvar.bias.data = torch.tensor([0.0, -2.0, -4.0, -50.0])
    noise = module(torch.zeros(1, 20_000, 4), torch.Generator().manual_seed(0))
    expected = torch.tensor([0.0, -2.0, -4.0, -6.0]).div(2).exp()
    torch.testing.assert_close(noise[0].std(0), expected, rtol=0.05, atol=0)


def test_bfloat16_autocast_trains():
    dit, injection = make_dit(), make_injection(num_blocks=2)
    latent, coarse = torch.randn(2, 2, 4, 3, 4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        velocity = run(dit, latent, inject=injection.condition(coarse))
    velocity.square().mean().backward()
    assert velocity.dtype == torch.float32
    assert injection.to_modulation[1].weight.grad.abs().max() > 0


@pytest.mark.parametrize("design", sorted(DESIGNS))
def test_saved_injection_computes_the_same(design: str, tmp_path: Path):
    dit, injection = make_dit().eval(), make_injection(design=design).eval()
    for linear in injection.design.output_layers():
        torch.nn.init.normal_(linear.weight)
    injection.save_pretrained(tmp_path / "injection")
    loaded = SemanticInjection.from_pretrained(tmp_path / "injection").eval()
    coarse, latent = torch.randn(2, 1, 4, 2, 4, 4)
    assert loaded.config == injection.config
    expected = run(dit, latent, inject=injection.condition(coarse))
    torch.testing.assert_close(run(dit, latent, inject=loaded.condition(coarse)), expected, rtol=0, atol=0)


def test_wrong_config_lists_every_problem():
    with pytest.raises(ValueError, match=r"num_adapters.*design 'x'.*uncertainty 'maybe'.*_prob"):
        InjectionConfig(num_adapters=-1, design="x", uncertainty="maybe", uncertainty_prob=2.0)
    with pytest.raises(ValueError, match=r"dim \(16\) must be a multiple of 2 num_heads"):
        InjectionConfig(design="controlnet", dim=16, num_heads=3)
