"""Stage `dit`: the base diffusion transformer, rectified flow with captions and clean first frames.

It learns from windows of takes of one size, or from clips of a manifest in buckets of many sizes and lengths.

Source: Open-Sora v1.2, training recipe of stage 3 (logit-normal times with resolution-aware shift, frame
masks, captions dropped at random, buckets).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from arlon.data.bucketed_clips import BucketedClips, ClipLatents, FixedClips
from arlon.data.buckets import offered_order
from arlon.data.latent_cache import LatentCache
from arlon.data.manifest import Clip, read_manifest
from arlon.data.samples import (
    FixedBatches,
    LatentWindows,
    MaskSampler,
    Sample,
    WindowConfig,
)
from arlon.diffusion.conditioning import sample_frame_masks
from arlon.models import pixart
from arlon.models.stdit import STDiT3, STDiT3Config
from arlon.models.video_vae import VideoVAE
from stages.common import Stage, StageParts, init_model, mix_in, window_parts
from stages.config import DataConfig, FlowConfig, OptimConfig, RunConfig
from stages.data import data_facts, fill_texts, load_data, load_encoder, load_frozen, open_texts, trim_text
from stages.flow_matching import draw_times, even_times, flow_losses, grid_times, sample_latents, shift_for
from stages.pictures import NUM_EXAMPLES, example_batch, picture_of_pairs
from stages.record import TrainingFacts
from stages.registry import STAGES, StageKind

log = logging.getLogger(__name__)
TRAINING_FIELDS = (
    "class_dropout_prob",
    "drop_path",
    "only_train_temporal",
    "freeze_y_embedder",
)
"""Fields of a DiT's config that say how it is trained or run, not what its weights are."""


@dataclass(frozen=True, kw_only=True)
class ExtraWindowsConfig:
    """Windows of another length for a share of the steps, as Open-Sora trains on both pictures and clips."""

    windows: WindowConfig = field(default_factory=WindowConfig)
    """Settings of the windows; every length must occur only once."""
    share: float = 0.5
    """Share of the training steps, in (0, 1)."""
    batch_size: int = 16
    """Windows per step in each process."""
    shift_scale: float = 1.0
    """`flow.shift_scale` of these windows."""

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or self.batch_size < 1:
            raise ValueError(
                f"extra_windows: share must be in (0, 1), got {self.share}, and batch_size at least 1, got "
                f"{self.batch_size}"
            )


@dataclass(frozen=True, kw_only=True)
class DiTStageConfig:
    """Settings of the stage. The defaults of `dit` are those of STDiT3-XL/2."""

    dit: STDiT3Config = field(default_factory=STDiT3Config)
    gradient_checkpointing: bool = False
    """Recompute every block in the backward pass: a fraction of the memory for about a third more time."""
    flow: FlowConfig = field(default_factory=FlowConfig)
    extra_windows: tuple[ExtraWindowsConfig, ...] = ()
    """Windows of the steps that are not made with `flow.windows`."""
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        lengths = [self.flow.windows.latent_frames, *(part.windows.latent_frames for part in self.extra_windows)]
        if len(set(lengths)) < len(lengths):
            raise ValueError(f"flow.windows and extra_windows must have windows of different lengths, got {lengths}")
        if self.extra_windows and self.data.buckets:
            raise ValueError("extra_windows is for windows of takes: clips in data.buckets have many lengths already")
        if sum(part.share for part in self.extra_windows) >= 1:
            raise ValueError("the shares of extra_windows leave no step for flow.windows: their sum must be below 1")

    @property
    def flows(self) -> dict[int, FlowConfig]:
        """Settings of a step by the latent frames of its windows."""
        parts = [replace(self.flow, windows=part.windows, shift_scale=part.shift_scale) for part in self.extra_windows]
        return {flow.windows.latent_frames: flow for flow in (self.flow, *parts)}


