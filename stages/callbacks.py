"""Callbacks of a training: averages, validation, sample pictures, checkpoints and progress.

All of them count optimizer steps (`trainer.global_step`), never epochs or batches, so that a resumed run does the same
things at the same steps as an uninterrupted one.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from tqdm import tqdm

from arlon.files import append_line, make_folder, publish, sync_file, temporary_beside
from stages.config import RunConfig
from stages.parallel import from_first_process, on_any_process, placed_like, whole_tensor
from stages.pictures import write_png

LAST_CHECKPOINT = Path("checkpoints") / "last.ckpt"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Signals that end a training so that it can be resumed: Ctrl-C, and the one that schedulers send."""


class RunClock(L.Callback):
    """Counts training time over all resumptions, and ends the run when its minutes are over."""

    def __init__(self, run: RunConfig) -> None:
        self._run = run
        self._before_s = 0.0
        self._started_s: float | None = None

    @property
    def elapsed_s(self) -> float:
        """Seconds of training so far."""
        now = 0.0 if self._started_s is None else monotonic() - self._started_s
        return self._before_s + now

    def progress(self, step: int) -> float:
        """Share of the run that is done, in [0, 1]: by steps, or by time if that is further."""
        by_time = 0.0 if self._run.max_minutes is None else self.elapsed_s / (60 * self._run.max_minutes)
        return min(1.0, max(step / self._run.max_steps, by_time))

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._started_s = monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        limit = self._run.max_minutes
        if limit is not None and from_first_process(trainer, self.elapsed_s >= 60 * limit):
            trainer.should_stop = True

    def state_dict(self) -> dict[str, float]:
        return {"elapsed_s": self.elapsed_s}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self._before_s = float(state_dict["elapsed_s"])


class WeightAverage(L.Callback):
    """Exponential moving average of `pl_module.model`, in float32, stored in checkpoints.

    After n steps the decay is min(decay, (1 + n) / (10 + n)), so that the start is forgotten soon. Buffers are not
    averaged. Lightning's `EMAWeightAveraging` is not used: it does not work with sharded models, keeps a copy of frozen
    weights too, and ends a training by overwriting the trained weights, so that none could be trained further.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._average: dict[str, Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        own = {name: p.detach() for name, p in pl_module.model.named_parameters() if p.requires_grad}
        if self._average:
            self._average = {name: placed_like(average, own[name]) for name, average in self._average.items()}
        else:
            self._average = {name: parameter.float().clone() for name, parameter in own.items()}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        decay = min(self._decay, (1 + step) / (10 + step))
        for name, parameter in pl_module.model.named_parameters():
            if name in self._average:
                self._average[name].lerp_(parameter.detach().float(), 1 - decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Context in which the averaged weights replace the trained ones, in eval mode and without gradients."""
        own = {name: p for name, p in model.named_parameters() if name in self._average}
        kept = {name: p.detach().clone() for name, p in own.items()}
        training = model.training
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(self._average[name])
            model.eval()
            try:
                yield
            finally:
                for name, parameter in own.items():
                    parameter.copy_(kept[name])
                model.train(training)

    def state_dict(self) -> dict[str, Tensor]:
        return {name: whole_tensor(average) for name, average in self._average.items()}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        self._average = {name: tensor.clone() for name, tensor in state_dict.items()}


class Validate(L.Callback):
    """Every `every` steps: `pl_module.validate` on the validation batches, with averaged weights."""

    def __init__(self, average: WeightAverage, batches: Any, every: int) -> None:
        self._average, self._batches, self._every = average, batches, every

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._every and trainer.global_step % self._every == 0:
            metrics = self.run(pl_module)  # in every process: a sharded model needs all of them
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)

    def run(self, pl_module: Any) -> dict[str, float]:
        """Validate now; names get the prefix `val/`."""
        with self._average.applied(pl_module.model):
            return {f"val/{name}": value for name, value in pl_module.validate(self._batches).items()}


class SamplePictures(L.Callback):
    """Every `every` steps: `pl_module.sample_picture()` to `samples/step_000500.png` and TensorBoard."""

    def __init__(self, average: WeightAverage, run_dir: Path, every: int) -> None:
        self._average, self._folder, self._every = average, run_dir / "samples", every

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self._every or trainer.global_step % self._every:
            return
        with self._average.applied(pl_module.model):
            picture = pl_module.sample_picture()
        if picture is None or not trainer.is_global_zero:
            return
        write_png(self._folder / f"step_{trainer.global_step:06d}.png", picture)
        for logger in trainer.loggers:
            experiment = getattr(logger, "experiment", None)
            if experiment is not None and hasattr(experiment, "add_image"):
                experiment.add_image("samples", picture, trainer.global_step, dataformats="HWC")


