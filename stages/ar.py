"""Stage `ar`: the code transformer, next-code cross-entropy with the caption as prefix.

Source: ARLON, arXiv:2410.20502, AR model: codes of the frozen fine VQ-VAE, teacher forcing, text dropped at
random for guidance. If a window crosses a prompt switch, only the codes after the switch are learned, with the new
caption as prefix, as in generation.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from arlon.data.datasets import ShapesTakesConfig
from arlon.data.latent_cache import CodeCache, LatentCache, TextCache
from arlon.data.samples import CodeWindows, FixedBatches, Sample
from arlon.diffusion.samplers import address_seed
from arlon.evaluation.metrics import unigram_entropy
from arlon.grids import ceil_div, num_latent_frames
from arlon.models.ar import CodeTransformer, CodeTransformerConfig, code_loss
from arlon.models.code_sampling import PromptSpan, SamplingConfig, generate_codes
from arlon.models.video_vae import VideoVAE
from arlon.models.vqvae import LatentVQVAE
from stages.common import Stage, StageParts, init_model, mix_in, window_parts
from stages.config import DataConfig, OptimConfig, RunConfig
from stages.data import data_facts, load_codes, load_data, load_frozen, trim_text
from stages.pictures import picture_of_pairs
from stages.record import TrainingFacts
from stages.registry import STAGES, StageKind

NUM_PICTURES = 3
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExtraTakesConfig:
    """Other rendered takes that some of the steps are made with, such as longer ones with more prompt switches."""

    shapes: ShapesTakesConfig = field(default_factory=ShapesTakesConfig)
    """Settings of the takes."""
    share: float = 0.5
    """Share of the training steps, in (0, 1)."""

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"extra_takes: share must be in (0, 1), got {self.share}")


@dataclass(frozen=True, kw_only=True)
class ARStageConfig:
    """Settings of the stage."""

    ar: CodeTransformerConfig = field(default_factory=CodeTransformerConfig)
    vqvae: str = "runs/vqvae/export"
    """Component folder of the fine VQ-VAE."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Sampling of the codes of the sample pictures."""
    code_noise: float = 0.0
    """Probability in [0, 1) that a code of the input is replaced by a random one. A model that has only seen true codes
    drifts after its own errors; noise also reduces memorisation."""
    extra_takes: tuple[ExtraTakesConfig, ...] = ()
    """Takes of the steps that are not made with those of `data`; a manifest replaces them, see `data.mix_rendered`."""
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.code_noise < 1:
            raise ValueError(f"code_noise must be in [0, 1), got {self.code_noise}")
        if sum(part.share for part in self.extra_takes) >= 1:
            raise ValueError("the shares of extra_takes leave no step for the takes of data: their sum must be below 1")

    @property
    def used_extra_takes(self) -> tuple[ExtraTakesConfig, ...]:
        """The extra takes that are trained on."""
        return self.extra_takes if self.data.uses_extra else ()


@dataclass(frozen=True)
class TakeExample:
    """A validation take for the pictures: its codes (cT, cH, cW) and its prompts in order."""

    codes: Tensor
    schedule: tuple[PromptSpan, ...]


class ARStage(Stage):
    """Training of a CodeTransformer on next-code prediction."""

    stage_name: ClassVar[str] = "ar"
    adamw_layers = ("text_proj", "head")
    config: ARStageConfig
    model: CodeTransformer

    def __init__(
        self,
        config: ARStageConfig,
        model: CodeTransformer,
        *,
        vqvae: LatentVQVAE,
        vae: VideoVAE,
        latent_shape: tuple[int, int, int, int],
        examples: Sequence[TakeExample],
    ) -> None:
        """Set up the stage.

        Args:
            config: Its settings.
            model: What is trained.
            vqvae: The fine VQ-VAE, which decodes codes of the sample pictures.
            vae: The video VAE, which decodes their latents.
            latent_shape: (C, T, H, W) of a take.
            examples: Takes whose prompts the sample pictures are made from.
        """
        super().__init__(config, model, {"vqvae": vqvae, "vae": vae})
        self._latent_shape, self._examples = latent_shape, tuple(examples)

    def training_step(self, batch: Sample, batch_idx: int) -> Tensor:
        """Cross-entropy of the next code, in nats."""
        batch, generator = trim_text(batch), self.step_generator()
        shown = replace_codes(batch["codes"], self.config.code_noise, self.config.ar.codebook_size, generator)
        logits = self.model(shown, batch["text"], batch["text_mask"], generator=generator)
        loss = code_loss(logits, batch["codes"], batch["is_end"], batch["loss_mask"])
        self.log_figures(loss=loss)
        return loss

    def validate(self, batches: Iterable[Sample]) -> dict[str, float]:
        """Figures over all learned codes of the validation batches.

        `loss`: cross-entropy in nats. `unigram_entropy`: entropy of the code frequencies in nats, the loss of a model
        that knows only these. `accuracy`: share of codes to which the model gives the highest probability.
        """
        losses, hits, codes = [], [], []
        for batch in batches:
            batch = self._to_device(batch)
            learned = batch["loss_mask"]
            # The logits behind the last code predict EOS, which is no code.
            logits = self.model(batch["codes"], batch["text"], batch["text_mask"])[:, :-1]
            target = batch["codes"][learned]
            losses.append(F.cross_entropy(logits[learned].float(), target, reduction="none"))
            hits.append(logits[learned].argmax(-1) == target)
            codes.append(target)
        return {
            "loss": float(torch.cat(losses).mean()),
            "accuracy": float(torch.cat(hits).float().mean()),
            "unigram_entropy": unigram_entropy(torch.cat(codes)),
        }

    def sample_picture(self) -> np.ndarray:
        """Contact sheet in pairs of rows: a validation take, decoded from its codes, and one made from its prompts."""
        made = [self._write(example, number) for number, example in enumerate(self._examples)]
        truth = torch.stack([example.codes for example in self._examples])
        return picture_of_pairs(self.frozen["vae"], self._decode(truth), self._decode(torch.cat(made)))

    def training_facts(self) -> TrainingFacts:
        """Frames, and the length of captions."""
        return data_facts(self.config.data)

    def _write(self, example: TakeExample, number: int) -> Tensor:
        seed = self.config.train.seed

        def generator_for_frame(frame: int) -> torch.Generator:
            return torch.Generator().manual_seed(address_seed(seed, "ar", "sample picture", number, frame))

        return generate_codes(
            self.model,
            example.schedule,
            generator_for_frame=generator_for_frame,
            sampling=self.config.sampling,
        )

    def _decode(self, codes: Tensor) -> Tensor:
        _, frames, height, width = self._latent_shape
        with torch.no_grad():
            return self.frozen["vqvae"].decode(codes.to(self.device), num_latent_frames=frames, grid=(height, width))


