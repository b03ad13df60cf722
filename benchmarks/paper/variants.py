"""Injections to compare, trained alike: same frozen base, data, seed and number of steps; only what is named differs.

    python -m benchmarks.paper.variants --steps 200                          # all of them, one after another
    python -m benchmarks.paper.variants --only "controlnet, first half"      # some
    python -m benchmarks.paper.variants --only injection                     # those that an experiment compares
    python -m benchmarks.paper.variants -- data.cache_dir=cache optim.lr=5e-4   # settings of every training

Each ends as a model folder, OUTPUT/NAME/model: the model it was trained for, with its own injection. What is trained
already is left alone, and a training that was interrupted continues. OUTPUT/NAME/training.json states what it was
trained on, how long and under which settings; another base, length or setting is refused there, and by the experiments.
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
from arlon.files import hash_file, make_folder, write_json
from arlon.models.stdit import STDiT3Config

DEFAULT_OUTPUT = Path("outputs/paper/variants")
CONFIG = Path("configs/shapes/inject.yaml")
TRAINING_NAME = "training.json"
BASE = ("dit", "vae", "vqvae", "vqvae_coarser", "text_encoder")
"""Components that an injection is trained on, where the model has them."""


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
    for design in ("adaptive_norm", "mlp_adapter", "controlnet")
    for place in PLACES
)
NOISES = {"none": "no noise", "dsu": "feature statistics", "learned": "learned heads"}
RESILIENCE = tuple(
    Variant(name=f"{source} codes, {noise}", settings={"uncertainty": uncertainty}, coarse_source=source)
    for source in ("fine", "coarser")
    for uncertainty, noise in NOISES.items()
)
OF_EXPERIMENT = {"injection": DESIGNS, "resilience": RESILIENCE}
VARIANTS = {variant.name: variant for variant in (*DESIGNS, *RESILIENCE)}


def variant_folder(output: Path, name: str) -> Path:
    """Run folder of the training of a variant."""
    return output / name.replace(", ", "-").replace(" ", "_")


def variant_model(output: Path, name: str, model: ModelFolder) -> Path:
    """The model folder of a variant of `model`.

    Raises:
        FileNotFoundError: If it has not been trained.
        ValueError: If it was trained on another base, or other parts of its folder are not those of `model`.
    """
    folder = variant_folder(output, name) / "model"
    command = f"run `python -m benchmarks.paper.variants --only {json.dumps(name)}`"
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{name!r} is not trained, expected a model in {str(folder)!r}: {command}")
    base = read_training(output, name)["base"]
    if other := _differing(base, _base_of(model)):
        raise ValueError(
            f"{name!r} in {str(folder.parent)!r} was trained on another base than {str(model.path)!r}, they "
            f"differ in {', '.join(other)}: {command} with another --output, and give that as --variants"
        )
    if other := _differing(_without_injection(_open(folder)), _without_injection(model)):
        raise ValueError(f"{str(folder)!r} has another {', '.join(other)} than {str(model.path)!r}: {command}")
    return folder


def read_training(output: Path, name: str) -> dict[str, Any]:
    """Inputs of the training of a variant: `base` (SHA-256 by component), `steps`, `settings`, `variant`, `config`.

    Raises:
        ValueError: If its folder does not tell.
    """
    path = variant_folder(output, name) / TRAINING_NAME
    if not path.is_file():
        raise ValueError(
            f"{str(path.parent)!r} has no {TRAINING_NAME}, so that its base and length are not known: remove the "
            f"folder, and train {name!r} again"
        )
    return read_json(path, "what a variant was trained on")


def shared_training(output: Path, names: Sequence[str]) -> dict[str, Any]:
    """Inputs that variants have in common: `steps`, `settings`, `config`.

    Raises:
        ValueError: If they were not trained alike, so that they cannot be compared.
    """
    trainings = {name: read_training(output, name) for name in names}
    first, *others = trainings
    shared = {key: trainings[first][key] for key in ("steps", "settings", "config")}
    for name in others:
        if other := _differing(shared, {key: trainings[name][key] for key in shared}):
            told = ", ".join(f"{key} {shared[key]!r} and {trainings[name][key]!r}" for key in other)
            raise ValueError(f"{first!r} and {name!r} were not trained alike and cannot be compared: {told}")
    return shared


def training_command(training: Mapping[str, Any], experiment: str) -> str:
    """The command that trains the variants of an experiment as they have been; `training` is what they share."""
    settings = "".join(f" {setting}" for setting in ("--", *training["settings"]) if training["settings"])
    return f"python -m benchmarks.paper.variants --steps {training['steps']} --only {experiment}{settings}"


def _base_of(model: ModelFolder) -> dict[str, str]:
    return {name: model.components[name] for name in BASE if name in model.components}


def _without_injection(model: ModelFolder) -> dict[str, str]:
    return {name: value for name, value in model.components.items() if name != "injection"}


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    return sorted(key for key in {*a, *b} if a.get(key) != b.get(key))


def _open(folder: Path) -> ModelFolder:
    return ModelFolder.open(folder, required=(), verify=False)


def with_injection(model: ModelFolder, injection: Path, output: Path) -> None:
    """Write the model folder `output` from scratch: all components of `model`, with another injection."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    for name in COMPONENTS:
        source = injection if name == "injection" else model.path / name
        if source.is_dir():
            shutil.copytree(source, output / name, dirs_exist_ok=True)
    write_model_index(output, read_json(model.path / "model_index.json", "a model index")["defaults"])


def train_variant(variant: Variant, model: ModelFolder, args: argparse.Namespace) -> None:
    """Train one, and write its model folder.

    Raises:
        ValueError: If its folder holds another training.
    """
    folder = variant_folder(args.output, variant.name)
    dit = STDiT3Config(**_fields(model.path / "dit"))
    training = {
        "base": _base_of(model),
        "steps": args.steps,
        "settings": list(args.overrides),
        "variant": variant.overrides(dit),
        "config": hash_file(args.config),
    }
    if folder.exists() and (other := _differing(read_training(args.output, variant.name), training)):
        raise ValueError(
            f"{str(folder)!r} holds another training of {variant.name!r}, it differs in {', '.join(other)}: name "
            "another --output, or remove the folder to train it again"
        )
    if (folder / "model" / "model_index.json").is_file():
        if _differing(_without_injection(_open(folder / "model")), _without_injection(model)):
            with_injection(model, folder / "export", folder / "model")
        print(f"{variant.name}: there already, {folder / 'model'}")
        return
    make_folder(folder)
    write_json(folder / TRAINING_NAME, training)
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
    experiments = " or ".join(OF_EXPERIMENT)
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help=f"some variants, or those of {experiments}")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder of the trainings")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    known = {**{name: (VARIANTS[name],) for name in VARIANTS}, **OF_EXPERIMENT}
    if unknown := sorted(set(args.only or ()) - set(known)):
        parser.error(f"unknown variant {unknown[0]!r}; known are {', '.join((*OF_EXPERIMENT, *VARIANTS))}")
    args.only = list(dict.fromkeys(variant.name for name in args.only or VARIANTS for variant in known[name]))
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Train."""
    from arlon.film.geometry import open_model

    args = parse_args(argv)
    try:
        folder, _ = open_model(args.model)
        for name in args.only:
            train_variant(VARIANTS[name], folder, args)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
