"""Stage `vae`: trains the video VAE on chunks of pixels.

Source: Open-Sora v1.2, VAE training: L1 in pixels and a small KL term. The perceptual term of the original needs the
weights of a classifier; in its place stand a squared error and one of chroma alone, which keeps saturated colours.
`shift` and `scale` of a new VAE are measured when it is exported; one that is fine-tuned keeps its own, with which the
networks that read its latents were trained.

The parts are trained one after another, as in the original: `part=spatial` autoencodes single frames, `part=temporal`
the latents of a frozen per-frame part (its loss is theirs, no pixel is decoded), `part=all` both, in pixels.
`part=decoder` then teaches the two decoders to read latents that are a little wrong, as a diffusion transformer writes
them; the encoders, and with them every latent, stay as they are (noise-augmented decoding: arXiv:2510.11690, sec. 3.3).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from arlon.data.samples import BatchStream, FixedBatches, Sample, VideoWindows
from arlon.grids import CHUNK_FRAMES
from arlon.models.video_vae import VideoVAE, VideoVAEConfig, latent_statistics
from stages.common import Stage, StageParts, init_model, window_parts
from stages.config import DataConfig, OptimConfig, RunConfig
from stages.data import make_sources
from stages.pictures import picture_of_videos
from stages.registry import STAGES, StageKind
from stages.vae_objectives import OBJECTIVES, VAELossConfig

STATISTICS_BATCHES = 8


@dataclass(frozen=True, kw_only=True)
class VAEStageConfig:
    """Settings of the stage."""

    vae: VideoVAEConfig = field(default_factory=VideoVAEConfig)
    part: Literal["spatial", "temporal", "all", "decoder"] = "all"
    """What is trained; the rest is frozen, and the spatial part alone sees single frames."""
    loss: VAELossConfig = field(default_factory=VAELossConfig)
    num_frames: int = CHUNK_FRAMES
    """Video frames of a training window: one chunk of the VAE, or less."""
    loss_frames: int | None = None
    """part=decoder: frames of a window that are decoded to pixels at a step, drawn evenly; None: all. The temporal part
    sees whole windows either way, and decoding frames is what a step costs."""
    statistics: Literal["auto", "measure", "keep"] = "auto"
    """Whether `shift` and `scale` are measured at the export; `auto`: unless the training starts from another VAE."""
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if self.part == "decoder" and self.statistics == "measure":
            raise ValueError("part=decoder leaves every latent as it is: statistics must be keep or auto, got measure")
        chunk = self.vae.micro_frame_size or self.num_frames
        if not 1 <= self.num_frames <= chunk:
            raise ValueError(f"num_frames ({self.num_frames}) must be 1..{chunk}, one chunk (vae.micro_frame_size)")
        if self.loss_frames is not None:
            if self.part != "decoder":
                raise ValueError(f"loss_frames is for part=decoder, got part={self.part}: leave it out")
            if not 1 <= self.loss_frames <= self.num_frames:
                raise ValueError(
                    f"loss_frames ({self.loss_frames}) must be 1..{self.num_frames}, the frames of a window"
                )

    @property
    def measures_statistics(self) -> bool:
        """Whether `shift` and `scale` are measured at the export."""
        if self.statistics == "auto":
            return self.part != "decoder" and self.train.start_folder is None
        return self.statistics == "measure"


class VAEStage(Stage):
    """Training of a VideoVAE, one part at a time."""

    stage_name: ClassVar[str] = "vae"
    adamw_layers = (
        "spatial_vae.module.encoder.conv_in",
        "spatial_vae.module.decoder.conv_in",
        "temporal_vae.encoder.conv_in",
    )
    config: VAEStageConfig
    model: VideoVAE

    def __init__(self, config: VAEStageConfig, model: VideoVAE, examples: list[Sample]) -> None:
        """Set up the stage.

        Args:
            config: Its settings.
            model: What is trained; the modules that `config.part` does not train are frozen here.
            examples: Batches for pictures and for the statistics of the latents.
        """
        super().__init__(config, model)
        self.objective = OBJECTIVES[config.part](model, config.loss, config.loss_frames)
        self._examples = examples
        model.requires_grad_(False)
        for module in self.objective.trained_modules():
            module.requires_grad_(True)

    def training_step(self, batch: Sample, batch_idx: int) -> Tensor:
        """Weighted sum of the terms of the part's objective."""
        terms = self.objective.terms(batch["video"], self.step_generator())
        loss = self.objective.total(terms)
        self.log_figures(loss=loss, **terms)
        return loss

    def validate(self, batches: Iterable[Sample]) -> dict[str, float]:
        """`psnr` in dB for pixels in [0, 1], over all pixels, and `l1`; both of posterior means."""
        squared, absolute = [], []
        for batch in batches:
            video = batch["video"].to(self.device)
            error = self.objective.reconstruct(video).clamp(-1, 1) - video
            squared.append(float((error / 2).square().mean()))
            absolute.append(float(error.abs().mean()))
        return {"psnr": -10 * float(np.log10(np.mean(squared) + 1e-12)), "l1": float(np.mean(absolute))}

    def sample_picture(self) -> np.ndarray:
        """Contact sheet in pairs of rows: a validation clip, and its reconstruction."""
        video = self._examples[0]["video"][:4].to(self.device)
        return picture_of_videos(torch.stack([video, self.objective.reconstruct(video)], dim=1).flatten(0, 1))

    def before_export(self) -> None:
        """Measure `shift` and `scale`, so that exported latents have mean 0 and spread 1 a channel; or keep them."""
        model = self.model
        if not self.config.measures_statistics:
            model.config = replace(model.config, shift=self._stated("shift"), scale=self._stated("scale"))
            return
        videos = (batch["video"].to(self.device) for batch in self._examples)
        means = [model.temporal_vae.encode(model.encode_frames(video)).mean for video in videos]
        shift, scale = latent_statistics(means)
        model.config = replace(model.config, shift=shift, scale=scale)
        for buffer, values in ((model.shift, shift), (model.scale, scale)):
            buffer.copy_(torch.tensor(values).view_as(buffer))

    def _stated(self, name: str) -> tuple[float, ...]:
        """Values of a buffer, in the digits of the config that it was loaded with."""
        buffer, form = getattr(self.model, name).flatten().cpu(), getattr(self.model, "stored_form", None)
        stated = () if form is None else getattr(form.config, name)
        return stated if torch.equal(torch.tensor(stated), buffer) else tuple(buffer.tolist())


def build(config: VAEStageConfig) -> StageParts:
    """Make the sources and the stage."""
    train, val = (
        VideoWindows(source, num_frames=config.num_frames, seed=config.train.seed)
        for source in make_sources(config.data)
    )
    torch.manual_seed(config.train.seed)
    model = init_model(VideoVAE(config.vae), config.train, free=("shift", "scale"))
    examples = list(BatchStream(FixedBatches(val, config.train.batch_size), num_batches=STATISTICS_BATCHES))
    return window_parts(VAEStage(config, model, examples), train, val, config.train)


STAGES.add(
    "vae",
    StageKind(config_class=VAEStageConfig, build=build, model_class=VideoVAE, model_key="vae"),
)