class Checkpoints(L.Callback):
    """Writes the exported average and a checkpoint: every few minutes, at the end, on Ctrl-C and on SIGTERM.

    The first of these signals lets the current step end, writes both and stops; a second one stops at once and leaves
    the last checkpoint as it is.
    """

    def __init__(self, run: RunConfig, run_dir: Path, export: Callable[[Any, int], None]) -> None:
        self._run, self._path, self._export = run, run_dir / LAST_CHECKPOINT, export
        self._saved_s, self._saved_step = 0.0, -1
        self._between_steps = True
        self._previous_handlers: dict[int, Any] = {}
        self.interrupted = False

    @property
    def path(self) -> Path:
        """The checkpoint to resume from."""
        return self._path

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._saved_s, self._saved_step = monotonic(), trainer.global_step
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._previous_handlers[number] = signal.signal(number, self._handle_interrupt(trainer))

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._between_steps = False

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._between_steps = True
        every = self._run.checkpoint_steps
        due = from_first_process(trainer, monotonic() - self._saved_s >= 60 * self._run.checkpoint_minutes)
        self.interrupted = on_any_process(trainer, self.interrupted)
        if self.interrupted:
            trainer.should_stop = True
        if due or self.interrupted or (every and trainer.global_step % every == 0):
            self.save(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.save(trainer, pl_module)
        self._restore_handlers()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._restore_handlers()
        if isinstance(exception, KeyboardInterrupt):
            self.interrupted = True
            alone = trainer.world_size == 1  # the others may be within a step, and would not answer
            if alone and self._between_steps and trainer.global_step:
                self.save(trainer, pl_module)

    def save(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write checkpoint and export now, unless this step has been written."""
        if from_first_process(trainer, trainer.global_step == self._saved_step and self._path.exists()):
            return
        # The export comes first: a checkpoint that has reached the end of a run then means that its export is complete.
        self._export(pl_module, trainer.global_step)
        make_folder(self._path.parent)
        temporary = temporary_beside(self._path)
        try:
            trainer.save_checkpoint(temporary)  # all processes take part, the first writes
            if trainer.is_global_zero:
                sync_file(temporary)
                publish(temporary, self._path)
        finally:
            temporary.unlink(missing_ok=True)
        self._saved_s, self._saved_step = monotonic(), trainer.global_step

    def _handle_interrupt(self, trainer: L.Trainer) -> Callable[[int, Any], None]:
        def handle(signal_number: int, frame: Any) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            trainer.should_stop = True

        return handle

    def _restore_handlers(self) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers.clear()


class ProgressLine(L.Callback):
    """Progress on stderr: step, loss, samples per second and elapsed time; rarely if stderr is no terminal."""

    def __init__(self, run: RunConfig, clock: RunClock) -> None:
        self._run, self._clock = run, clock
        self._bar: tqdm | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        self._bar = tqdm(
            total=self._run.max_steps,
            initial=trainer.global_step,
            desc=pl_module.stage_name,
            unit="step",
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
            dynamic_ncols=True,
        )
        self._samples, self._first_s = 0, monotonic()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]  # at the end of the batch it is that of the next one

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._bar is None:
            return
        self._samples += len(next(iter(batch.values()))) * trainer.world_size
        if trainer.global_step % self._run.log_steps == 0:
            samples = self._samples / max(monotonic() - self._first_s, 1e-9)
            fields = {"samples/s": f"{samples:.1f}"}
            loss = trainer.callback_metrics.get("train/loss")
            if loss is not None:
                fields = {"loss": f"{float(loss):.4f}", **fields}
            if self._run.max_minutes is not None:
                fields["min"] = f"{self._clock.elapsed_s / 60:.1f}/{self._run.max_minutes:g}"
            self._bar.set_postfix(fields, refresh=False)
            metrics = {
                "train/samples_per_s": samples,
                "train/lr": self._lr,
                "train/elapsed_min": self._clock.elapsed_s / 60,
            }
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)
        self._bar.update(1)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class JsonLinesLogger(Logger):
    """Appends every set of figures to `metrics.jsonl`: {"step": 10, "train/loss": 0.5}."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__()
        self._path = run_dir / "metrics.jsonl"

    @property
    def name(self) -> str:
        return "jsonl"

    @property
    def version(self) -> str:
        return ""

    @property
    def experiment(self) -> None:
        return None

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The resolved configuration is a file of its own."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one line."""
        line = {"step": step, **{name: float(value) for name, value in metrics.items() if name != "epoch"}}
        if len(line) > 1:
            make_folder(self._path.parent)
            append_line(self._path, line)
