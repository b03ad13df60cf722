"""What all stages share: the base module, cached data, frozen networks, the trainer and the export."""

from __future__ import annotations

import gc
import logging
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from tqdm import tqdm

from arlon.checkpoint import hash_component, load_component, save_component
from arlon.config import config_to_dict
from arlon.data.datasets import ShapesTakes, TakeSource, VideoTakes
from arlon.data.latent_cache import (
    CodeCache,
    JoinedLatents,
    LatentCache,
    Progress,
    TextCache,
    build_code_cache,
    build_latent_cache,
)
from arlon.data.windows import BatchSet, BatchStream, FixedBatches, MixedBatches, Sample, SampleSet, Shard
from arlon.diffusion.samplers import address_seed
from arlon.models.video_vae import VideoVAE
from arlon.precision import fast_dtype, has_fast_bfloat16
from arlon.text.encoders import MiniLMEncoder, TextEncoder, load_text_encoder
from stages.callbacks import (
    Checkpoints,
    JsonLinesLogger,
    ProgressLine,
    RunClock,
    SamplePictures,
    Validate,
    WeightAverage,
)
from stages.config import DataConfig, OptimConfig, RunConfig
from stages.optim import make_optimizer
from stages.parallel import gathered, make_strategy, shard_model

EXPORT_DIR = "export"
TEXT_STEP = 8
log = logging.getLogger(__name__)


class Stage(L.LightningModule):
    """Base of all stages: `model` is what is trained, averaged and exported.

    Every draw of step n comes from a generator seeded by (seed, stage, n) and the process or the row of the batch, and
    the global generator is seeded likewise before each step, so that a resumed training goes on exactly as it would
    have. What is drawn by row does not depend on how many processes share the rows.
    """

    stage_name: ClassVar[str]

    def __init__(self, config: Any, model: nn.Module, frozen: Mapping[str, nn.Module] | None = None) -> None:
        """Set up a stage.

        Args:
            config: Configuration of the stage, with `optim` and `train` among its fields.
            model: What is trained, averaged and exported.
            frozen: Networks that are only used. In a dict they are no submodules, so checkpoints stay small.
        """
        super().__init__()
        self.save_hyperparameters({"config": config_to_dict(config)})
        self.config, self.model, self.frozen = config, model, dict(frozen or {})

    def configure_model(self) -> None:
        """Shard the model where the strategy does: every block by itself, then what is left."""
        if self.device_mesh is not None:
            shard_model(self.model, self.device_mesh["data_parallel"])

    def on_fit_start(self) -> None:
        for network in self.frozen.values():
            network.to(self.device)

    def configure_optimizers(self) -> Any:
        return make_optimizer(self.model, self.config.optim)

    def on_train_batch_start(self, batch: Sample, batch_idx: int) -> None:
        address = ("global", self.global_step, self.global_rank)
        torch.manual_seed(address_seed(self.config.train.seed, self.stage_name, *address))

    def step_generator(self) -> torch.Generator:
        """CPU generator of this step's draws in this process."""
        return self._generator("step", self.global_step, self.global_rank)

    def row_generators(self, count: int) -> list[torch.Generator]:
        """CPU generators of this step's draws, one for each of the `count` rows that this process has."""
        first = self.global_rank * count
        return [self._generator("row", self.global_step, first + row) for row in range(count)]

    def validation_generators(self, number: int, count: int) -> list[torch.Generator]:
        """CPU generators of the draws of validation batch `number`, one for each of its `count` rows."""
        return [self._generator("validation", number, row) for row in range(count)]

    def log_figures(self, **figures: Tensor | float) -> None:
        """Log figures of this training step as `train/NAME`, counted as the step that it completes."""
        named = {f"train/{name}": value for name, value in figures.items()}
        self.log_dict({**named, "step": float(self.global_step + 1)})

    def validate(self, batches: Iterable[Sample]) -> dict[str, float]:
        """Mean of each figure of `validation_metrics` over the batches that have it."""
        figures = defaultdict(list)
        for number, batch in enumerate(batches):
            for name, value in self.validation_metrics(self._to_device(batch), number).items():
                figures[name].append(value)
        return {name: float(np.mean(values)) for name, values in figures.items()}

    def validation_metrics(self, batch: Sample, number: int) -> dict[str, float]:
        """Figures of validation batch `number`."""
        raise NotImplementedError

    def sample_picture(self) -> np.ndarray | None:
        """What the stage can do by now, as a picture (pH, pW, 3) uint8; None if it cannot show it."""
        return None

    def before_export(self) -> None:
        """Bring `model` into the form that is exported; called with the averaged weights in place."""

    def _generator(self, *address: str | int) -> torch.Generator:
        return torch.Generator().manual_seed(address_seed(self.config.train.seed, self.stage_name, *address))

    def _to_device(self, batch: Sample) -> Sample:
        return {name: tensor.to(self.device) for name, tensor in batch.items()}


