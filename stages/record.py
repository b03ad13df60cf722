"""The record of an export: what the weights in `runs/STAGE/export/` were trained on.

It lies beside the export as `runs/STAGE/export.json`, not inside it, because the hash of a component covers every JSON
file of its folder. `stages.assemble` reads it, so that a model folder says what its parts were trained on.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from arlon.components import read_json
from arlon.config import config_from_dict
from arlon.errors import ConfigError
from arlon.files import write_json

RECORD_NAME = "export.json"
FORMAT = 1


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
