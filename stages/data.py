"""Data of the stages: takes, frozen networks, and caches of the latents, codes and text features that these compute."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from arlon.checkpoint import hash_component, load_component
from arlon.components import Component
from arlon.data.datasets import ShapesTakes, TakeSource, VideoTakes
from arlon.data.latent_cache import (
    CodeCache,
    JoinedLatents,
    LatentCache,
    ProgressCallback,
    TextCache,
    build_code_cache,
    build_latent_cache,
)
from arlon.data.samples import Sample, WindowConfig
from arlon.models.video_vae import VideoVAE
from arlon.models.vqvae import LatentVQVAE
from arlon.precision import fast_dtype
from arlon.text.encoders import MiniLMEncoder, TextEncoder, load_text_encoder
from stages.config import DataConfig
from stages.record import TrainingFacts

TEXT_STEP = 8
M = TypeVar("M", bound=Component)
log = logging.getLogger(__name__)


def make_sources(config: DataConfig) -> tuple[TakeSource, TakeSource]:
    """Training and validation takes: the clips of a manifest, or rendered takes of shapes world."""
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
            "used for validation: give more clips, or a smaller data.val_clips"
        )
    takes = VideoTakes(clips, clips.identity)
    first_val = len(clips) - config.val_clips
    return TakeRange(takes, range(first_val)), TakeRange(takes, range(first_val, len(clips)))


def data_facts(config: DataConfig, windows: WindowConfig | None = None) -> TrainingFacts:
    """What a stage that reads latents learns from: frames, captions and, if it learns segments, their length.

    Clips in buckets have many sizes, lengths and, unless `data.clip_fps` is given, frame rates.
    """
    if config.buckets:
        return TrainingFacts(fps=config.clip_fps, text_length=config.text_length)
    shapes = config.shapes
    facts = TrainingFacts(height=shapes.height, width=shapes.width, fps=shapes.fps, text_length=config.text_length)
    return facts if windows is None else replace(facts, segment=windows.latent_frames, overlap=windows.overlap)


class TakeRange:
    """A range of the takes of a source."""

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
    """Latents of the training and the validation set, and their captions if the stage reads text."""

    train: LatentCache
    val: LatentCache
    texts: TextCache | None


def load_data(config: DataConfig, *, with_text: bool) -> CachedData:
    """Open the caches of latents and captions; missing entries are computed."""
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
        if config.extra_shapes and config.uses_extra:
            numbered = enumerate(config.extra_shapes, start=2)
            more = [build(ShapesTakes(part), f"train, {number}") for number, part in numbered]
            train = JoinedLatents([train, *more])
        elif config.extra_shapes:
            log.info("data.manifest replaces the takes of data.extra_shapes; data.mix_rendered=true keeps them")
        texts = load_texts(config, [*train.all_captions(), *val.all_captions()]) if with_text else None
    return CachedData(train=train, val=val, texts=texts)


@dataclass(frozen=True)
class Encoder:
    """The frozen video VAE, with a key that changes whenever its latents would."""

    vae: VideoVAE
    key: str
    dtype: torch.dtype

    def encode(self, video: Tensor) -> Tensor:
        """Posterior mean of video (B, 3, pT, pH, pW) in [-1, 1], (B, C, T, H, W) float32, where the VAE is."""
        video = video.to(self.vae.shift.device)
        with torch.autocast(video.device.type, torch.bfloat16, enabled=self.dtype is torch.bfloat16):
            return self.vae.encode(video).float()


def load_encoder(config: DataConfig) -> Encoder:
    """Load the VAE that `data.vae` names, onto a GPU if there is one."""
    device = _frozen_device()
    vae = load_frozen(VideoVAE, config.vae, "data.vae").to(device)
    named = config.encode_precision
    dtype = fast_dtype(device) if named == "auto" else getattr(torch, named)
    return Encoder(vae, hash_component(config.vae) + _precision_suffix(dtype), dtype)


def load_codes(config: DataConfig, cache: LatentCache, vqvae: LatentVQVAE, folder: str) -> CodeCache:
    """Open the codes of a latent cache under the VQ-VAE in `folder`; missing codes are computed."""
    with torch.inference_mode():
        return build_code_cache(
            cache,
            vqvae.encode,
            root=config.cache_dir,
            encoder_key=hash_component(folder),
            progress=progress_bar("codes", "take"),
        )


def load_frozen(model_class: type[M], folder: str, key: str) -> M:
    """Load a frozen component in eval mode, without gradients.

    Raises:
        FileNotFoundError: If the folder holds no component; the message names the config key and the remedy.
    """
    try:
        model = load_component(model_class, folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{key} = {folder!r} holds no {model_class.__name__} ({error}); train that stage first, or set {key}"
        ) from error
    return model.eval().requires_grad_(False)


def progress_bar(label: str, unit: str) -> ProgressCallback:
    """Progress bar on stderr for building a cache; it appears with the first entry that is computed."""
    bars: list[tqdm] = []

    def show(done: int, total: int) -> None:
        if not bars:
            bars.append(tqdm(total=total, initial=0, desc=label, unit=unit, mininterval=1.0))
        bars[0].update(done - bars[0].n)
        if done >= total:
            bars[0].close()

    return show


def load_texts(config: DataConfig, captions: Sequence[str]) -> TextCache:
    """Open the cache of captions and encode the missing ones."""
    texts = open_texts(config)
    fill_texts(texts, config, captions)
    return texts


def open_texts(config: DataConfig) -> TextCache:
    """Open the cache of captions as it is on disk."""
    key = "minilm" if config.text_encoder == "minilm" else hash_component(config.text_encoder)
    return TextCache(config.cache_dir, key + _precision_suffix(_text_dtype(config)), max_length=config.text_length)


def fill_texts(texts: TextCache, config: DataConfig, captions: Sequence[str]) -> None:
    """Encode the captions that a cache lacks. The encoder, which may hold many gigabytes, is freed on return."""
    if all(caption in texts for caption in captions):
        return
    _encode_texts(texts, config, captions)
    gc.collect()  # modules may be kept alive by reference cycles
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
    """Load the frozen text encoder that `data.text_encoder` names, onto a GPU if there is one."""
    options: dict[str, Any] = {"device": _frozen_device(), "dtype": _text_dtype(config)}
    if config.text_encoder == "minilm":
        return MiniLMEncoder(max_length=config.text_length, **options)
    return load_text_encoder(config.text_encoder, **options)


def _text_dtype(config: DataConfig) -> torch.dtype:
    return getattr(torch, config.text_precision)


def _frozen_device() -> str:
    """Device on which frozen networks fill the caches."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _precision_suffix(dtype: torch.dtype) -> str:
    """Part of a cache key that tells the precision of the network that filled the cache."""
    return "-bf16" if dtype is torch.bfloat16 else ""


def trim_text(batch: Sample) -> Sample:
    """Cut padding that all captions of a batch share: text (B, L, E) and its mask to a shorter L, a multiple of 8."""
    needed = int(batch["text_mask"].sum(dim=1).max())
    length = min(batch["text"].shape[1], -(-needed // TEXT_STEP) * TEXT_STEP)
    return batch | {"text": batch["text"][:, :length], "text_mask": batch["text_mask"][:, :length]}