@dataclass(frozen=True)
class StageParts:
    """What a stage hands to the trainer."""

    stage: Stage
    train: BatchSet
    val: Iterable[Sample]
    """The batches of a validation, the same ones each time."""


def window_parts(stage: Stage, train: SampleSet, val: SampleSet, run: RunConfig) -> StageParts:
    """Parts of a stage whose samples have one size: `train.batch_size` of them a batch."""
    train_batches, val_batches = (FixedBatches(samples, run.batch_size) for samples in (train, val))
    return StageParts(stage, train_batches, BatchStream(val_batches, num_batches=run.val_batches))


def mix_in(parts: StageParts, beside: Sequence[BatchSet], shares: Sequence[float]) -> StageParts:
    """The same parts, with a share of the steps made with each of the other sets."""
    if not beside:
        return parts
    sets, seed = [parts.train, *beside], parts.stage.config.train.seed
    return replace(parts, train=MixedBatches(sets, [1 - sum(shares), *shares], seed))


# --- data ----------------------------------------------------------------------------------------


def make_sources(config: DataConfig) -> tuple[TakeSource, TakeSource]:
    """Takes to train on and to validate on: the clips of a manifest, or shapes world."""
    if config.buckets:
        raise ValueError("data.buckets is read by the stage dit only: leave it out, clips are brought to data.shapes")
    if config.manifest is None:
        return ShapesTakes(config.shapes), ShapesTakes(config.shapes_val)
    from arlon.data.video_clips import VideoClips

    shapes = config.shapes
    clips = VideoClips(
        config.manifest,
        num_frames=shapes.num_frames,
        height=shapes.height,
        width=shapes.width,
        fps=shapes.fps,
    )
    if len(clips) <= config.val_clips:
        raise ValueError(
            f"{config.manifest!r} makes {len(clips)} takes, of which data.val_clips = {config.val_clips} are "
            "kept for validation: give more clips, or a smaller data.val_clips"
        )
    takes = VideoTakes(clips, clips.identity)
    first_val = len(clips) - config.val_clips
    return TakeRange(takes, range(first_val)), TakeRange(takes, range(first_val, len(clips)))


class TakeRange:
    """Some of the takes of a source."""

    def __init__(self, source: TakeSource, indices: range) -> None:
        self._source, self._indices = source, indices
        self.identity = {**source.identity, "first": indices.start}

    def __len__(self) -> int:
        return len(self._indices)

    def take(self, index: int) -> Any:
        """Take `index` of the range."""
        return self._source.take(self._indices[index])


@dataclass(frozen=True)
class CachedData:
    """Latents of both sets, and the captions of both if asked for."""

    train: LatentCache
    val: LatentCache
    texts: TextCache | None


def load_data(config: DataConfig, *, with_text: bool) -> CachedData:
    """Open the caches of latents and captions, building what is missing."""
    train_source, val_source = make_sources(config)
    encoder = load_encoder(config)

    def build(source: TakeSource, label: str) -> LatentCache:
        return build_latent_cache(
            source,
            encoder.encode,
            root=config.cache_dir,
            encoder_key=encoder.key,
            shard_size=config.shard_size,
            batch_size=config.encode_batch_size,
            progress=progress_bar(f"latents ({label})", "take"),
        )

    with torch.inference_mode():
        train, val = build(train_source, "train"), build(val_source, "val")
        if config.also:
            more = [build(ShapesTakes(part), f"train, {number}") for number, part in enumerate(config.also, start=2)]
            train = JoinedLatents([train, *more])
        texts = load_texts(config, [*train.all_captions(), *val.all_captions()]) if with_text else None
    return CachedData(train=train, val=val, texts=texts)


@dataclass(frozen=True)
class Encoder:
    """The frozen video VAE, and the hash of what decides its latents."""

    vae: VideoVAE
    key: str
    dtype: torch.dtype

    def encode(self, video: Tensor) -> Tensor:
        """Posterior mean of video (B, 3, pT, pH, pW) in [-1, 1], (B, C, T, H, W) float32, where the VAE is."""
        video = video.to(self.vae.shift.device)
        with torch.autocast(video.device.type, torch.bfloat16, enabled=self.dtype is torch.bfloat16):
            return self.vae.encode(video).float()


