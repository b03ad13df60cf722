"""Cost of wrong codes for the diffusion transformer itself: its flow-matching loss, scene by scene.

    python -m benchmarks.paper.variants --only resilience    # injections to compare
    python -m benchmarks.paper.wrong_codes

The table `resilience` counts what films show, and most of that is there or is not. The loss sees every value of the
velocity. Each injection gets the codes of the same held-out scenes, with the same ones replaced by random others, at
the same times and with the same noise; so what wrong codes cost is a difference within a scene, and can be told from
none.

Writes wrong_codes.md and wrong_codes.json into --output.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arlon.checkpoint import ModelFolder
from arlon.diffusion import flow, samplers
from arlon.evaluation.cases import Case, Share, summarise
from arlon.files import make_folder, write_bytes, write_json
from arlon.film.messages import CodeResult
from arlon.film.schedule import film_requests, text_request
from arlon.film.workers import RefineWorker, TextWorker, torch_threads
from arlon.models.injection import SemanticInjection
from arlon.protocols import VideoSize
from benchmarks.paper.conditions import flip_codes
from benchmarks.paper.experiments import EXPERIMENTS
from benchmarks.paper.tables import PARTIAL_TABLES, TABLES
from benchmarks.paper.variants import DEFAULT_OUTPUT, RESILIENCE, shared_training, training_command, variant_model
from benchmarks.prompt_accuracy import Model, ProgressLine, SceneEncoder, load_model

MODEL = "shapes"
NUM_SCENES = EXPERIMENTS["resilience"].default_cases
SHARES = (0.0, 0.05, 0.1, 0.2, 0.3)
"""Shares of the codes that are wrong."""
NUM_TIMES = 4
"""Flow times of a scene, evenly spaced before the shift."""
NO_CODES = "no codes"
"""The loss of the base alone, in place of a share."""
PLAIN, COMPARED_AT = "fine codes, no noise", 0.1
"""Reference of the comparison: the injection whose training does nothing about wrong codes, and the share of these."""
Losses = dict[str, float]
"""Mean over times of the loss of one scene, by share as text, and without codes."""


class LossWorker(RefineWorker):
    """The diffusion transformer, asked for the loss of a latent it is given instead of for a film."""

    @torch.inference_mode()
    def losses(self, request: Any, latent: Tensor, codes: Mapping[str, Tensor | None], seed: int) -> Losses:
        """Losses of a segment that opens a film.

        Args:
            request: As for `run`, filled.
            latent: What the segment should be, (1, C, T, H, W).
            codes: Codes (1, n, cH, cW) that are injected, by name; None: no injection.
            seed: Of the noise.
        """
        t = flow.shift_times(
            (torch.arange(NUM_TIMES) + 0.5) / NUM_TIMES,
            height=float(request.height),
            width=float(request.width),
            num_frames=float(request.segment.num_frames),
            base_size=self.geometry.defaults.shift_base_size,
            scale=self.geometry.defaults.shift_scale,
        )
        clean = latent.expand(NUM_TIMES, *latent.shape[1:])
        noise = samplers.draw_noise(clean.shape, seed, "wrong codes")
        text = request.text.features[request.prompt]
        found = {}
        for name, given in codes.items():
            inject = None if given is None else self.injection.condition(self.coarse_latent(given, request))
            prepared = self.backbone.prepare_text(
                text.tokens.expand(NUM_TIMES, -1, -1), text.mask.expand(NUM_TIMES, -1)
            )
            size = VideoSize(height=float(request.height), width=float(request.width), fps=request.fps)
            velocity = self.backbone.velocity(
                flow.add_noise(clean, noise, t), t, prepared, size=size, frame_mask=None, inject=inject
            )
            found[name] = float(flow.flow_loss(velocity, flow.velocity_target(clean, noise)).mean())
        return found


def measure(
    model: Model,
    injections: Mapping[str, Path],
    cases: Sequence[Case],
    progress: Callable[[int, int], None],
) -> dict[str, list[Losses]]:
    """Losses of every scene, by the name of an injection.

    Args:
        model: With the frozen base.
        injections: Model folders whose injections are compared; all else is taken from `model`.
        cases: Scenes of one shot.
        progress: Called with (done, all) after each scene.
    """
    found: dict[str, list[Losses]] = {name: [] for name in injections}
    job = model.job(cases[0])
    text_worker, worker, encoder = TextWorker(job), LossWorker(job), SceneEncoder(job)
    loaded = {name: SemanticInjection.from_pretrained(path / "injection") for name, path in injections.items()}
    assert worker.vqvae is not None
    codebook_size = worker.vqvae.config.codebook_size
    for done, case in enumerate(cases, start=1):
        job = model.job(case)
        latent = encoder.latent(case)
        right = encoder.codes(latent)
        codes = {str(share): flip_codes(right, share, codebook_size, case.seed) for share in SHARES}
        text = text_worker.run(text_request(job.plan))
        asked = next(iter(film_requests(job))).refine
        request = replace(asked, text=text, codes=CodeResult(codes=right, elapsed_s=0.0))
        shown = latent[:, :, : request.segment.num_latents]
        of_base = worker.losses(request, shown, {NO_CODES: None}, case.seed)
        for name, injection in loaded.items():
            worker.injection = injection
            found[name].append(worker.losses(request, shown, codes, case.seed) | of_base)
        progress(done, len(cases))
    return found


def figures(losses: Sequence[Losses], plain: Sequence[Losses] | None) -> dict[str, Share]:
    """Means and intervals over scenes.

    Args:
        losses: Of an injection.
        plain: Of the one that it is compared to, for the same scenes.

    Returns:
        `right codes`: the loss; `SHARE wrong`: what it rises by; `no codes`: the same for the base alone; and `less
        half of plain`: what `COMPARED_AT` costs, less half of what it costs `plain`.
    """
    rows = []
    for scene, loss in enumerate(losses):
        right = loss["0.0"]
        row = {"right codes": right}
        row |= {f"{share:.0%} wrong": loss[str(share)] - right for share in SHARES[1:]}
        row[NO_CODES] = loss[NO_CODES] - right
        if plain is not None:
            cost_of_plain = plain[scene][str(COMPARED_AT)] - plain[scene]["0.0"]
            row["less half of plain"] = loss[str(COMPARED_AT)] - right - cost_of_plain / 2
        rows.append(row)
    return summarise(rows)


def to_markdown(
    found: Mapping[str, Mapping[str, Share]], count: int, identity: Mapping[str, str], command: str, trained: str
) -> str:
    """The table."""
    columns = list(dict.fromkeys(name for shares in found.values() for name in shares))
    lines = [
        "# What wrong codes cost the loss",
        "",
        "The paper: Training on coarser codes with uncertainty sampling tolerates the mistakes of the AR model.",
        "",
        f"{count} held-out scenes, the same ones with the same wrong codes, times and noise for every injection; model "
        f"{identity['name']} ({identity['hash'][:12]}). Flow-matching loss in thousandths with the codes of the true "
        "scene, and what it rises by where some are replaced by random others, or where there are none; mean and 95 % "
        f"bootstrap interval over scenes. The last column is the cost of {COMPARED_AT:.0%} less half of what it costs "
        f"`{PLAIN}`: below 0, it is less than half. Made by `{command}`.",
        "",
        f"Each injection {trained}.",
        "",
        "| | " + " | ".join(columns) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for name, shares in found.items():
        cells = [_cell(shares[column]) if column in shares else "" for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(share: Share) -> str:
    return f"{1000 * share.mean:.1f} [{1000 * share.low:.1f}, {1000 * share.high:.1f}]"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper.wrong_codes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--scenes", type=int, default=NUM_SCENES, help=f"default: {NUM_SCENES}")
    parser.add_argument("--model", default=MODEL, help="name or folder of the model with the frozen base")
    parser.add_argument("--variants", type=Path, default=DEFAULT_OUTPUT, help="where benchmarks.paper.variants trained")
    parser.add_argument(
        "--output",
        type=Path,
        help=f"folder of the table; default: {TABLES}, with --scenes or --model {PARTIAL_TABLES}",
    )
    args = parser.parse_args(argv)
    if args.scenes < 1:
        parser.error(f"--scenes must be at least 1, got {args.scenes}")
    if args.output is None:
        args.output = TABLES if (args.scenes, args.model) == (NUM_SCENES, MODEL) else PARTIAL_TABLES
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and write the table."""
    args = parse_args(argv)
    try:
        model = load_model(args.model)
        names = [variant.name for variant in RESILIENCE]
        folder = ModelFolder.open(model.path, required=(), verify=False)
        paths = {name: variant_model(args.variants, name, folder) for name in names}
        training = shared_training(args.variants, names)
        make_folder(args.output)
        cases = EXPERIMENTS["resilience"].cases(args.scenes, model.geometry)
        of_model = f"the model {model.name}"
        with torch_threads(model.settings.num_threads):
            losses = measure(model, {**paths, of_model: Path(model.path)}, cases, ProgressLine("wrong codes"))
        found = {
            name: figures(rows, None if name in (PLAIN, of_model) else losses[PLAIN]) for name, rows in losses.items()
        }
        identity = {"name": model.name, "hash": model.model_hash}
        trained = f"trained for {training['steps']} steps: `{training_command(training, 'resilience')}`"
        command = "python -m benchmarks.paper.wrong_codes"
        command += f" --scenes {args.scenes}" if args.scenes != NUM_SCENES else ""
        command += f" --model {shlex.quote(model.name)}" if args.model != MODEL else ""
        table = to_markdown(found, len(cases), identity, command, trained)
        plain = {name: {key: asdict(share) for key, share in shares.items()} for name, shares in found.items()}
        contents = {"model": identity, "training": training, "figures": plain}
        contents["losses"] = {
            name: [{share: round(loss, 6) for share, loss in scene.items()} for scene in rows]
            for name, rows in losses.items()
        }
        write_json(args.output / "wrong_codes.json", contents)
        write_bytes(args.output / "wrong_codes.md", table.encode())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(table)


if __name__ == "__main__":
    main()
