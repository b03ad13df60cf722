"""The objectives of the parts of the VAE: what learns, which terms the loss has, and what they mean."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch

from arlon.models.video_vae import VideoVAE
from stages.train import load_stage_config
from stages.vae_objectives import OBJECTIVES, Objective, VAELossConfig, pixel_errors

TINY = Path(__file__).parents[2] / "configs" / "shapes" / "tiny"


def make_objective(part: str, loss: VAELossConfig | None = None, **settings: Any) -> Objective:
    torch.manual_seed(0)
    model = VideoVAE(load_stage_config("vae", [TINY / "vae.yaml"], []).vae)
    return OBJECTIVES[part](model, loss or VAELossConfig(), **settings)


def clip() -> torch.Tensor:
    return torch.rand(2, 3, 17, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(
    ("part", "terms"),
    [
        ("spatial", {"l1", "mse", "chroma", "kl"}),
        ("temporal", {"latent", "latent_l1", "kl"}),
        ("all", {"l1", "mse", "chroma", "kl"}),
        ("decoder", {"l1", "mse", "chroma"}),
    ],
)
def test_the_loss_is_the_weighted_sum_of_the_terms_of_the_part(part: str, terms: set[str]) -> None:
    weights = VAELossConfig(l1=0.5, mse=2.0, chroma=3.0, latent=5.0, latent_l1=7.0, kl=11.0)
    objective = make_objective(part, weights)
    found = objective.terms(clip(), torch.Generator().manual_seed(1))
    assert set(found) == terms <= {field.name for field in fields(VAELossConfig)}
    expected = sum(asdict(weights)[name] * float(value.detach()) for name, value in found.items())
    assert float(objective.total(found).detach()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("part", "learning"),
    [
        ("spatial", {"spatial_vae.module.encoder", "spatial_vae.module.decoder"}),
        ("temporal", {"temporal_vae.encoder", "temporal_vae.decoder"}),
        ("all", {"spatial_vae.module.encoder", "spatial_vae.module.decoder", "temporal_vae.encoder"}),
        ("decoder", {"spatial_vae.module.decoder", "temporal_vae.decoder"}),
    ],
)
def test_gradients_reach_exactly_the_modules_of_the_part(part: str, learning: set[str]) -> None:
    objective = make_objective(part)
    objective.model.requires_grad_(False)
    for module in objective.trained_modules():
        module.requires_grad_(True)
    objective.total(objective.terms(clip(), torch.Generator().manual_seed(1))).backward()
    parameters = dict(objective.model.named_parameters())
    reached = {name for name, parameter in parameters.items() if parameter.grad is not None}
    assert reached == {name for name, parameter in parameters.items() if parameter.requires_grad}
    assert all(any(name.startswith(f"{prefix}.") for name in reached) for prefix in learning)
    kinds = {".".join(name.split(".")[:2]) for name in reached}
    assert ("temporal_vae.encoder" in kinds) == (part in ("temporal", "all"))


def test_noise_of_the_decoder_part_is_measured_on_normalised_latents() -> None:
    """Twice the scale of the latents, twice the noise on those that are not normalised."""
    objective = make_objective("decoder", VAELossConfig(latent_noise=1.0))
    decoded: list[torch.Tensor] = []
    decode = objective.model.temporal_vae.decode
    objective.decode = lambda latent, frames: decoded.append(latent.detach()) or decode(latent, frames)
    for scale in (0.0, 1.0, 2.0):
        objective.model.scale.fill_(scale)
        objective.terms(clip(), torch.Generator().manual_seed(1))
    clean, single, double = decoded
    assert (single - clean).norm() > 0.1
    torch.testing.assert_close(double - clean, 2 * (single - clean), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_impossible_weights_are_refused_by_name(value: float) -> None:
    with pytest.raises(ValueError, match=r"loss\.chroma"):
        VAELossConfig(chroma=value)


def test_a_term_without_a_weight_is_an_error() -> None:
    with pytest.raises(AttributeError, match="perceptual"):
        make_objective("all").total({"perceptual": torch.tensor(1.0)})


def test_an_unknown_weight_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown key 'loss\.chrome', did you mean 'chroma'"):
        load_stage_config("vae", [TINY / "vae.yaml"], ["loss.chrome=1"])


def test_chroma_ignores_grey_errors_and_counts_coloured_ones() -> None:
    video = torch.zeros(1, 3, 2, 4, 5)
    grey = pixel_errors(video + 0.5, video)
    assert {name: float(value) for name, value in grey.items()} == pytest.approx(
        {"l1": 0.5, "mse": 0.25, "chroma": 0.0}
    )
    red = video.clone()
    red[:, 0] = 0.3  # its mean over channels is 0.1: what is left is 0.2, -0.1, -0.1
    assert float(pixel_errors(red, video)["chroma"]) == pytest.approx((0.04 + 0.01 + 0.01) / 3)
    assert float(pixel_errors(red, video)["mse"]) == pytest.approx(0.03)