def load_encoder(config: DataConfig) -> Encoder:
    """The VAE that `data.vae` names, on a GPU if there is one."""
    device = _frozen_device()
    vae = load_frozen(VideoVAE, config.vae, "data.vae").to(device)
    named = config.encode_precision
    dtype = fast_dtype(device) if named == "auto" else getattr(torch, named)
    return Encoder(vae, hash_component(config.vae) + _precision_suffix(dtype), dtype)


def load_codes(config: DataConfig, cache: LatentCache, vqvae: nn.Module, folder: str) -> CodeCache:
    """Open the codes of a latent cache under the VQ-VAE in `folder`, building what is missing."""
    with torch.inference_mode():
        return build_code_cache(
            cache,
            vqvae.encode,
            root=config.cache_dir,
            encoder_key=hash_component(folder),
            progress=progress_bar("codes", "take"),
        )


def load_frozen(model_class: type[nn.Module], folder: str, key: str) -> Any:
    """Load a frozen component in eval mode, without gradients.

    Raises:
        FileNotFoundError: If it is not there; the message names the config key and how to get it.
    """
    try:
        model = load_component(model_class, folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{key} = {folder!r} holds no {model_class.__name__} ({error}); train that stage first, or set {key}"
        ) from error
    return model.eval().requires_grad_(False)


def progress_bar(label: str, unit: str) -> Progress:
    """A bar on stderr for the building of a cache; nothing is shown where nothing is built."""
    bars: list[tqdm] = []

    def show(done: int, total: int) -> None:
        if not bars:
            bars.append(tqdm(total=total, initial=0, desc=label, unit=unit, mininterval=1.0))
        bars[0].update(done - bars[0].n)
        if done >= total:
            bars[0].close()

    return show


def load_texts(config: DataConfig, captions: Sequence[str]) -> TextCache:
    """Open the cache of captions, encoding what is missing."""
    texts = open_texts(config)
    fill_texts(texts, config, captions)
    return texts


def open_texts(config: DataConfig) -> TextCache:
    """Open the cache of captions with what it holds."""
    key = "minilm" if config.text_encoder == "minilm" else hash_component(config.text_encoder)
    return TextCache(config.cache_dir, key + _precision_suffix(_text_dtype(config)), max_length=config.text_length)


def fill_texts(texts: TextCache, config: DataConfig, captions: Sequence[str]) -> None:
    """Encode the captions that a cache lacks. The encoder, a T5 of many gigabytes, is gone when this returns."""
    if all(caption in texts for caption in captions):
        return
    _encode_texts(texts, config, captions)
    gc.collect()  # networks may hold themselves in a ring
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _encode_texts(texts: TextCache, config: DataConfig, captions: Sequence[str]) -> None:
    encoder = make_text_encoder(config)
    texts.add(
        captions,
        lambda batch: encoder.encode(batch, batch_size=len(batch)),
        progress=progress_bar("captions", "caption"),
    )


def make_text_encoder(config: DataConfig) -> TextEncoder:
    """The frozen text encoder that `data.text_encoder` names, on a GPU if there is one."""
    options = {"device": _frozen_device(), "dtype": _text_dtype(config)}
    if config.text_encoder == "minilm":
        return MiniLMEncoder(max_length=config.text_length, **options)
    return load_text_encoder(config.text_encoder, **options)


def _text_dtype(config: DataConfig) -> torch.dtype:
    return getattr(torch, config.text_precision)