class DiTStage(Stage):
    """Training of an STDiT3 to predict the velocity of noisy latents."""

    stage_name: ClassVar[str] = "dit"
    adamw_layers = ("x_embedder", "t_embedder", "fps_embedder", "y_embedder", "t_block", "final_layer")
    config: DiTStageConfig
    model: STDiT3

    def __init__(self, config: DiTStageConfig, model: STDiT3, vae: VideoVAE, examples: Sample) -> None:
        """Set up the stage; `vae` decodes the pictures, made of the clips in `examples`."""
        super().__init__(config, model, {"vae": vae})
        self._examples = examples
        self._bucket_names = [bucket.name for bucket in offered_order(config.data.buckets)]

    def training_step(self, batch: Sample, batch_idx: int) -> Tensor:
        """Mean flow-matching loss at drawn times."""
        batch = trim_text(batch)
        generators = self.row_generators(len(batch["latent"]))
        t = draw_times(self.config.flow, generators)
        loss = self._losses(batch, t, generators).mean()
        self.log_figures(loss=loss)
        return loss

    def validation_metrics(self, batch: Sample, number: int) -> dict[str, float]:
        """`loss`: mean flow-matching loss at times spread evenly over the batch.

        In buckets, `loss` and `loss_RESOLUTION_FRAMES`: at each of the fixed times of `grid_times`, not shifted, so
        that sizes and runs can be compared.
        """
        generators = self.validation_generators(number, len(batch["latent"]))
        if "bucket" not in batch:
            return {"loss": float(self._losses(batch, even_times(len(generators)), generators).mean())}
        times = [t.expand(len(generators)) for t in grid_times()]
        loss = float(torch.stack([flow_losses(self.model, batch, t, generators=generators) for t in times]).mean())
        return {"loss": loss, f"loss_{self._bucket_names[int(batch['bucket'][0])]}": loss}

    def sample_picture(self) -> np.ndarray:
        """Rows in pairs: a validation clip, and one sampled from its caption and given frames."""
        batch = self._to_device(self._examples)
        sampled = sample_latents(self.model, batch, self.config.flow, seed=self.config.train.seed)
        return picture_of_pairs(self.frozen["vae"], batch["latent"], sampled)

    def training_facts(self) -> TrainingFacts:
        """Frames and length of captions, and the segment unless the training had clips of many lengths."""
        return data_facts(self.config.data, self.config.flow.windows)

    def _losses(self, batch: Sample, t: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        # Clips in buckets have lengths that no window has; they take the main settings.
        flow = self.config.flows.get(batch["latent"].shape[2], self.config.flow)
        t = shift_for(flow, batch)(t)
        return flow_losses(self.model, batch, t, generators=generators)


def build(config: DiTStageConfig) -> StageParts:
    """Load the data and make the stage."""
    return _build_buckets(config) if config.data.buckets else _build_windows(config)


def _build_windows(config: DiTStageConfig) -> StageParts:
    """The stage on windows of takes of one size."""
    data = load_data(config.data, with_text=True)

    def windows(cache: LatentCache, flow: FlowConfig) -> LatentWindows:
        return LatentWindows(
            cache,
            config=flow.windows,
            seed=config.train.seed,
            size=config.data.frame_size,
            texts=data.texts,
            mask_sampler=_mask_sampler(flow),
        )

    val = windows(data.val, config.flow)
    vae = load_frozen(VideoVAE, config.data.vae, "data.vae")
    stage = DiTStage(config, _make_model(config), vae, example_batch(val))
    parts = window_parts(stage, windows(data.train, config.flow), val, config.train)
    extra = [
        FixedBatches(windows(data.train, config.flows[part.windows.latent_frames]), part.batch_size)
        for part in config.extra_windows
    ]
    return mix_in(parts, extra, [part.share for part in config.extra_windows])


def _build_buckets(config: DiTStageConfig) -> StageParts:
    """The stage on clips of a manifest in buckets of many sizes and lengths."""
    data = config.data
    if data.manifest is None:
        raise ValueError("data.buckets sorts the clips of a manifest: set data.manifest")
    clips = read_manifest(data.manifest)
    if len(clips) <= data.val_clips:
        raise ValueError(
            f"{data.manifest!r} has {len(clips)} clips, of which data.val_clips = {data.val_clips} are kept for "
            "validation: give more clips, or a smaller data.val_clips"
        )
    # Latents of buckets are encoded when they are first needed, so the encoder stays loaded.
    encoder, texts = load_encoder(data), open_texts(data)

    def sort(some: Sequence[Clip], use: str) -> BucketedClips:
        latents = ClipLatents(
            encoder.encode, encoder_key=encoder.key, root=data.cache_dir if data.keep_latents else None
        )
        try:
            return BucketedClips(
                some,
                data.buckets,
                latents=latents,
                texts=texts,
                seed=config.train.seed,
                size_multiple=encoder.vae.config.space_stride,
                strict=data.strict_buckets,
                fps=data.clip_fps,
                mask_sampler=_mask_sampler(config.flow),
            )
        except ValueError as error:
            raise ValueError(f"{data.manifest!r}, clips for {use}: {error}") from error

    train = sort(clips[: -data.val_clips], "training")
    val = sort(clips[-data.val_clips :], "validation (data.val_clips, the last ones)")
    with torch.inference_mode():
        fill_texts(texts, data, [clip.text for clip in clips])
    stage = DiTStage(config, _make_model(config), encoder.vae, val.examples(NUM_EXAMPLES))
    return StageParts(stage, train, FixedClips(val, config.train.val_batches))


def _mask_sampler(flow: FlowConfig) -> MaskSampler | None:
    ratios = flow.windows.mask_ratios
    if not ratios:
        return None
    return lambda frames, generator: sample_frame_masks(1, frames, ratios, generator)[0]


def _make_model(config: DiTStageConfig) -> STDiT3:
    """The DiT to train: fresh, from the part before, or from a released base or a file of PixArt-Sigma."""
    # Fresh weights are drawn from the global generator: loading data must not change them.
    torch.manual_seed(config.train.seed)
    model, start = STDiT3(config.dit), config.train.start_folder
    if start is not None and Path(start).suffix in pixart.SUFFIXES and not Path(start).is_dir():
        names = pixart.load_pixart(model, start)
        log.info("%s: %d tensors loaded, %d are fresh", start, len(names.loaded), len(names.fresh))
    else:
        model = init_model(model, config.train, free=TRAINING_FIELDS)
    model.gradient_checkpointing = config.gradient_checkpointing
    return model


STAGES.add(
    "dit",
    StageKind(config_class=DiTStageConfig, build=build, model_class=STDiT3, model_key="dit"),
)
