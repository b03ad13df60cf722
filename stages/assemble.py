"""Put trained components together as a model folder: `python -m stages.assemble OUTPUT [--runs runs]`.

Takes `RUNS/*/export`, stores the weights in bfloat16, and writes `model_index.json` with the defaults of generation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from arlon.text.encoders import TextEncoderConfig

RUN_OF_COMPONENT = {
    "vae": "vae",
    "vqvae": "vqvae",
    "vqvae_coarser": "vqvae_coarser",
    "ar": "ar",
    "dit": "dit",
    "injection": "inject",
}


@dataclass(frozen=True, kw_only=True)
class ModelFolderConfig:
    """What a model folder holds besides trained weights."""

    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    """The frozen text encoder that the stages were trained with."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """How the model is best used: see `arlon.film.geometry.GenerationDefaults`."""


def component_classes() -> dict[str, type]:
    """Model class of each trained component."""
    from arlon.models.ar import CodeTransformer
    from arlon.models.injection import SemanticInjection
    from arlon.models.stdit import STDiT3
    from arlon.models.video_vae import VideoVAE
    from arlon.models.vqvae import LatentVQVAE

    return {
        "vae": VideoVAE,
        "vqvae": LatentVQVAE,
        "vqvae_coarser": LatentVQVAE,
        "ar": CodeTransformer,
        "dit": STDiT3,
        "injection": SemanticInjection,
    }


def assemble(output: Path, runs: Path, config: ModelFolderConfig) -> list[str]:
    """Write the model folder `output` from the exports under `runs`; returns the names of its components.

    Raises:
        FileNotFoundError: If an export is missing.
        CheckpointError: If components do not fit each other.
    """
    import torch

    from arlon.checkpoint import load_component, save_component, write_model_index
    from arlon.text.encoders import save_text_encoder

    for name, model_class in component_classes().items():
        model = load_component(model_class, runs / RUN_OF_COMPONENT[name] / "export")
        save_component(model, output / name, dtype=torch.bfloat16)
    save_text_encoder(output / "text_encoder", config.text_encoder)
    return list(write_model_index(output, config.defaults).components)


def main(
    output: Annotated[Path, typer.Argument(help="Model folder to write.")],
    runs: Annotated[Path, typer.Option(help="Folder with the run folders of the stages.")] = Path("runs"),
    config: Annotated[Path, typer.Option(help="Text encoder and defaults.")] = Path("configs/shapes/model.yaml"),
) -> None:
    """Put trained components together as a model folder."""
    from arlon.config import load_config

    try:
        names = assemble(output, runs, load_config(ModelFolderConfig, [config]))
    except (OSError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"{output}: {', '.join(names)}")


if __name__ == "__main__":
    typer.run(main)
