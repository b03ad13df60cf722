"""Films that begin with a picture or continue a video: do the given frames come back, and does the rest follow?

    python -m benchmarks.given_frames --cases 16 --json figures.json --sheet sheet.png

Cases are those of `benchmarks/prompt_accuracy.py`: held-out attribute pairs and phrasings. Scenes are rendered as their
prompts say; `image` begins with the first frame of a scene, `video` continues its first segment. Both pass through
files and the path that `arlon generate --image` and `--video` take, and each film is one segment.

    PSNR     of the given frames as they come back, dB
    VAE      of the same frames encoded and decoded alone: as much as the VAE allows
    others   what the oracle reads in the whole film, `video`: what holds from there on; `truth` in brackets
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image

from arlon.data.video_io import VideoWriter
from arlon.evaluation import cases as suite
from arlon.evaluation import metrics
from arlon.evaluation.cases import Case, Outcome
from arlon.film.encode_media import encode_references
from arlon.film.media import check_references
from arlon.film.messages import Job
from arlon.film.take_media import TakeMedia, take_media
from arlon.film.workers import torch_threads
from arlon.shapes import world
from benchmarks.prompt_accuracy import SHEET_COLUMNS, FilmMaker, Model, ProgressLine, load_model
from pipelines.deliver.sheet import SheetRow, evenly_spaced, frames_to_sheet, write_sheet
from pipelines.store.run_folder import write_json

Mode = Literal["image", "video"]
ATTRIBUTES = ("colour", "shape", "motion", "direction", "background", "count")
CRF = 1
"""Constant rate factor of the given videos: nearly lossless."""


@dataclass(frozen=True)
class Result:
    """One film: PSNR in dB, what the oracle read of it, and its frames (pT, pH, pW, 3) uint8."""

    psnr: float
    vae_psnr: float
    outcome: Outcome
    frames: np.ndarray


def scene_frames(case: Case, model: Model, num_frames: int) -> np.ndarray:
    """The scene of a case (pT, pH, pW, 3) uint8 as its prompt says."""
    defaults = model.geometry.defaults
    return world.render_scene(
        case.scene, height=defaults.height, width=defaults.width, fps=defaults.fps, num_frames=num_frames
    ).frames


def make_case(case: Case, mode: Mode, model: Model, folder: Path) -> Result:
    """Make one film and read it; files are written to `folder`."""
    grid, fps = model.geometry.grid, model.geometry.defaults.fps
    truth = scene_frames(case, model, 2 * grid.segment_frames)
    start = truth[:1] if mode == "image" else truth[: grid.segment_frames]
    job, media = _job(case, mode, model, start, folder)
    frames = FilmMaker(job).shots(job, media=media)[0]
    used = 1 if mode == "image" else grid.chunk_frames * (grid.overlap // grid.chunk_latents)
    expected = start[-used:]
    first = len(start) - used
    ideal = truth[first : first + len(frames)]
    return Result(
        psnr=_psnr(frames[:used], expected),
        vae_psnr=_psnr(_through_vae(job, expected), expected),
        outcome=_judge(case, frames, ideal, fps),
        frames=frames,
    )


def _job(case: Case, mode: Mode, model: Model, start: np.ndarray, folder: Path) -> tuple[Job, dict[int, TakeMedia]]:
    """The film of a case, and the encoded frames that it is given, by shot; their file is written to `folder`."""
    path = folder / ("start.png" if mode == "image" else "start.mp4")
    if mode == "image":
        Image.fromarray(start[0]).save(path)
    else:
        with VideoWriter(path, fps=model.geometry.defaults.fps, crf=CRF) as writer:
            writer.append(start)
    job = model.job(case)
    film = job.plan.storyboard
    shot = replace(film.shots[0], **{mode: str(path)})
    job = replace(job, plan=replace(job.plan, storyboard=replace(film, shots=(shot,))))
    return job, take_media(job.plan, encode_references(job, check_references(job.plan)))


@torch.inference_mode()
def _through_vae(job: Job, frames: np.ndarray) -> np.ndarray:
    from arlon.data.transforms import resize_and_crop, video_to_frames
    from arlon.models.video_vae import VideoVAE

    vae = VideoVAE.from_pretrained(job.component("vae"))
    video = resize_and_crop(frames, height=frames.shape[1], width=frames.shape[2])[None]
    return video_to_frames(vae.decode(vae.encode(video), len(frames))[0])


def _psnr(frames: np.ndarray, expected: np.ndarray) -> float:
    made, wanted = (torch.from_numpy(f.astype(np.float32) / 127.5 - 1) for f in (frames, expected))
    return metrics.psnr(made, wanted)


def _judge(case: Case, frames: np.ndarray, ideal: np.ndarray, fps: float) -> Outcome:
    from arlon.shapes import oracle

    readings, truth = (oracle.read_clip(f, fps=fps) for f in (frames, ideal))
    shot = case.scene.shots[0]
    return Outcome(case, (readings,), (truth,), suite.score_prompt(readings, shot), suite.score_prompt(truth, shot))


def table(results: dict[Mode, list[Result]]) -> str:
    """The figures as Markdown."""
    lines = [
        "| given | PSNR | VAE | " + " | ".join(ATTRIBUTES) + " |",
        "|" + "---|" * (3 + len(ATTRIBUTES)),
    ]
    for mode, films in results.items():
        shares = suite.summarise([film.outcome.scores for film in films])
        truth = suite.summarise([film.outcome.truth_scores for film in films])
        cells = [f"{shares[name].mean:.2f} ({truth[name].mean:.2f})" for name in ATTRIBUTES]
        psnr, vae = (float(np.mean([getattr(film, name) for film in films])) for name in ("psnr", "vae_psnr"))
        lines.append(f"| {mode} | {psnr:.1f} | {vae:.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def to_plain(results: dict[Mode, list[Result]]) -> dict[str, Any]:
    """Everything, for JSON."""
    return {
        mode: [
            {
                "prompt": film.outcome.case.prompts[0],
                "psnr": film.psnr,
                "vae_psnr": film.vae_psnr,
                "scores": {k: None if np.isnan(v) else v for k, v in film.outcome.scores.items()},
            }
            for film in films
        ]
        for mode, films in results.items()
    }


def _first_half(case: Case) -> Case:
    """The case with half its length, so that its scene is twice as long as the film."""
    shot = case.scene.shots[0]
    return replace(case, scene=replace(case.scene, shots=(replace(shot, seconds=shot.seconds / 2),)))


def run(model: Model, count: int, modes: Sequence[Mode]) -> dict[Mode, list[Result]]:
    """Make and read the films of every mode."""
    defaults, grid = model.geometry.defaults, model.geometry.grid
    seconds = [2 * grid.segment_frames / defaults.fps]
    cases = suite.sample_cases(count, seconds=seconds, aspect=defaults.width / defaults.height)
    films = [_first_half(case) for case in cases]
    results: dict[Mode, list[Result]] = {}
    with torch_threads(model.settings.num_threads):
        for mode in modes:
            progress, results[mode] = ProgressLine(mode), []
            for case in films:
                with tempfile.TemporaryDirectory() as folder:
                    results[mode].append(make_case(case, mode, model, Path(folder)))
                progress(len(results[mode]), count)
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes", help="name or folder of the model")
    parser.add_argument("--cases", type=int, default=16, help="films a mode")
    parser.add_argument("--modes", nargs="+", choices=get_args(Mode), default=list(get_args(Mode)))
    parser.add_argument("--json", type=Path, metavar="OUT.json", help="write all figures")
    parser.add_argument("--sheet", type=Path, metavar="OUT.png", help="write a contact sheet")
    args = parser.parse_args(argv)
    if args.cases < 1:
        parser.error(f"--cases must be at least 1, got {args.cases}")
    try:
        results = run(load_model(args.model, settings={"num_threads": 1}), args.cases, args.modes)
        if args.json:
            write_json(args.json, to_plain(results))
        if args.sheet:
            rows = [
                SheetRow(
                    title=f"{mode}: {film.outcome.case.prompts[0]}",
                    frames=film.frames[evenly_spaced(0, len(film.frames), SHEET_COLUMNS)],
                )
                for mode, films in results.items()
                for film in films
            ]
            write_sheet(frames_to_sheet(rows), args.sheet)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(table(results))


if __name__ == "__main__":
    main()
