"""Stage `inject`: trains projection, adapters, uncertainty sampling and semantic injection beside the frozen DiT.

Source: ARLON, arXiv:2410.20502, noise-resilient training: the coarse latent comes from a VQ-VAE of higher
compression than the one whose codes the AR model writes. The loss is that of the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from arlon.data.samples import LatentWindows, Sample
from arlon.models.injection import InjectionConfig, SemanticInjection
from arlon.models.stdit import Inject, Injection, STDiT3
from arlon.models.video_vae import VideoVAE
from arlon.models.vqvae import LatentVQVAE
from stages.common import Stage, StageParts, init_model, window_parts
from stages.config import DataConfig, FlowConfig, OptimConfig, RunConfig
from stages.data import CachedData, data_facts, load_codes, load_data, load_frozen, trim_text
from stages.flow_matching import draw_times, even_times, flow_losses, sample_latents, shift_for
from stages.pictures import example_batch, picture_of_pairs
from stages.record import TrainingFacts
from stages.registry import STAGES, StageKind

CoarseSource = Literal["coarser", "fine", "mix"]


@dataclass(frozen=True, kw_only=True)
class InjectStageConfig:
    """Settings of the stage."""

    injection: InjectionConfig = field(default_factory=InjectionConfig)
    dit: str = "runs/dit/export"
    """Component folder of the frozen base."""
    vqvae: str = "runs/vqvae/export"
    """Component folder of the fine VQ-VAE, whose codes are used in generation."""
    vqvae_coarser: str = "runs/vqvae_coarser/export"
    """Component folder of the coarser VQ-VAE."""
    coarse_source: CoarseSource = "coarser"
    """VQ-VAE whose reconstructions are injected in training; `mix` draws one of the two for each sample."""
    text_drop_prob: float = 0.1
    """Share of captions replaced by the null caption, so that classifier-free guidance has its unconditional half."""
    flow: FlowConfig = field(default_factory=FlowConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.text_drop_prob <= 1:
            raise ValueError(f"text_drop_prob must be in [0, 1], got {self.text_drop_prob}")

    @property
    def code_names(self) -> tuple[str, ...]:
        """Names of the codes that the training reads."""
        return ("coarser", "fine") if self.coarse_source == "mix" else (self.coarse_source,)


class InjectStage(Stage):
    """Training of a SemanticInjection for a frozen STDiT3."""

    stage_name: ClassVar[str] = "inject"
    config: InjectStageConfig
    model: SemanticInjection

    def __init__(
        self,
        config: InjectStageConfig,
        model: SemanticInjection,
        *,
        dit: STDiT3,
        vae: VideoVAE,
        vqvaes: dict[str, LatentVQVAE],
        take_latents: int,
        examples: Sample,
    ) -> None:
        """Set up the stage.

        Args:
            config: Its settings.
            model: What is trained.
            dit: The frozen base.
            vae: Decodes the pictures.
            vqvaes: By name, `fine` and `coarser` as far as they are read.
            take_latents: Latent frames of a whole take.
            examples: Clips of the pictures.
        """
        super().__init__(config, model, {"dit": dit, "vae": vae, **vqvaes})
        is_adaptive_norm = config.injection.design == "adaptive_norm"
        self.adamw_layers = ("projection", *(("to_modulation",) if is_adaptive_norm else ()))
        self._take_latents, self._examples = take_latents, examples

    def training_step(self, batch: Sample, batch_idx: int) -> Tensor:
        """Mean flow-matching loss of the frozen base with injected coarse features."""
        batch = trim_text(batch)
        generator, rows = self.step_generator(), self.row_generators(len(batch["latent"]))
        t = draw_times(self.config.flow, rows)
        batch = self._drop_text(batch, generator)
        coarse = self._coarse_latent(batch, generator)
        inject = self.model.condition(coarse, generator)
        loss = self._losses(batch, inject, t, rows).mean()
        self.log_figures(loss=loss)
        return loss

    def validation_metrics(self, batch: Sample, number: int) -> dict[str, float]:
        """`loss` with the fine codes of generation, `loss_base` without injection, at even times."""
        t = even_times(len(batch["latent"]))
        injects = {"loss": self.model.condition(self._decode("fine", batch)), "loss_base": None}
        return {
            name: float(self._losses(batch, inject, t, self.validation_generators(number, len(t))).mean())
            for name, inject in injects.items()
        }

    def sample_picture(self) -> np.ndarray:
        """Rows in pairs: a validation clip, and a clip made from its caption and its fine codes."""
        batch = self._to_device(self._examples)
        sampled = sample_latents(
            self.frozen["dit"],
            batch,
            self.config.flow,
            seed=self.config.train.seed,
            inject=self.model.condition(self._decode("fine", batch)),
        )
        return picture_of_pairs(self.frozen["vae"], batch["latent"], sampled)

    def training_facts(self) -> TrainingFacts:
        """Frames, length of captions and segment."""
        return data_facts(self.config.data, self.config.flow.windows)

    def _losses(
        self, batch: Sample, inject: Inject | Injection | None, t: Tensor, generators: Sequence[torch.Generator]
    ) -> Tensor:
        t = shift_for(self.config.flow, batch)(t)
        return flow_losses(self.frozen["dit"], batch, t, generators=generators, inject=inject)

    def _coarse_latent(self, batch: Sample, generator: torch.Generator) -> Tensor:
        """Coarse latents (B, C, T, H, W) of the windows, from the source the config names."""
        decoded = [self._decode(name, batch) for name in self.config.code_names]
        if len(decoded) == 1:
            return decoded[0]
        # `mix`: each sample has the coarse latent of one of the two VQ-VAEs.
        first = torch.rand(len(batch["latent"]), generator=generator) < 0.5
        return torch.where(first.to(decoded[0].device).view(-1, 1, 1, 1, 1), decoded[0], decoded[1])

    @torch.no_grad()
    def _decode(self, name: str, batch: Sample) -> Tensor:
        """Decode the codes of whole takes and cut out the windows, as generation does."""
        latent = batch["latent"]
        grid = (latent.shape[3], latent.shape[4])
        whole = self.frozen[name].decode(batch[f"codes_{name}"], num_latent_frames=self._take_latents, grid=grid)
        # Decoded as a whole before it is cut: the codes around a window change its borders.
        starts = batch["start"].tolist()
        return torch.stack([row[:, s : s + latent.shape[2]] for row, s in zip(whole, starts, strict=True)])

    def _drop_text(self, batch: Sample, generator: torch.Generator) -> Sample:
        text = batch["text"]
        drop = torch.rand(len(text), generator=generator) < self.config.text_drop_prob
        # Dropped here, since the frozen base is in eval mode and drops no caption itself.
        null = self.frozen["dit"].null_text(text.shape[1]).to(text)
        return batch | {"text": torch.where(drop.to(text.device)[:, None, None], null, text)}


def build(config: InjectStageConfig) -> StageParts:
    """Load the data and the frozen networks, and make the stage."""
    data = load_data(config.data, with_text=True)
    folders = {"fine": config.vqvae, "coarser": config.vqvae_coarser}
    wanted = {"fine", *config.code_names}
    vqvaes = {
        name: load_frozen(LatentVQVAE, folder, {"fine": "vqvae"}.get(name, "vqvae_coarser"))
        for name, folder in folders.items()
        if name in wanted
    }
    train, val = (_windows(config, data, which, vqvaes, folders) for which in ("train", "val"))
    dit = load_frozen(STDiT3, config.dit, "dit")
    check_blocks(config, dit)
    # Fresh weights are drawn from the global generator: loading data must not change them.
    torch.manual_seed(config.train.seed)
    model = SemanticInjection(config.injection)
    if config.train.start_folder is None:
        model.init_from(dit)
    stage = InjectStage(
        config,
        init_model(model, config.train),
        dit=dit,
        vae=load_frozen(VideoVAE, config.data.vae, "data.vae"),
        vqvaes=vqvaes,
        take_latents=data.train.latent_shape[1],
        examples=example_batch(val),
    )
    return window_parts(stage, train, val, config.train)


def check_blocks(config: InjectStageConfig, dit: STDiT3) -> None:
    """Refuse an injection into blocks that the base does not have.

    Raises:
        ValueError: If there are too few.
    """
    stop = config.injection.first_block + config.injection.num_blocks
    if stop > dit.config.depth:
        raise ValueError(
            f"injection.first_block + injection.num_blocks ({stop}) must be at most the depth of {config.dit!r}, "
            f"{dit.config.depth}"
        )


def _windows(
    config: InjectStageConfig,
    data: CachedData,
    which: str,
    vqvaes: dict[str, LatentVQVAE],
    folders: dict[str, str],
) -> LatentWindows:
    cache = data.train if which == "train" else data.val
    codes = {name: load_codes(config.data, cache, vqvae, folders[name]) for name, vqvae in vqvaes.items()}
    return LatentWindows(
        cache,
        config=config.flow.windows,
        seed=config.train.seed,
        size=config.data.frame_size,
        texts=data.texts,
        codes=codes,
    )


STAGES.add(
    "inject",
    StageKind(config_class=InjectStageConfig, build=build, model_class=SemanticInjection, model_key="injection"),
)
