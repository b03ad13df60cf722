"""What all stages share: the base module, the trainer and the export."""

from __future__ import annotations

import logging
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from arlon.checkpoint import load_component, save_component
from arlon.components import Component
from arlon.config import config_to_dict
from arlon.data.samples import BatchSet, BatchStream, FixedBatches, MixedBatches, Sample, SampleSet, Shard
from arlon.diffusion.samplers import address_seed
from arlon.precision import has_fast_bfloat16
from stages.callbacks import (
    Checkpoints,
    JsonLinesLogger,
    ProgressLine,
    RunClock,
    SamplePictures,
    Validate,
    WeightAverage,
)
from stages.config import OptimConfig, RunConfig
from stages.optim import lr_factor, make_optimizer
from stages.parallel import from_first_process, gathered, is_first_process, make_strategy, shard_model
from stages.record import TrainingFacts, write_record

EXPORT_DIR = "export"
M = TypeVar("M", bound=Component)
log = logging.getLogger(__name__)


class Stage(L.LightningModule):
    """Base class of all stages; `model` is trained, averaged and exported.

    Every draw of step n comes from a generator seeded by (seed, stage, n) and the process or the row of the batch, and
    the global generator is seeded likewise before each step, so that a resumed training continues exactly as an
    uninterrupted one. Draws by row do not depend on how many processes share the rows.
    """

    stage_name: ClassVar[str]
    model: Component
    adamw_layers: Sequence[str] = ()
    """Modules of `model` that AdamW takes although Muon could: those that read an input, embed a condition or write the
    output; see `stages.optim.hidden_matrices`."""

    def __init__(self, config: Any, model: Component, frozen: Mapping[str, Any] | None = None) -> None:
        """Set up a stage.

        Args:
            config: Configuration of the stage, with `optim` and `train` among its fields.
            model: Network that is trained, averaged and exported.
            frozen: Networks that are not trained. In a dict they are no submodules, so checkpoints stay small.
        """
        super().__init__()
        self.save_hyperparameters({"config": config_to_dict(config)})
        self.config, self.model = config, model
        self.frozen: dict[str, Any] = dict(frozen or {})
        self.progress: Callable[[int], float] = lambda step: min(1.0, step / config.train.max_steps)
        """Share of the run that is done when a step begins; `make_training` also counts time."""

    def configure_model(self) -> None:
        """Shard the model if the strategy shards."""
        if self.device_mesh is not None:
            shard_model(self.model, self.device_mesh["data_parallel"])

    def on_fit_start(self) -> None:
        for network in self.frozen.values():
            network.to(self.device)

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.model, self.config.optim, self.adamw_layers)
        self._settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        schedule = LambdaLR(optimizer, lambda step: self.lr_factor(step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_factor(self, step: int) -> float:
        """Learning rate of a step over its peak."""
        return lr_factor(self.config.optim, step=step, progress=self.progress(step))

    def on_train_start(self) -> None:
        """Apply the configured rates and decays: a checkpoint brings those that it was written with."""
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        schedule: Any = self.lr_schedulers()  # one of each: see `configure_optimizers`
        schedule.last_epoch = self.global_step
        schedule.base_lrs = [settings["lr"] for settings in self._settings]
        factor = self.lr_factor(self.global_step)
        for group, settings in zip(optimizer.param_groups, self._settings, strict=True):
            group.update(settings, lr=settings["lr"] * factor)

    def on_train_batch_start(self, batch: Sample, batch_idx: int) -> None:
        address = ("global", self.global_step, self.global_rank)
        torch.manual_seed(address_seed(self.config.train.seed, self.stage_name, *address))

    def step_generator(self) -> torch.Generator:
        """CPU generator for the draws of this step in this process."""
        return self._generator("step", self.global_step, self.global_rank)

    def row_generators(self, count: int) -> list[torch.Generator]:
        """CPU generators for the draws of this step, one for each of the `count` rows of this process."""
        first = self.global_rank * count
        return [self._generator("row", self.global_step, first + row) for row in range(count)]

    def validation_generators(self, number: int, count: int) -> list[torch.Generator]:
        """CPU generators for the draws of validation batch `number`, one for each of its `count` rows."""
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
        """Picture (pH, pW, 3) uint8 of what the model can do so far; None if the stage has none."""
        return None

    def before_export(self) -> None:
        """Bring `model` into the form that is exported; called with the averaged weights in place."""

    def training_facts(self) -> TrainingFacts:
        """Properties of the training data that the exported model must be used with."""
        return TrainingFacts()

    def _generator(self, *address: str | int) -> torch.Generator:
        return torch.Generator().manual_seed(address_seed(self.config.train.seed, self.stage_name, *address))

    def _to_device(self, batch: Sample) -> Sample:
        return {name: tensor.to(self.device) for name, tensor in batch.items()}


@dataclass(frozen=True)
class StageParts:
    """Module and data of a stage, for the trainer."""

    stage: Stage
    train: BatchSet
    val: Iterable[Sample]
    """Batches of a validation, the same every time."""


def window_parts(stage: Stage, train: SampleSet, val: SampleSet, run: RunConfig) -> StageParts:
    """Parts of a stage whose samples have one size: `train.batch_size` of them a batch."""
    train_batches, val_batches = (FixedBatches(samples, run.batch_size) for samples in (train, val))
    return StageParts(stage, train_batches, BatchStream(val_batches, num_batches=run.val_batches))


def mix_in(parts: StageParts, extra: Sequence[BatchSet], shares: Sequence[float]) -> StageParts:
    """Make a share of the training steps with batches of each of the extra sets."""
    if not extra:
        return parts
    sets, seed = [parts.train, *extra], parts.stage.config.train.seed
    return replace(parts, train=MixedBatches(sets, [1 - sum(shares), *shares], seed))


def init_model(model: M, run: RunConfig, *, free: Sequence[str] = ()) -> M:
    """The model as it is, or with the weights that the run starts from; it is exported in the form of that folder.

    Args:
        model: Fresh model.
        run: Settings of the run.
        free: Config fields that do not shape the weights and may differ.

    Raises:
        ValueError: If that folder holds a model of another configuration.
    """
    if run.start_folder is None:
        return model
    start = load_component(type(model), run.start_folder)
    there: Any = start.config
    if replace(there, **{name: getattr(model.config, name) for name in free}) != model.config:
        key = "init_from" if run.previous_part is None else "previous_part"
        raise ValueError(
            f"train.{key} = {run.start_folder!r} has another configuration than this stage:"
            f"\n  there {there}"
            f"\n  here  {model.config}"
        )
    model.load_state_dict(start.state_dict())
    model.stored_form = start.stored_form
    return model


@dataclass(frozen=True)
class Training:
    """A trainer with the callbacks that are used after the training."""

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
    average, clock = WeightAverage(run.ema_decay), RunClock(run)
    checkpoints = Checkpoints(run, run_dir, lambda stage, step: export_run(stage, average, run_dir, step))
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
    parts.stage.progress = lambda step: from_first_process(trainer, clock.progress(step)) if step else 0.0
    stream = BatchStream(
        parts.train,
        first_batch=lambda: trainer.global_step,
        shard=lambda: Shard(trainer.global_rank, trainer.world_size),
    )
    return Training(trainer=trainer, checkpoints=checkpoints, average=average, stream=stream)


def export_run(stage: Stage, average: WeightAverage, run_dir: Path, step: int) -> None:
    """Write the averaged weights of a stage's model as `export/` of its run folder, and the record beside it.

    Every process calls it, since sharded weights are gathered from all of them; the first one writes.
    """
    with average.applied(stage.model):
        stage.before_export()
        model = gathered(stage.model)
        if is_first_process():
            save_component(model, run_dir / EXPORT_DIR)
            write_record(run_dir, stage=stage.stage_name, step=step, facts=stage.training_facts())


def export_checkpoint(stage: Stage, checkpoint: Path, run_dir: Path) -> None:
    """Write the export of a finished run again from its last checkpoint, without a trainer."""
    values = torch.load(checkpoint, map_location="cpu", weights_only=True)
    stage.load_state_dict(values["state_dict"])
    average = WeightAverage(stage.config.train.ema_decay)
    average.load_state_dict(values["callbacks"][average.state_key])
    export_run(stage, average, run_dir, int(values["global_step"]))


def _resolved(precision: str) -> Any:
    """Resolve the precision `auto` for the device that Lightning chooses."""
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
