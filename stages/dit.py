"""Stage `dit`: the base diffusion transformer, rectified flow with captions and clean first frames.

Source: Open-Sora v1.2, training recipe of stage 3 (logit-normal times with resolution-aware shift, frame
masks, captions dropped at random).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from arlon.data.windows import LatentWindows, Sample
from arlon.diffusion.conditioning import sample_frame_masks
from arlon.grids import num_pixel_frames
from arlon.models.stdit import STDiT3, STDiT3Config
from arlon.models.video_vae import VideoVAE
from stages.common import Stage, StageParts, init_model, load_data, load_frozen, picture_of_videos, trim_text
from stages.config import DataConfig, FlowConfig, OptimConfig, RunConfig
from stages.flow_matching import FrameSize, draw_times, even_times, flow_losses, sample_latents, shift_for

NUM_PICTURES = 4


@dataclass(frozen=True, kw_only=True)
class DiTStageConfig:
    """Settings of the stage. The defaults of `dit` are those of STDiT3-XL/2."""

    dit: STDiT3Config = field(default_factory=STDiT3Config)
    flow: FlowConfig = field(default_factory=FlowConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: RunConfig = field(default_factory=RunConfig)


class DiTStage(Stage):
    """Trains an STDiT3 to predict the velocity of noisy latents."""

    stage_name: ClassVar[str] = "dit"
    config: DiTStageConfig

    def __init__(self, config: DiTStageConfig, model: STDiT3, vae: VideoVAE, examples: Sample) -> None:
        """Set up the stage; `vae` decodes the pictures, made of the clips in `examples`."""
        super().__init__(config, model, {"vae": vae})
        self._size = FrameSize(config.data.shapes.height, config.data.shapes.width)
        self._examples = examples

    def training_step(self, batch: Sample, batch_idx: int) -> Tensor:
        """Mean flow-matching loss at drawn times."""
        batch = trim_text(batch)
        generator = self.step_generator()
        t = draw_times(self.config.flow, len(batch["latent"]), generator)
        loss = self._losses(batch, t, generator).mean()
        self.log_figures(loss=loss)
        return loss

    def validation_metrics(self, batch: Sample, generator: torch.Generator) -> dict[str, float]:
        """`loss`: mean flow-matching loss at times spread evenly over the batch."""
        t = even_times(len(batch["latent"]))
        return {"loss": float(self._losses(batch, t, generator).mean())}

    def sample_picture(self) -> np.ndarray:
        """Rows in pairs: a validation clip, and one sampled from its caption and given frames."""
        batch = self._to_device(self._examples)
        sampled = sample_latents(self.model, batch, self.config.flow, size=self._size, seed=self.config.train.seed)
        return picture_of_pairs(self.frozen["vae"], batch["latent"], sampled)

    def _losses(self, batch: Sample, t: Tensor, generator: torch.Generator) -> Tensor:
        t = shift_for(self.config.flow, self._size, batch["latent"].shape[2])(t)
        return flow_losses(self.model, batch, t, size=self._size, generator=generator)


def picture_of_pairs(vae: VideoVAE, truth: Tensor, made: Tensor) -> np.ndarray:
    """Contact sheet of latents (n, C, T, H, W): a row of `truth`, then the row of `made` beside it."""
    pairs = torch.stack([truth, made.to(truth)], dim=1).flatten(0, 1)
    with torch.no_grad():
        return picture_of_videos(vae.decode(pairs, num_frames=num_pixel_frames(pairs.shape[2])))


def build(config: DiTStageConfig) -> StageParts:
    """Load the data and make the stage."""
    data = load_data(config.data, with_text=True)
    ratios = config.flow.windows.mask_ratios

    def mask_sampler(frames: int, generator: torch.Generator) -> Tensor:
        return sample_frame_masks(1, frames, ratios, generator)[0]

    train, val = (
        LatentWindows(
            cache,
            config=config.flow.windows,
            seed=config.train.seed,
            texts=data.texts,
            mask_sampler=mask_sampler if ratios else None,
        )
        for cache in (data.train, data.val)
    )
    torch.manual_seed(config.train.seed)
    model = init_model(STDiT3(config.dit), config.train)
    return StageParts(
        DiTStage(config, model, load_frozen(VideoVAE, config.data.vae, "data.vae"), example_batch(val)),
        train,
        val,
    )


def example_batch(samples: LatentWindows) -> Sample:
    """The first few samples of a set, for pictures."""
    rows = [samples.sample(number) for number in range(NUM_PICTURES)]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