def replace_codes(codes: Tensor, share: float, codebook_size: int, generator: torch.Generator) -> Tensor:
    """Replace each of the codes (any shape, int64) by a uniformly drawn one with probability `share`."""
    if not share:
        return codes
    chosen = torch.rand(codes.shape, generator=generator) < share
    # A replacement may be the same code by chance.
    others = torch.randint(codebook_size, codes.shape, generator=generator)
    return torch.where(chosen.to(codes.device), others.to(codes.device), codes)


def span_schedule(cache: LatentCache, index: int, texts: TextCache, *, num_frames: int, ratio: int) -> list[PromptSpan]:
    """Captions of a take as prompts over its `num_frames` code frames of `ratio` latent frames each."""
    spans = cache.spans(index)
    # A code frame belongs to the caption of its first latent frame.
    starts = [ceil_div(num_latent_frames(s.start_frame) if s.start_frame else 0, ratio) for s in spans]
    schedule = []
    for span, start, stop in zip(spans, starts, [*starts[1:], num_frames], strict=True):
        tokens, mask = texts.features(span.captions[0])
        schedule.append(PromptSpan(text=tokens[None], text_mask=mask[None], num_code_frames=stop - start))
    return schedule


def build(config: ARStageConfig) -> StageParts:
    """Load data and codes, and make the stage.

    Raises:
        ValueError: If the transformer does not fit the VQ-VAE.
    """
    vqvae = load_frozen(LatentVQVAE, config.vqvae, "vqvae")
    data = load_data(config.data, with_text=True)
    assert data.texts is not None
    val_codes = load_codes(config.data, data.val, vqvae, config.vqvae)
    check_fit(config, vqvae, val_codes)
    ratio = vqvae.config.ratio[0]

    def windows(cache: LatentCache, texts: TextCache) -> CodeWindows:
        return CodeWindows(
            cache,
            load_codes(config.data, cache, vqvae, config.vqvae),
            texts=texts,
            num_frames=config.ar.max_code_frames,
            time_ratio=ratio,
            seed=config.train.seed,
        )

    train, val = windows(data.train, data.texts), windows(data.val, data.texts)
    if config.extra_takes and not config.used_extra_takes:
        log.info("data.manifest replaces the takes of extra_takes; data.mix_rendered=true keeps them")
    extra = []
    for part in config.used_extra_takes:
        # The same data settings with other takes, and never with a manifest or extra takes of its own.
        other = load_data(replace(config.data, manifest=None, extra_shapes=(), shapes=part.shapes), with_text=True)
        assert other.texts is not None
        extra.append(FixedBatches(windows(other.train, other.texts), config.train.batch_size))
    # Fresh weights are drawn from the global generator: loading data must not change them.
    torch.manual_seed(config.train.seed)
    num_frames = val_codes.code_shape[0]
    stage = ARStage(
        config,
        init_model(CodeTransformer(config.ar), config.train),
        vqvae=vqvae,
        vae=load_frozen(VideoVAE, config.data.vae, "data.vae"),
        latent_shape=data.val.latent_shape,
        examples=[
            TakeExample(
                val_codes.codes(i),
                tuple(span_schedule(data.val, i, data.texts, num_frames=num_frames, ratio=ratio)),
            )
            for i in range(min(NUM_PICTURES, len(data.val)))
        ],
    )
    parts = window_parts(stage, train, val, config.train)
    return mix_in(parts, extra, [part.share for part in config.used_extra_takes])


def check_fit(config: ARStageConfig, vqvae: LatentVQVAE, codes: CodeCache) -> None:
    """Refuse a transformer that cannot read the codes; all problems are listed.

    Raises:
        ValueError: If codebook size, code grid or text length differ.
    """
    problems = []
    if config.ar.codebook_size != vqvae.config.codebook_size:
        problems.append(
            f"ar.codebook_size ({config.ar.codebook_size}) must be that of {config.vqvae!r}: "
            f"{vqvae.config.codebook_size}"
        )
    if tuple(config.ar.grid) != codes.code_shape[1:]:
        problems.append(f"ar.grid {tuple(config.ar.grid)} must be the code grid of the data: {codes.code_shape[1:]}")
    if config.ar.max_text < config.data.text_length:
        problems.append(f"ar.max_text ({config.ar.max_text}) must hold data.text_length = {config.data.text_length}")
    if problems:
        raise ValueError("\n".join(problems))


STAGES.add(
    "ar",
    StageKind(config_class=ARStageConfig, build=build, model_class=CodeTransformer, model_key="ar"),
)
