"""Injections to compare, trained alike: same frozen base, data, seed and number of steps; only what is named differs.

    python -m benchmarks.paper.variants --steps 200                          # all of them, one after another
    python -m benchmarks.paper.variants --only "controlnet, first half"      # some
    python -m benchmarks.paper.variants -- data.cache_dir=cache optim.lr=5e-4   # settings of every training

Each ends as a model folder, OUTPUT/NAME/model: the model it was trained for, with its own injection. What is trained
already is left alone, and a training that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arlon.checkpoint import COMPONENTS, ModelFolder, read_json, write_model_index
from arlon.models.stdit import STDiT3Config

DEFAULT_OUTPUT = Path("outputs/paper/variants")
CONFIG = Path("configs/shapes/inject.yaml")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """An injection: `settings` of its config by name, and which codes it is trained on."""

    name: str
    place: str = "first half"
    settings: Mapping[str, Any] = field(default_factory=dict)
    coarse_source: str | None = None

    def overrides(self, dit: STDiT3Config) -> list[str]:
        """Dotted overrides of the stage `inject` for a base."""
        first, count = PLACES[self.place](dit.depth)
        settings: dict[str, Any] = {"first_block": first, "num_blocks": count, **self.settings}
        if self.settings.get("design") == "controlnet":
            settings |= {"num_heads": dit.num_heads, "mlp_ratio": dit.mlp_ratio, "qk_norm": str(dit.qk_norm).lower()}
        source = [] if self.coarse_source is None else [f"coarse_source={self.coarse_source}"]
        return [f"injection.{name}={value}" for name, value in settings.items()] + source


PLACES = {
    "first half": lambda depth: (0, depth // 2),
    "last half": lambda depth: (depth - depth // 2, depth // 2),
    "all": lambda depth: (0, depth),
}
"""First block and number of blocks."""
DESIGNS = tuple(
    Variant(name=f"{design.replace('_', ' ')}, {place}", place=place, settings={"design": design})
    for design, place in (
        ("adaptive_norm", "first half"),
        ("adaptive_norm", "last half"),
        ("adaptive_norm", "all"),
        ("mlp_adapter", "first half"),
        ("controlnet", "first half"),
    )
)
NOISES = {"none": "no noise", "dsu": "feature statistics", "learned": "learned heads"}
RESILIENCE = tuple(
    Variant(name=f"{source} codes, {noise}", settings={"uncertainty": uncertainty}, coarse_source=source)
    for source in ("fine", "coarser")
    for uncertainty, noise in NOISES.items()
)
VARIANTS = {variant.name: variant for variant in (*DESIGNS, *RESILIENCE)}


def variant_folder(output: Path, name: str) -> Path:
    """Where a variant is trained."""
    return output / name.replace(", ", "-").replace(" ", "_")


def variant_model(output: Path, name: str) -> Path:
    """The model folder of a variant.

    Raises:
        FileNotFoundError: If it has not been trained.
    """
    folder = variant_folder(output, name) / "model"
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{name!r} is not trained, expected a model in {str(folder)!r}: run "
            f"`python -m benchmarks.paper.variants --only {json.dumps(name)}`"
        )
    return folder


def with_injection(model: ModelFolder, injection: Path, output: Path) -> None:
    """Write the model folder `output`: all of `model`, but for its injection."""
    output.mkdir(parents=True, exist_ok=True)
    for name in COMPONENTS:
        source = injection if name == "injection" else model.path / name
        if source.is_dir():
            shutil.copytree(source, output / name, dirs_exist_ok=True)
    write_model_index(output, read_json(model.path / "model_index.json", "a model index")["defaults"])


def train_variant(variant: Variant, model: ModelFolder, args: argparse.Namespace) -> None:
    """Train one, and write its model folder."""
    folder = variant_folder(args.output, variant.name)
    if (folder / "model" / "model_index.json").is_file():
        print(f"{variant.name}: there already, {folder / 'model'}")
        return
    dit = STDiT3Config(**_fields(model.path / "dit"))
    parts = {"dit": "dit", "vqvae": "vqvae", "vqvae_coarser": "vqvae_coarser", "data.vae": "vae"}
    overrides = [
        *(f"{key}={model.path / name}" for key, name in parts.items()),
        *(f"train.max_steps={args.steps}", "train.max_minutes=null", "train.sample_steps=0"),
        *variant.overrides(dit),
        *args.overrides,
    ]
    command = (sys.executable, "-m", "stages.train", "inject", "--config", str(args.config), "--output", str(folder))
    subprocess.run([*command, *overrides], check=True)
    with_injection(model, folder / "export", folder / "model")


def _fields(component: Path) -> dict[str, Any]:
    values = read_json(component / "config.json", "a config")
    return {name: value for name, value in values.items() if not name.startswith("_")}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper.variants",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of every training")
    parser.add_argument("--model", default="shapes", help="name or folder of the model with the frozen base")
    parser.add_argument("--config", type=Path, default=CONFIG, help="of the stage `inject`")
    parser.add_argument("--steps", type=int, default=400, help="of every training")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="some variants")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder of the trainings")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    if unknown := sorted(set(args.only or ()) - set(VARIANTS)):
        parser.error(f"unknown variant {unknown[0]!r}; known are {', '.join(VARIANTS)}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Train."""
    from pipelines.model import open_model

    args = parse_args(argv)
    try:
        folder, _ = open_model(args.model)
        for name in args.only or VARIANTS:
            train_variant(VARIANTS[name], folder, args)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
