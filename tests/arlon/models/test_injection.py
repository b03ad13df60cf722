"""Semantic injection: identity when fresh, gradient from the first step, statistics as in the formula."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from arlon.models.injection import (
    InjectionConfig,
    LearnedUncertainty,
    SemanticInjection,
    StatisticsUncertainty,
)
from arlon.models.stdit import STDiT3, STDiT3Config


def make_injection(**changes) -> SemanticInjection:
    torch.manual_seed(0)
    return SemanticInjection(InjectionConfig(**{"dim": 16, "num_blocks": 1, "num_adapters": 2} | changes))


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
def test_fresh_injection_is_the_identity_bit_for_bit(uncertainty: str, training: bool):
    dit, injection = make_dit().eval(), make_injection(uncertainty=uncertainty).train(training)
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


def test_training_follows_the_coarse_latent():
    dit, injection = make_dit().requires_grad_(False), make_injection(num_blocks=2, uncertainty="none")
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
    torch.testing.assert_close(got[0, -1], token + gate * (normed * (1 + scale) + shift), rtol=1e-4, atol=1e-5)


def test_later_blocks_are_left_alone():
    inject = make_injection(num_blocks=1).condition(torch.randn(1, 4, 2, 4, 4))
    y = torch.randn(1, 8, 16)
    assert inject(1, y) is y


def test_both_halves_of_guidance_share_the_features():
    injection = make_injection(uncertainty="none")
    torch.nn.init.normal_(injection.to_modulation[0].weight)
    inject = injection.condition(torch.randn(2, 4, 2, 4, 4))
    one, two = torch.randn(2, 2, 8, 16)
    torch.testing.assert_close(inject(0, torch.cat((one, two))), torch.cat((inject(0, one), inject(0, two))))


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


def test_saved_injection_computes_the_same(tmp_path: Path):
    injection = make_injection().eval()
    torch.nn.init.normal_(injection.to_modulation[0].weight)
    injection.save_pretrained(tmp_path / "injection")
    loaded = SemanticInjection.from_pretrained(tmp_path / "injection")
    coarse, y = torch.randn(1, 4, 2, 4, 4), torch.randn(1, 8, 16)
    assert loaded.config == injection.config
    torch.testing.assert_close(loaded.condition(coarse)(0, y), injection.condition(coarse)(0, y), rtol=0, atol=0)


def test_wrong_config_lists_every_problem():
    with pytest.raises(ValueError, match=r"num_adapters.*unknown uncertainty 'maybe'.*uncertainty_prob"):
        InjectionConfig(num_adapters=-1, uncertainty="maybe", uncertainty_prob=2.0)