def _frozen_device() -> str:
    """Where frozen networks fill the caches."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _precision_suffix(dtype: torch.dtype) -> str:
    """What the key of a cache says of the precision of the network that filled it."""
    return "-bf16" if dtype is torch.bfloat16 else ""


def trim_text(batch: Sample) -> Sample:
    """Cut padding that all captions of a batch share: text (B, L, E) and its mask to L', a multiple of 8."""
    needed = int(batch["text_mask"].sum(dim=1).max())
    length = min(batch["text"].shape[1], -(-needed // TEXT_STEP) * TEXT_STEP)
    return batch | {"text": batch["text"][:, :length], "text_mask": batch["text_mask"][:, :length]}


# --- training ------------------------------------------------------------------------------------


def init_model(model: nn.Module, run: RunConfig, *, free: Sequence[str] = ()) -> nn.Module:
    """The model as it is, or with the weights of `train.init_from`; it is exported in the form of that folder.

    Args:
        model: Fresh model.
        run: Settings of the run.
        free: Config fields that do not shape the weights and may differ.

    Raises:
        ValueError: If that folder holds a model of another configuration.
    """
    if run.init_from is None:
        return model
    start = load_component(type(model), run.init_from)
    if replace(start.config, **{name: getattr(model.config, name) for name in free}) != model.config:
        raise ValueError(
            f"train.init_from = {run.init_from!r} has another configuration than this stage:"
            f"\n  there {start.config}"
            f"\n  here  {model.config}"
        )
    model.load_state_dict(start.state_dict())
    model.stored_form = start.stored_form
    return model


@dataclass(frozen=True)
class Training:
    """A trainer with the callbacks that the caller asks questions of."""

    trainer: L.Trainer
    checkpoints: Checkpoints
    average: WeightAverage
    stream: BatchStream


def make_training(
    parts: StageParts, run: RunConfig, optim: OptimConfig, run_dir: Path, *, extra: Iterable[L.Callback] = ()
) -> Training:
    """Trainer, callbacks and endless batches of a stage. Nothing is written before `fit`.

    Args:
        parts: The stage and its samples.
        run: Length and book-keeping.
        optim: Schedule and clipping.
        run_dir: Folder of checkpoints, figures, pictures and the export.
        extra: More callbacks, run after the others.
    """
    average, clock = WeightAverage(run.ema_decay), RunClock(optim, run)
    checkpoints = Checkpoints(run, run_dir, _exporter(average, run_dir))
    callbacks = [
        clock,
        average,
        Validate(average, parts.val, run.val_steps),
        SamplePictures(average, run_dir, run.sample_steps),
        ProgressLine(run, clock),
        checkpoints,
        *extra,
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Starting from v1.9.0, `tensorboardX`")
        trainer = L.Trainer(
            accelerator="auto",
            strategy=make_strategy(run, optim),
            devices=run.devices,
            num_nodes=run.num_nodes,
            precision=_resolved(run.precision),
            max_steps=run.max_steps,
            max_epochs=-1,
            gradient_clip_val=optim.grad_clip or None,
            log_every_n_steps=run.log_steps,
            callbacks=callbacks,
            logger=_loggers(run_dir),
            limit_val_batches=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=run_dir,
        )
    stream = BatchStream(
        parts.train,
        first_batch=lambda: trainer.global_step,
        shard=lambda: Shard(trainer.global_rank, trainer.world_size),
    )
    return Training(trainer=trainer, checkpoints=checkpoints, average=average, stream=stream)


def export_model(stage: Stage, average: WeightAverage, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write the averaged weights of a stage's model as a component folder; all processes call it, the first writes."""
    with average.applied(stage.model):
        stage.before_export()
        model = gathered(stage.model)
        if rank_zero_only.rank == 0:
            save_component(model, folder, dtype=dtype)


def _exporter(average: WeightAverage, run_dir: Path) -> Callable[[Stage], None]:
    return lambda stage: export_model(stage, average, run_dir / EXPORT_DIR)


def _resolved(precision: str) -> Any:
    """Lightning's name of a precision, on the device that its `accelerator="auto"` takes."""
    if precision != "auto":
        return precision
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return "bf16-mixed" if has_fast_bfloat16(device) else "32-true"


def _loggers(run_dir: Path) -> list[Any]:
    loggers: list[Any] = [JsonLinesLogger(run_dir)]
    try:
        from lightning.pytorch.loggers import TensorBoardLogger

        loggers.append(TensorBoardLogger(save_dir=run_dir, name="tensorboard", version=""))
    except ModuleNotFoundError:
        log.warning("tensorboard is not installed: figures and pictures go to files only")
    return loggers


# --- pictures ------------------------------------------------------------------------------------


def picture_of_videos(videos: Tensor, *, columns: int = 8, gap: int = 2) -> np.ndarray:
    """Contact sheet: one row a video (n, 3, pT, pH, pW) in [-1, 1], `columns` frames spread evenly over it.

    Returns:
        (pH', pW', 3) uint8, with `gap` dark pixels between frames.
    """
    chosen = torch.linspace(0, videos.shape[2] - 1, min(columns, videos.shape[2])).round().long()
    frames = ((videos[:, :, chosen].float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    frames = F.pad(frames, (0, gap, 0, gap), value=24)  # (n, 3, k, pH + gap, pW + gap)
    n, _, k, height, width = frames.shape
    sheet = frames.permute(0, 3, 2, 4, 1).reshape(n * height, k * width, 3)
    return sheet[: n * height - gap, : k * width - gap].numpy()
