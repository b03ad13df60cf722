"""Films the pipeline tests make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.generate import Prepared, prepare
from pipelines.storyboard import parse_storyboard

SHOTS = (
    {"prompt": "a red circle moves left", "duration": "51f"},
    {"prompt": "a green circle moves left", "duration": "34f"},
    {"prompt": "a blue square", "duration": "51f", "transition": "cut"},
)


def prepared_film(
    model: Path, output: Path, *shots: Any, settings: dict[str, Any] | None = None, **film: Any
) -> Prepared:
    """A film of the tiny model, ready to be made; `SHOTS` if none are given."""
    storyboard = parse_storyboard({"seed": 7, "shots": list(shots or SHOTS), **film})
    return prepare(storyboard, model=str(model), output=output, settings={"num_threads": 1} | (settings or {}))
