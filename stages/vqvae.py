"""Stage `vqvae`: trains a latent VQ-VAE, fine or coarser, by reconstruction and commitment on normalised latents.

Source: ARLON, arXiv:2410.20502, latent VQ-VAE; loss arXiv:1711.00937 eq. 3 with a moving-average codebook.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from arlon.data.samples import LatentWindows, Sample, WindowConfig
from arlon.models.video_vae import VideoVAE
from arlon.models.vqvae import LatentVQVAE, LatentVQVAEConfig, codebook_usage
from stages.common import Stage, StageParts, init_model, window_parts
from stages.config import DataConfig, OptimConfig, RunConfig
from stages.data import data_facts, load_data, load_frozen
from stages.pictures import example_batch, picture_of_pairs
from stages.record import TrainingFacts
from stages.registry import STAGES, StageKind


@dataclass(frozen=True, kw_only=True)
class VQVAEStageConfig:
    """Settings of the stage."""

    vqvae: LatentVQVAEConfig = field(default_factory=LatentVQVAEConfig)
    windows: WindowConfig = field(default_factory=WindowConfig)
    """Length of the windows; captions and masks are not used."""
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: RunConfig = field(default_factory=RunConfig)


class VQVAEStage(Stage):
    """Training of a LatentVQVAE."""

    stage_name: ClassVar[str] = "vqvae"
    config: VQVAEStageConfig
    model: LatentVQVAE

    def __init__(self, config: VQVAEStageConfig, model: LatentVQVAE, vae: VideoVAE, examples: Sample) -> None:
        """Set up the stage; `vae` decodes the pictures, made of the clips in `examples`."""
        super().__init__(config, model, {"vae": vae})
        self._examples = examples

    def training_step(self, batch: Sample, batch_idx: int) -> Tensor:
        """Reconstruction and commitment loss; the codebook is updated by moving averages."""
        out = self.model(batch["latent"], generator=self.step_generator())
        usage = codebook_usage(out.codes, self.config.vqvae.codebook_size)
        self.log_figures(
            loss=out.loss,
            reconstruction=out.reconstruction_loss,
            commitment=out.commitment_loss,
            perplexity=usage.perplexity,
        )
        return out.loss

    def validate(self, batches: Iterable[Sample]) -> dict[str, float]:
        """Figures over all validation latents together.

        `r_squared`: 1 - squared error / squared distance from the channel means. `codebook_usage`: share of the codes
        that are used at all. `perplexity`: exp of the entropy of the code frequencies.
        """
        latents, made, codes = [], [], []
        for batch in batches:
            out = self.model(batch["latent"].to(self.device))
            latents.append(batch["latent"])
            made.append(out.reconstruction.float().cpu())
            codes.append(out.codes.cpu())
        latent, reconstruction = torch.cat(latents), torch.cat(made)
        usage = codebook_usage(torch.cat(codes), self.config.vqvae.codebook_size)
        error = (latent - reconstruction).square().sum()
        spread = (latent - latent.mean(dim=(0, 2, 3, 4), keepdim=True)).square().sum()
        return {
            "loss": float(error / latent.numel()),
            "r_squared": float(1 - error / spread),
            "codebook_usage": usage.used_share,
            "perplexity": usage.perplexity,
        }

    def training_facts(self) -> TrainingFacts:
        """Frame size and rate; the stage reads no captions."""
        return replace(data_facts(self.config.data), text_length=None)

    def sample_picture(self) -> np.ndarray:
        """Rows in pairs: a validation clip, and its reconstruction through the codes."""
        latent = self._to_device(self._examples)["latent"]
        return picture_of_pairs(self.frozen["vae"], latent, self.model(latent).reconstruction)


def build(config: VQVAEStageConfig) -> StageParts:
    """Load the data and make the stage."""
    data = load_data(config.data, with_text=False)
    train, val = (
        LatentWindows(cache, config=config.windows, seed=config.train.seed, size=config.data.frame_size)
        for cache in (data.train, data.val)
    )
    torch.manual_seed(config.train.seed)
    model = init_model(LatentVQVAE(config.vqvae), config.train)
    stage = VQVAEStage(config, model, load_frozen(VideoVAE, config.data.vae, "data.vae"), example_batch(val))
    return window_parts(stage, train, val, config.train)


STAGES.add(
    "vqvae",
    StageKind(config_class=VQVAEStageConfig, build=build, model_class=LatentVQVAE, model_key="vqvae"),
)
