"""What each part of the VAE's training changes, and the loss that it lowers.

The video VAE is two autoencoders, one inside the other: a spatial one of single frames and a temporal one of its
latents. An `Objective` says which of their modules learn, how a video is encoded, and which terms make up the loss.

Dimension key: B batch, F channels of a per-frame latent, C channels of a video latent, pT pH pW frames and pixels of a
video, T H W latent grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import reduce

import torch
from torch import Tensor, nn

from arlon.models.temporal_vae import Posterior
from arlon.models.video_vae import VideoVAE


@dataclass(frozen=True, kw_only=True)
class VAELossConfig:
    """Weights of the terms of the loss. Each part uses the terms that it has."""

    l1: float = 1.0
    """Mean absolute error of pixels in [-1, 1]."""
    mse: float = 2.0
    """Mean squared error of pixels."""
    chroma: float = 1.0
    """Mean squared error of what is left when the mean of the three channels is taken away, on top of `mse`."""
    latent: float = 1.0
    """Mean squared error of per-frame latents; in part=temporal, which decodes no pixel."""
    latent_l1: float = 0.2
    """Mean absolute error of per-frame latents; likewise."""
    kl: float = 1e-3
    """KL divergence from a unit Gaussian, in nats a latent value; part=decoder has none."""
    latent_noise: float = 0.0
    """part=decoder: spread tau of the noise on normalised latents, whose level is |N(0, tau^2)| for each clip."""

    def __post_init__(self) -> None:
        wrong = {name: value for name, value in asdict(self).items() if not 0 <= value < math.inf}
        if wrong:
            given = ", ".join(f"loss.{name} = {value}" for name, value in wrong.items())
            raise ValueError(f"weights of the loss must be finite and not negative, got {given}")


class Objective:
    """Both autoencoders learn to reconstruct pixels from a sampled latent; the base of the other parts."""

    def __init__(self, model: VideoVAE, loss: VAELossConfig, loss_frames: int | None = None) -> None:
        """Set up the objective.

        Args:
            model: The video VAE that is trained.
            loss: Weights of the terms.
            loss_frames: Frames of a window whose pixels are compared at a step; None: all.
        """
        self.model, self.loss, self.loss_frames = model, loss, loss_frames

    def trained_modules(self) -> tuple[nn.Module, ...]:
        """The modules that learn; everything else is frozen."""
        return self.model.spatial_vae.module, self.model.temporal_vae

    def encode(self, video: Tensor) -> tuple[Tensor, Posterior]:
        """Per-frame latents (B, F, pT, H, W) of a video (B, 3, pT, pH, pW), and the posterior of the latent."""
        frames = self.model.encode_frames(video)
        return frames, self.model.temporal_vae.encode(frames)

    def decode(self, latent: Tensor, num_frames: int) -> Tensor:
        """Per-frame latents (B, F, pT, H, W) of a sampled latent."""
        return self.model.temporal_vae.decode(latent, num_frames)

    def reconstruct(self, video: Tensor) -> Tensor:
        """The video (B, 3, pT, pH, pW) as it comes out of the posterior mean, float32."""
        _, posterior = self.encode(video)
        return self.model.decode_frames(self.decode(posterior.mean, video.shape[2])).float()

    def terms(self, video: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Unweighted terms of the loss, by their names in `VAELossConfig`; `generator` draws the latent."""
        _, posterior = self.encode(video)
        frames = self.decode(posterior.sample(generator), video.shape[2])
        return pixel_errors(self.model.decode_frames(frames).float(), video) | {"kl": mean_kl(posterior)}

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Weighted sum of the terms; a term without a weight in `VAELossConfig` raises AttributeError."""
        return reduce(torch.add, [getattr(self.loss, name) * value for name, value in terms.items()])


class SpatialObjective(Objective):
    """The spatial autoencoder learns alone, on single frames: a latent is that of each frame."""

    def trained_modules(self) -> tuple[nn.Module, ...]:
        return (self.model.spatial_vae.module,)

    def encode(self, video: Tensor) -> tuple[Tensor, Posterior]:
        flat = video.transpose(1, 2).flatten(0, 1)  # (B pT, 3, pH, pW)
        moments = self.model.spatial_vae.module.encode(flat).latent_dist.parameters
        posterior = Posterior.from_moments(moments.unflatten(0, (video.shape[0], -1)).transpose(1, 2))
        return self.decode(posterior.mean, video.shape[2]), posterior

    def decode(self, latent: Tensor, num_frames: int) -> Tensor:
        return latent * self.model.config.spatial.scaling_factor


class TemporalObjective(Objective):
    """The temporal autoencoder learns to reconstruct the latents of the frozen spatial one; no pixel is decoded."""

    def trained_modules(self) -> tuple[nn.Module, ...]:
        return (self.model.temporal_vae,)

    def encode(self, video: Tensor) -> tuple[Tensor, Posterior]:
        with torch.no_grad():
            frames = self.model.encode_frames(video)
        return frames, self.model.temporal_vae.encode(frames)

    def terms(self, video: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        frames, posterior = self.encode(video)
        error = self.decode(posterior.sample(generator), video.shape[2]).float() - frames
        return {"latent": error.square().mean(), "latent_l1": error.abs().mean(), "kl": mean_kl(posterior)}


class DecoderObjective(Objective):
    """Both decoders learn to read latents that are a little wrong; the encoders, and so every latent, stay."""

    def trained_modules(self) -> tuple[nn.Module, ...]:
        spatial, temporal = self.model.spatial_vae.module, self.model.temporal_vae
        return spatial.post_quant_conv, spatial.decoder, temporal.post_quant_conv, temporal.decoder

    @torch.no_grad()
    def encode(self, video: Tensor) -> tuple[Tensor, Posterior]:
        return super().encode(video)

    def terms(self, video: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        _, posterior = self.encode(video)
        latent = posterior.sample(generator)
        level = self.loss.latent_noise * torch.randn(len(latent), 1, 1, 1, 1, generator=generator).abs()
        noise = (level * torch.randn(latent.shape, generator=generator)).to(latent)
        # The latent is not normalised yet, and the noise is meant for one that is: bring it to the same scale.
        frames = self.decode(latent + noise * self.model.scale, video.shape[2])
        if self.loss_frames is not None:  # what a step costs is the decoding of frames to pixels
            chosen = torch.randperm(video.shape[2], generator=generator)[: self.loss_frames]
            frames, video = frames[:, :, chosen], video[:, :, chosen]
        return pixel_errors(self.model.decode_frames(frames).float(), video)


OBJECTIVES = {
    "spatial": SpatialObjective,
    "temporal": TemporalObjective,
    "all": Objective,
    "decoder": DecoderObjective,
}


def mean_kl(posterior: Posterior) -> Tensor:
    """KL divergence of a posterior from a unit Gaussian, in nats a latent value."""
    return posterior.kl().sum() / posterior.mean.numel()


def pixel_errors(made: Tensor, video: Tensor) -> dict[str, Tensor]:
    """Terms `l1`, `mse` and `chroma` of the loss, for videos (B, 3, pT, pH, pW)."""
    error = made - video
    chroma = error - error.mean(dim=1, keepdim=True)
    return {"l1": error.abs().mean(), "mse": error.square().mean(), "chroma": chroma.square().mean()}
