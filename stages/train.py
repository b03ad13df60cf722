"""Train one stage: `python -m stages.train STAGE [--config FILE] [key=value ...]`.

The run folder holds `config.yaml` (resolved), `history.jsonl` (what later commands changed in it), `metrics.jsonl`,
`tensorboard/`, `samples/`, `checkpoints/last.ckpt`, `export/` (the component folder with averaged weights) and
`export.json` (what they were trained on). Exit codes: 0 the run is finished, now or before; 1 failed; 2 wrong usage;
130 interrupted by Ctrl-C or SIGTERM, to be resumed by the same command.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from arlon.memory import keep_freed_memory
from arlon.threads import limit_spinning
from stages.registry import BUILT_IN, stage_kind

if TYPE_CHECKING:
    from arlon.components import Component
    from stages.common import StageParts, Training
    from stages.config import RunConfig

FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130
MAX_LINES = 24
"""How many lines of an error are shown."""
CHECKPOINT_KEYS = ("state_dict", "callbacks", "optimizer_states", "loops", "global_step")


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    run_dir: Path
    step: int
    """Optimizer steps that the run has made."""
    interrupted: bool
    is_first: bool = True
    """Whether this is the first process of the training, the one that reports."""
    was_finished: bool = False
    """Whether the run had reached its limits before, so that no step was made."""


@dataclass(frozen=True)
class TrainingProgress:
    """How far a checkpoint is."""

    step: int
    """Optimizer steps."""
    elapsed_s: float
    """Seconds of training, interruptions left out."""

    def reaches(self, run: RunConfig) -> bool:
        """Whether the limits of a run leave nothing to train."""
        in_time = run.max_minutes is None or self.elapsed_s < 60 * run.max_minutes
        return self.step >= run.max_steps or not in_time


def load_stage_config(stage: str, files: list[Path], overrides: list[str]) -> Any:
    """Configuration of a stage from YAML files and `key=value` overrides; later ones win."""
    from arlon.config import load_config

    return load_config(stage_kind(stage).config_class, files, overrides)


def find_checkpoint(run_dir: Path, resume: str) -> Path | None:
    """Checkpoint that `--resume` means: `auto` is the run's own if there is one, `never` none, else a file.

    Raises:
        FileNotFoundError: If a named checkpoint is not there.
        FileExistsError: If `never` would overwrite a run.
    """
    from stages.callbacks import LAST_CHECKPOINT

    own = run_dir / LAST_CHECKPOINT
    if resume == "auto":
        return own if own.exists() else None
    if resume == "never":
        if own.exists():
            raise FileExistsError(
                f"{str(run_dir)!r} holds a run already: resume it with --resume auto, or give another --output"
            )
        return None
    if not Path(resume).is_file():
        raise FileNotFoundError(f"no checkpoint {resume!r} to resume from; --resume takes auto, never or a file")
    return Path(resume)


def check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be written, or not be made where it is missing; nothing is created.

    Raises:
        OSError: If so.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise OSError(f"cannot write to '{folder}': '{there}' is not a folder")
    if not os.access(there, os.W_OK):
        raise OSError(f"cannot write to '{folder}': no permission for '{there}'")


def read_progress(path: Path) -> TrainingProgress:
    """How far a checkpoint is; a file that no training can be resumed from is refused.

    Raises:
        ValueError: If it is damaged, or no checkpoint of a stage.
    """
    import pickle

    import torch

    hint = "remove it to start afresh, or name another one with --resume"
    try:
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise ValueError(f"the checkpoint {str(path)!r} is damaged or cut off ({reason}): {hint}") from error
    missing = [key for key in CHECKPOINT_KEYS if not isinstance(values, dict) or key not in values]
    if missing:
        raise ValueError(f"{str(path)!r} is no checkpoint of a stage, it lacks {', '.join(missing)}: {hint}")
    clock = values["callbacks"].get("RunClock", {"elapsed_s": 0.0})
    return TrainingProgress(step=int(values["global_step"]), elapsed_s=float(clock["elapsed_s"]))


def run_stage(
    stage: str, config: Any, run_dir: Path, *, resume: str = "auto", export_to: Path | None = None
) -> TrainResult:
    """Train a stage to its end, or until interrupted. A run that has reached its limits is left as it is.

    Args:
        stage: Name of the stage.
        config: Its configuration.
        run_dir: Run folder.
        resume: `auto`, `never` or a checkpoint file; see `find_checkpoint`.
        export_to: A further component folder that gets the averaged weights in bfloat16 at the end.

    Raises:
        ValueError: If the checkpoint is damaged, or is another run's and has reached the limits of this one, or if a
            setting differs that a training must keep.
        OSError: If a folder cannot be written, or another training is at work in it.
    """
    import torch

    from arlon.config import save_config
    from stages.callbacks import LAST_CHECKPOINT
    from stages.common import make_training
    from stages.parallel import is_first_process
    from stages.record import CONFIG_NAME, changed_settings, locked, write_history

    for folder in (run_dir, *([export_to] if export_to else [])):
        check_folder(folder)
    checkpoint = find_checkpoint(run_dir, resume)
    progress = None if checkpoint is None else read_progress(checkpoint)
    if config.train.strategy == "fsdp" and stage != "dit":
        raise ValueError(f"train.strategy=fsdp shards the DiT; the stage {stage} trains with auto or ddp")
    if config.train.num_threads is not None:
        torch.set_num_threads(config.train.num_threads)
    is_own = checkpoint is not None and checkpoint.resolve() == (run_dir / LAST_CHECKPOINT).resolve()
    changed = changed_settings(stage, config, run_dir) if is_own else {}
    is_finished = progress is not None and progress.reaches(config.train)
    if is_finished and not is_own:
        raise ValueError(
            f"'{checkpoint}' has reached train.max_steps or train.max_minutes, so there is nothing to train: raise the "
            "limits, or name another checkpoint with --resume"
        )
    with locked(run_dir) if is_first_process() else nullcontext():
        if progress is not None and is_finished:
            finish_again(stage, config, run_dir, export_to)
            return TrainResult(run_dir, progress.step, interrupted=False, was_finished=True)
        parts = build_stage(stage, config)
        training = make_training(parts, config.train, config.optim, run_dir)
        if training.trainer.is_global_zero:
            write_history(run_dir, step=progress.step if progress else 0, changed=changed)
            save_config(config, run_dir / CONFIG_NAME)
        interrupted = fit(training, parts, checkpoint)
        if export_to is not None and not interrupted:
            copy_export(run_dir, type(parts.stage.model), export_to)
    return TrainResult(run_dir, training.trainer.global_step, interrupted, training.trainer.is_global_zero)


def build_stage(stage: str, config: Any) -> StageParts:
    """Data and module of a stage, by its name."""
    return stage_kind(stage).build(config)


def finish_again(stage: str, config: Any, run_dir: Path, export_to: Path | None) -> None:
    """Write only what a finished run lacks: its export, if that was removed, and the further component folder."""
    from arlon.components import CONFIG_NAME
    from stages.callbacks import LAST_CHECKPOINT
    from stages.common import EXPORT_DIR, export_checkpoint

    if not (run_dir / EXPORT_DIR / CONFIG_NAME).is_file():
        export_checkpoint(build_stage(stage, config).stage, run_dir / LAST_CHECKPOINT, run_dir)
    if export_to is not None and not (export_to / CONFIG_NAME).is_file():
        copy_export(run_dir, stage_kind(stage).model_class, export_to)


def copy_export(run_dir: Path, model_class: type[Component], folder: Path) -> None:
    """Store the export of a run in another component folder, in bfloat16; the first process does it."""
    import torch

    from arlon.components import load_component, save_component
    from stages.common import EXPORT_DIR
    from stages.parallel import is_first_process

    if is_first_process():
        save_component(load_component(model_class, run_dir / EXPORT_DIR), folder, dtype=torch.bfloat16)


def fit(training: Training, parts: StageParts, checkpoint: Path | None) -> bool:
    """Run the trainer; True if it was interrupted."""
    try:
        training.trainer.fit(
            parts.stage, training.stream, ckpt_path=str(checkpoint) if checkpoint else None, weights_only=True
        )
    except (KeyboardInterrupt, SystemExit):
        if not training.checkpoints.interrupted:
            raise
    return training.checkpoints.interrupted


def main(
    stage: Annotated[str, typer.Argument(help=f"What to train: {', '.join(BUILT_IN)}, or a stage of a plugin.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings, such as train.max_minutes=30."),
    ] = None,
    config: Annotated[
        list[Path] | None,
        typer.Option(help="YAML file; may be repeated. Default: configs/shapes/STAGE.yaml."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Run folder. Default: runs/STAGE.")] = None,
    resume: Annotated[str, typer.Option(help="auto, never, or a checkpoint file.")] = "auto",
    export_to: Annotated[
        Path | None,
        typer.Option(help="Component folder that gets the averaged weights in bfloat16 at the end."),
    ] = None,
) -> None:
    """Train one stage; running the same command again resumes it."""
    if importlib.util.find_spec("lightning") is None:
        _fail(ImportError("training needs Lightning: pip install 'arlon[train]'"), WRONG_USAGE)
    run_dir = output or Path("runs") / stage
    default = Path("configs") / "shapes" / f"{stage}.yaml"
    files = config or ([default] if stage in BUILT_IN else [])  # a stage of a plugin has defaults of its own
    settings = _settings(stage, files, overrides or [])
    try:
        _quieten_lightning()
        result = run_stage(stage, settings, run_dir, resume=resume, export_to=export_to)
    except (ValueError, OSError, RuntimeError, ImportError, MemoryError) as error:
        _fail(error, FAILED)
    except KeyboardInterrupt:
        typer.echo("interrupted while the data was prepared; the same command goes on from there", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if result.interrupted and not result.is_first:
        raise typer.Exit(INTERRUPTED)
    if result.interrupted:
        typer.echo(f"interrupted at step {result.step}; to resume: {_resume_command(run_dir)}", err=True)
        raise typer.Exit(INTERRUPTED)
    if result.was_finished:
        typer.echo(
            f"{run_dir} is finished at step {result.step}: nothing to do. Larger limits, train.max_steps or "
            "train.max_minutes, train it further."
        )
    elif result.is_first:
        typer.echo(f"step {result.step}: exported {run_dir / 'export'}")


def _settings(stage: str, files: list[Path], overrides: list[str]) -> Any:
    try:
        return load_stage_config(stage, files, overrides)
    except (ValueError, OSError) as error:
        _fail(error, WRONG_USAGE)


def _fail(error: Exception, code: int) -> NoReturn:
    """One message on stderr and an exit code; `ARLON_DEBUG=1` shows the traceback instead."""
    if os.environ.get("ARLON_DEBUG"):
        raise error
    lines = (str(error).strip() or type(error).__name__).splitlines()
    rest = len(lines) - MAX_LINES
    shown = [*lines[:MAX_LINES], *([f"  ... and {rest} more lines"] if rest > 0 else [])]
    typer.echo("error: " + "\n".join(shown), err=True)
    raise typer.Exit(code) from None


def _quieten_lightning() -> None:
    """Keep what Lightning says of itself off the terminal. Its loggers are set up when it is imported."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")


def _resume_command(run_dir: Path) -> str:
    """The command line of this run, resuming."""
    arguments, skip = [], False
    for argument in sys.argv[1:]:
        if not skip and argument != "--resume" and not argument.startswith("--resume="):
            arguments.append(argument)
        skip = argument == "--resume"
    return " ".join(["python -m stages.train", *arguments, "--resume auto"])


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logging.getLogger("stages").setLevel(logging.INFO)
    keep_freed_memory()
    limit_spinning()
    typer.run(main)
