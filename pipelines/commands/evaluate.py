"""`arlon evaluate`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from arlon.errors import UsageError
from pipelines.commands.common import FAILED, count, printable, reported, say
from pipelines.commands.options import JsonOption

if TYPE_CHECKING:
    from pipelines.evaluation.evaluate import Evaluation, EvaluationProgress

SHOWN_FIGURES = (
    "prompt_accuracy",
    "prompt_colour",
    "prompt_shape",
    "prompt_direction",
    "prompt_both_objects",
    "switch_appears",
    "temporal_flickering",
    "subject_consistency",
    "background_consistency",
    "aesthetic_quality",
    "imaging_quality",
    "overall_consistency",
    "dynamic_degree",
    "dynamic_degree_lk",
    "seam_strength",
)


def evaluate(
    films: Annotated[list[Path], typer.Argument(help="Films, run folders, or folders searched for films.")],
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help=".json: film name to prompt(s); or text: a prompt a line, in order of names."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the results. [default: outputs/evaluation-NAME]")
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", help="Films measured at a time. [default: all cores]")
    ] = None,
    backbone: Annotated[
        list[str] | None,
        typer.Option(
            "--backbone",
            metavar="DIMENSION=MODEL",
            help="Folder or hub id of the network of subject_consistency (DINO), background_consistency (CLIP), "
            "aesthetic_quality (CLIP and head) or overall_consistency (CLIP); file of the weights of "
            "dynamic_degree (torchvision's RAFT) or imaging_quality (pyiqa's MUSIQ).",
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Where networks compute: cpu, cuda, ...")] = "cpu",
    export_vbench: Annotated[
        Path | None,
        typer.Option("--export-vbench", help="Write the films to this folder as VBench's own suite wants them."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure films: prompts followed, motion, drift, seams; one JSON file and one page."""
    with reported():
        from arlon.threads import available_cores
        from pipelines.deliver.paths import slug
        from pipelines.evaluation.evaluate import evaluate as run
        from pipelines.evaluation.vbench_export import check_export, export_films

        if export_vbench is not None:
            check_export(export_vbench, films)
        target = output or Path("outputs") / f"evaluation-{slug(films[0].resolve().stem)}"
        result = run(
            films,
            target,
            prompts=prompts,
            backbones=_read_backbones(backbone or []),
            device=device,
            num_workers=available_cores() if workers is None else workers,
            on_progress=_show,
        )
        exported = None
        if export_vbench is not None:
            exported = export_films(films, export_vbench, prompts=prompts, leave_out=target)
        known = {problem.source for problem in result.problems}
        problems = [*result.problems, *(p for p in (exported.problems if exported else ()) if p.source not in known)]
        if as_json:
            plain = _to_plain(result) | {"problems": [asdict(problem) for problem in problems]}
            if exported is not None:
                plain |= {"vbench_info": str(exported.info), "vbench_videos": exported.num_videos}
            typer.echo(json.dumps(plain, indent=2))
        else:
            _print(result)
            if exported is not None:
                typer.echo(str(exported.info))
        for problem in problems:
            say(printable(f"problem: {problem.source}: {problem.reason}"))
        if problems:
            say(f"{count(len(problems), 'problem')}; {count(result.num_films, 'film')} measured")
            raise typer.Exit(FAILED)


def _read_backbones(given: list[str]) -> dict[str, str]:
    from arlon.evaluation.vbench.networks import BACKBONE_KINDS

    backbones: dict[str, str] = {}
    for text in given:
        name, equals, source = text.partition("=")
        if not equals or not source or name not in BACKBONE_KINDS:
            known = ", ".join(BACKBONE_KINDS)
            raise UsageError(f"--backbone must be DIMENSION=MODEL with one of {known}, got '{text}'")
        if name in backbones:
            raise UsageError(f"--backbone {name} is given twice: '{backbones[name]}' and '{source}'")
        backbones[name] = source
    return backbones


def _show(progress: EvaluationProgress) -> None:
    end = "  not measured" if progress.problem else ""
    say(printable(f"film {progress.done}/{progress.total}  {progress.name}{end}"))


def _to_plain(result: Evaluation) -> dict[str, object]:
    figures = {name: asdict(share) for name, share in result.figures.items() if share.count}
    return {
        "result": str(result.result),
        "page": str(result.page),
        "num_films": result.num_films,
        "num_reused": result.num_reused,
        "figures": figures,
    }


def _print(result: Evaluation) -> None:
    if result.num_reused:
        say(f"{count(result.num_reused, 'film')} measured before")
    for name in SHOWN_FIGURES:
        share = result.figures.get(name)
        if share is not None and share.count:
            say(f"{name:22} {share.mean:6.3f}  [{share.low:.3f}, {share.high:.3f}]  {count(share.count, 'film')}")
    typer.echo(str(result.result))
    typer.echo(str(result.page))
