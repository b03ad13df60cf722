"""Films the pipeline tests make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from arlon.film.storyboard import parse_storyboard
from pipelines.runs.prepare import Prepared, prepare
from pipelines.store.run_folder import RunFolder

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


def make_film(model: Path, output: Path, *shots: Any, **options: Any) -> Path:
    """Make a film of the tiny model, as `prepared_film` has it, and return its file."""
    from pipelines.runs.generate import generate

    return generate(prepared_film(model, output, *shots, **options)).film


def assert_same_film(film: Path, expected: Path) -> None:
    """Two films of the same bytes; if not, the error names the first step that came out otherwise, and by how much.

    Their run folders lie where `prepare` places them.
    """
    if film.read_bytes() != expected.read_bytes():
        raise AssertionError(f"'{film}' differs from '{expected}': {_first_difference(film, expected)}")


def _first_difference(film: Path, expected: Path) -> str:
    beside = (path.with_suffix(".run") for path in (film, expected))
    one, other = (RunFolder(path if path.is_dir() else path.parent) for path in beside)
    threads = f"{torch.get_num_threads()} threads now"
    codes = one.read_codes(), other.read_codes()
    if differing := [take for take in codes[1] if not codes[0][take].equal(codes[1][take])]:
        return f"codes of take {differing[0]}; {threads}"
    for index in other.committed_indices():
        latents = one.read_latent(index), other.read_latent(index)
        if not latents[0].equal(latents[1]):
            unequal = latents[0] != latents[1]
            largest, frames = (latents[0] - latents[1]).abs().max(), unequal.sum(dim=(0, 1, 3, 4)).tolist()
            return f"latent of segment {index} by up to {largest:.3g}, values a latent frame {frames}; {threads}"
        if one.read_fragment(index) != other.read_fragment(index):
            return f"decoding or encoding of segment {index}: its latents are the same; {threads}"
    return f"codes, latents and fragments are the same, so only the container; {threads}"
