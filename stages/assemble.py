"""Put trained components together as a model folder: `python -m stages.assemble OUTPUT [--runs runs]`.

Takes `RUNS/*/export`, stores the weights in bfloat16, and writes `model_index.json` with the defaults of generation.
Frame size, frame rate, segment and text length follow what the stages were trained on (`RUNS/*/export.json`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from arlon.registry import COMPONENTS, TRAINED_COMPONENTS
from arlon.text.encoders import TextEncoderConfig

if TYPE_CHECKING:
    pass

RUN_OF_COMPONENT = {name: COMPONENTS[name].recipe for name in TRAINED_COMPONENTS}


@dataclass(frozen=True, kw_only=True)
class ModelFolderConfig:
    """What a model folder holds besides trained weights."""

    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    """The frozen text encoder that the stages were trained with."""
    released: dict[str, str] = field(default_factory=dict)
    """Folders of components that need not be trained, by the component's name; an export of one's own is preferred."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """How the model is best used: see `arlon.film.geometry.GenerationDefaults`. What the stages were trained on wins
    over what stands here."""


@dataclass(frozen=True)
class Assembled:
    """What `assemble` has put together."""

    components: tuple[str, ...]
    """Names of the components."""
    changed: Mapping[str, tuple[Any, Any]]
    """Defaults that follow the training against the configuration: name -> (configured, as trained)."""


def assemble(output: Path, runs: Path, config: ModelFolderConfig) -> Assembled:
    """Write the model folder `output` from the exports under `runs`; one that is there is replaced as a whole.

    Raises:
        FileNotFoundError: If an export is missing.
        FileExistsError: If `output` is something else than a model folder.
        CheckpointError: If stages were trained on different data, or components do not fit each other.
    """
    import torch

    from arlon.checkpoint import INDEX_NAME, load_component, save_component, write_model_index
    from arlon.text.encoders import save_text_encoder

    if output.exists() and not (output / INDEX_NAME).is_file() and (output.is_file() or any(output.iterdir())):
        raise FileExistsError(f"'{output}' is there and is no model folder: name another one, or remove it")
    facts = shared_facts(runs)
    text_length = facts.pop("text_length", None)
    encoder = config.text_encoder if text_length is None else replace(config.text_encoder, max_length=text_length)
    # The new folder is complete and checked before the old one goes.
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        for name in RUN_OF_COMPONENT:
            model = load_component(COMPONENTS[name].model_class, source_of(name, runs, config))
            save_component(model, temporary / name, dtype=torch.bfloat16)
        save_text_encoder(temporary / "text_encoder", encoder)
        index = write_model_index(temporary, config.defaults | facts)
        if output.exists():
            shutil.rmtree(output)
        temporary.replace(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    stated = config.defaults | {"text_length": config.text_encoder.max_length}
    trained = facts if text_length is None else facts | {"text_length": text_length}
    changed = {name: (stated[name], value) for name, value in trained.items() if stated.get(name, value) != value}
    return Assembled(tuple(index.components), changed)


def source_of(name: str, runs: Path, config: ModelFolderConfig) -> Path:
    """Folder of a component: the export of its training, or else the released folder that the configuration names."""
    export = runs / RUN_OF_COMPONENT[name] / "export"
    released = config.released.get(name)
    return export if released is None or export.is_dir() else Path(released)


def shared_facts(runs: Path) -> dict[str, Any]:
    """What all exports under `runs` were trained on; a property that no record states is left out.

    Raises:
        CheckpointError: If two exports contradict each other; every contradiction is one line.
    """
    from arlon.components import CheckpointError
    from stages.record import read_facts

    first: dict[str, tuple[Path, Any]] = {}
    problems = []
    for run in RUN_OF_COMPONENT.values():
        for name, value in read_facts(runs / run).stated().items():
            other, expected = first.setdefault(name, (runs / run, value))
            if value != expected:
                problems.append(f"'{runs / run}' was trained with {name} {value}, but '{other}' with {expected}")
    if problems:
        raise CheckpointError("\n".join([*problems, "train these stages again with the same data and flow"]))
    return {name: value for name, (_, value) in first.items()}


def main(
    output: Annotated[Path, typer.Argument(help="Model folder to write.")],
    runs: Annotated[Path, typer.Option(help="Folder with the run folders of the stages.")] = Path("runs"),
    config: Annotated[Path, typer.Option(help="Text encoder and defaults.")] = Path("configs/shapes/model.yaml"),
) -> None:
    """Put trained components together as a model folder."""
    from arlon.config import load_config

    try:
        done = assemble(output, runs, load_config(ModelFolderConfig, [config]))
    except (OSError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    for name, (configured, trained) in done.changed.items():
        typer.echo(f"{name} is {trained}, as the stages were trained ({config} says {configured})")
    typer.echo(f"{output}: {', '.join(done.components)}")


if __name__ == "__main__":
    typer.run(main)
