"""The paper's experiments on a model that is read back by an oracle; each writes its table.

    python -m benchmarks.paper short                     # base, codes alone, ARLON at 5, 10, 30 steps
    python -m benchmarks.paper long                      # twelve shots, by position of the shot
    python -m benchmarks.paper two_objects               # both right? base, ARLON, codes of the true scene
    python -m benchmarks.paper flips                     # accuracy against the share of codes flipped at random
    python -m benchmarks.paper injection                 # adaptive norm, MLP adapter, ControlNet; first, last half, all
    python -m benchmarks.paper resilience                # fine or coarser codes, kinds of noise, against flipped codes
    python -m benchmarks.paper video                     # codes taken from a video, with a new prompt
    python -m benchmarks.paper seams                     # one shot of five segments
    python -m benchmarks.paper context                   # how many code frames the AR model continues from
    python -m benchmarks.paper sampling                  # temperature, top-p, guidance of the AR model

Writes NAME.md and NAME.json into --output. Records of films are kept in --work, so that the same command continues
after it was stopped; a film is made again if the model or its defaults, the condition or the prompt changed.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from arlon.checkpoint import ModelFolder
from arlon.files import write_bytes, write_json
from arlon.film.messages import CodeResult
from benchmarks.paper.conditions import Condition, run_condition
from benchmarks.paper.experiments import EXPERIMENTS
from benchmarks.paper.tables import PARTIAL_TABLES, TABLES, to_json, to_markdown
from benchmarks.paper.variants import DEFAULT_OUTPUT, shared_training, training_command, variant_model
from benchmarks.prompt_accuracy import ProgressLine, load_model

MODEL = "shapes"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--films", type=int, help="films a condition; default: 64, of long films 8")
    parser.add_argument("--model", default=MODEL, help="name or folder of the model")
    parser.add_argument("--only", nargs="+", metavar="CONDITION", help="some conditions, as 'arlon 5 steps'")
    parser.add_argument("--variants", type=Path, default=DEFAULT_OUTPUT, help="where benchmarks.paper.variants trained")
    parser.add_argument(
        "--output",
        type=Path,
        help=f"folder of the tables; default: {TABLES}, with --films, --only or --model {PARTIAL_TABLES}",
    )
    parser.add_argument("--work", type=Path, default=Path("outputs/paper"), help="folder of the records")
    args = parser.parse_args(argv)
    if args.films is not None and args.films < 1:
        parser.error(f"--films must be at least 1, got {args.films}")
    known = [condition.name for condition in EXPERIMENTS[args.experiment].conditions]
    if unknown := sorted(set(args.only or ()) - set(known)):
        parser.error(f"unknown condition {unknown[0]!r}; known are {', '.join(known)}")
    if args.output is None:
        args.output = TABLES if (args.films, args.only, args.model) == (None, None, MODEL) else PARTIAL_TABLES
    return args


def with_models(conditions: Sequence[Condition], folder: Path, model: ModelFolder) -> list[Condition]:
    """Conditions with the model of their variant, if they have one.

    Raises:
        FileNotFoundError: If that has not been trained.
        ValueError: If it was trained on another base than `model`.
    """
    paths = {c.variant: str(variant_model(folder, c.variant, model)) for c in conditions if c.variant is not None}
    return [replace(c, model=paths[c.variant]) if c.variant else c for c in conditions]


def main(argv: Sequence[str] | None = None) -> None:
    """Run an experiment and write its table."""
    args = parse_args(argv)
    experiment = EXPERIMENTS[args.experiment]
    try:
        for folder in (args.output, args.work):
            if folder.exists() and not folder.is_dir():
                raise ValueError(f"'{folder}' is a file: name a folder as --output and as --work")
        model = load_model(args.model)
        cases = experiment.cases(args.films or experiment.default_cases, model.geometry)
        chosen = [c for c in experiment.conditions if args.only is None or c.name in args.only]
        conditions = with_models(chosen, args.variants, ModelFolder.open(model.path, required=(), verify=False))
        names = list(dict.fromkeys(c.variant for c in chosen if c.variant is not None))
        training = shared_training(args.variants, names) if names else None
        for folder in (args.output, args.work):
            folder.mkdir(parents=True, exist_ok=True)
        written: dict[str, CodeResult] = {}
        results = {
            condition.name: run_condition(
                condition,
                cases,
                args.work / args.experiment,
                model=args.model,
                written=written,
                progress=ProgressLine(condition.name),
            )
            for condition in conditions
        }
        identity = {"name": model.name, "hash": model.model_hash}
        command = f"python -m benchmarks.paper {args.experiment}"
        if len(cases) != experiment.default_cases:
            command += f" --films {len(cases)}"
        if args.model != MODEL:
            command += f" --model {shlex.quote(model.name)}"
        if args.only:
            command += " --only " + shlex.join(args.only)
        trained = None
        if training:
            trained = f"trained for {training['steps']} steps: `{training_command(training, args.experiment)}`"
        table = to_markdown(experiment, results, identity, command, trained)
        write_json(args.output / f"{args.experiment}.json", to_json(experiment, results, identity, training))
        write_bytes(args.output / f"{args.experiment}.md", table.encode())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(table)


if __name__ == "__main__":
    main()
