"""What a run folder says about its training: the record of the export, the history of its settings, and a lock.

The record states what the weights in `runs/STAGE/export/` were trained on. It lies beside the export, as
`runs/STAGE/export.json`, because the hash of a component covers every JSON file of its folder. `stages.assemble` reads
it, so that a model folder says what its parts were trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from arlon.components import read_json
from arlon.config import config_from_dict, config_to_dict
from arlon.errors import ConfigError
from arlon.files import append_line, make_folder, write_json
from stages.registry import stage_kind

RECORD_NAME = "export.json"
CONFIG_NAME = "config.yaml"
HISTORY_NAME = "history.jsonl"
LOCK_NAME = ".lock"
FORMAT = 1
FIXED_KEYS = ("optim.name", "train.seed", "train.init_from", "train.previous_part", "part")
"""Settings that a training must keep to its end: others would contradict its checkpoint or the order of its data."""


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """Properties of the training data that a model must be used with; None: the stage learned from any value."""

    height: int | None = None
    """Frame height in pixels."""
    width: int | None = None
    """Frame width in pixels."""
    fps: float | None = None
    """Frames per second."""
    segment: int | None = None
    """Latent frames of a segment."""
    overlap: int | None = None
    """Latent frames that a segment takes over from the one before."""
    text_length: int | None = None
    """Tokens of a caption, padding included."""

    def stated(self) -> dict[str, int | float]:
        """The properties that are not None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def write_record(run_dir: Path, *, stage: str, step: int, facts: TrainingFacts) -> None:
    """Write the record of the export in `run_dir`, made after optimizer step `step` of `stage`."""
    write_json(run_dir / RECORD_NAME, {"format": FORMAT, "stage": stage, "step": step, "trained_on": facts.stated()})


def read_facts(run_dir: Path) -> TrainingFacts:
    """Read what the export in `run_dir` was trained on; an export without a record states nothing.

    Raises:
        CheckpointError: If the record is not JSON.
        ConfigError: If it is of another format or holds a property that is not known.
    """
    path = run_dir / RECORD_NAME
    if not path.is_file():
        return TrainingFacts()
    values = read_json(path, "the record of an export")
    if values.get("format") != FORMAT or not isinstance(values.get("trained_on"), dict):
        raise ConfigError(
            f"{str(path)!r} has format {values.get('format')!r}, expected {FORMAT}: train the stage again"
        )
    try:
        return config_from_dict(TrainingFacts, values["trained_on"])
    except ConfigError as error:
        raise ConfigError(f"{str(path)!r}: {error}") from error


def changed_settings(stage: str, config: Any, run_dir: Path) -> dict[str, tuple[Any, Any]]:
    """Settings in which a configuration differs from that of the run in `run_dir`: dotted key -> (before, now).

    Raises:
        ConfigError: If one of them must not change while a training is resumed.
    """
    path, model_key = run_dir / CONFIG_NAME, stage_kind(stage).model_key
    if not path.is_file():
        return {}
    before, now = _leaves(yaml.safe_load(path.read_text(encoding="utf-8"))), _leaves(config_to_dict(config))
    changed = {key: (before.get(key), now.get(key)) for key in before | now if before.get(key) != now.get(key)}
    # A key that only one of them has may be that of another version: the checkpoint itself decides whether it fits.
    fixed = [
        f"{key} (was {old!r}, now {new!r})"
        for key, (old, new) in changed.items()
        if key in before and key in now and (key in FIXED_KEYS or key.startswith(f"{model_key}."))
    ]
    if fixed:
        raise ConfigError(
            f"'{run_dir}' cannot be resumed with another {', '.join(fixed)}: give what it began with, or start another "
            f"run from its weights with train.init_from={run_dir}/export and another --output"
        )
    return changed


def write_history(run_dir: Path, *, step: int, changed: Mapping[str, tuple[Any, Any]]) -> None:
    """Note in the run folder which settings a training is resumed with at `step` in place of those before."""
    if changed:
        append_line(
            run_dir / HISTORY_NAME, {"step": step, "changed": {k: list(v) for k, v in changed.items()}}, sync=True
        )


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keep other trainings out of a run folder; the lock ends with the process that holds it.

    Raises:
        OSError: If another training is at work in the folder.
    """
    try:
        import fcntl
    except ModuleNotFoundError:  # not a Unix
        yield
        return
    make_folder(run_dir)
    with (run_dir / LOCK_NAME).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(
                f"another training is at work in '{run_dir}': wait for its end, or give another --output"
            ) from error
        yield


def _leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of everything that is not a dict."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _leaves(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found
