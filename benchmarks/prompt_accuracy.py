"""Prompt accuracy of a model: how much of what prompts ask for the oracle finds in its frames.

    python benchmarks/prompt_accuracy.py --prompts 64 --switches 24 --sheet sheet.png --json figures.json

Prompts: single-shot films of one segment, from scenes with held-out attribute pairs and held-out phrasings.
Switches: takes of two shots joined with `continue`, whose prompts differ in one attribute; the shot before and
the shot after are read by themselves. `arlon.evaluation.cases` defines every figure.

Films are made by the workers of the pipeline, in one process, with the frames that `arlon generate` would encode
under the same prompts and seed. `--mode` takes parts away: `base` is the diffusion transformer without injection (it
carries frames over all the same), `codes` shows the codes alone, through the two decoders, and `true_codes` takes the
codes of the scene that is asked for, so that only the diffusion transformer can be wrong.

Columns: `right` is the share of cases, with its 95 % bootstrap interval over n cases; `guess` the chance of a uniform
guess; `shuffled` the score against the prompts of other cases; `truth` that of scenes rendered as asked, which is
as much as the oracle allows.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch

from arlon.data.transforms import resize_and_crop
from arlon.evaluation import cases as suite
from arlon.evaluation.cases import Case, Outcome, Row
from arlon.evaluation.film import plain_reading
from arlon.film.geometry import ModelGeometry, open_model, read_geometry
from arlon.film.messages import (
    CodeRequest,
    CodeResult,
    Job,
    RefineRequest,
    RefineResult,
)
from arlon.film.plan import make_plan, resolve_storyboard
from arlon.film.prepare import make_settings
from arlon.film.schedule import film_requests, text_request
from arlon.film.settings import Settings
from arlon.film.storyboard import Duration, Shot, Storyboard
from arlon.film.take_media import TakeMedia
from arlon.film.workers import CodeWorker, DecodeWorker, RefineWorker, TextWorker, torch_threads
from pipelines.deliver.sheet import SheetRow, evenly_spaced, frames_to_sheet, write_sheet
from pipelines.store.run_folder import write_json

Mode = Literal["arlon", "base", "codes", "true_codes"]
MODES: tuple[Mode, ...] = get_args(Mode)
SHEET_COLUMNS = 8
COLUMNS = f"{'':22}{'right':>7}{'95 % interval':>18}{'n':>5}{'guess':>8}{'shuffled':>10}{'truth':>8}"


# --- making films --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model and how its films are made; None leaves a value to the model."""

    path: str
    name: str
    model_hash: str
    geometry: ModelGeometry
    settings: Settings
    num_inference_steps: int | None = None
    guidance_scale: float | None = None

    def job(self, case: Case) -> Job:
        """The film of a case. Nothing is written, so it has no folder."""
        defaults = self.geometry.defaults
        shots = tuple(
            Shot(prompt=prompt, duration=Duration(seconds=shot.seconds))
            for prompt, shot in zip(case.prompts, case.scene.shots, strict=True)
        )
        film = Storyboard(
            shots=shots,
            seed=case.seed,
            guidance_scale=self.guidance_scale,
            num_inference_steps=self.num_inference_steps,
        )
        return Job(
            plan=make_plan(resolve_storyboard(film, defaults, case.seed), self.geometry),
            settings=self.settings,
            model_path=self.path,
            model_hash=self.model_hash,
        )


def load_model(
    name_or_path: str,
    *,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Model:
    """Open a model; see `arlon.film.prepare.make_settings` for `settings`.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If it is damaged, or a setting is out of range.
    """
    folder, identity = open_model(name_or_path)
    geometry = read_geometry(folder)
    return Model(
        path=str(folder.path.resolve()),
        name=identity["name"],
        model_hash=identity["hash"],
        geometry=geometry,
        settings=make_settings(geometry, settings or {}),
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
    )


class CodeStep(Protocol):
    """Anything that writes codes as `CodeWorker` does."""

    def run(self, request: CodeRequest) -> CodeResult: ...


class BlankCodes:
    """Code 0 everywhere, where codes decide nothing but the size of a film."""

    def __init__(self, job: Job) -> None:
        film, geometry = job.plan.storyboard, job.plan.geometry
        rows, columns = geometry.latent_size(film.height or 0, film.width or 0)
        self._grid = (-(-rows // geometry.code_ratio[1]), -(-columns // geometry.code_ratio[2]))

    def run(self, request: CodeRequest) -> CodeResult:
        """Write."""
        return CodeResult(codes=torch.zeros(1, request.stop, *self._grid, dtype=torch.int64), elapsed_s=0.0)


class GivenCodes:
    """The code frames (1, n, cH, cW) of a take that are there from the start."""

    def __init__(self, codes: torch.Tensor) -> None:
        self._codes = codes

    def run(self, request: CodeRequest) -> CodeResult:
        """Write."""
        if request.take or self._codes.shape[1] < request.stop:
            raise ValueError(f"the codes are {self._codes.shape[1]} frames of one take, wanted {request.stop}")
        return CodeResult(codes=self._codes[:, : request.stop], elapsed_s=0.0)


class SceneEncoder:
    """Codes of scenes as the data of a training has them: rendered, through the video VAE and the fine VQ-VAE."""

    def __init__(self, job: Job) -> None:
        """Load both for films of the model, size and rate of `job`."""
        from arlon.models.video_vae import VideoVAE
        from arlon.models.vqvae import LatentVQVAE

        self._defaults = job.plan.geometry.defaults
        self._vae = VideoVAE.from_pretrained(job.component("vae"))
        self._vqvae = LatentVQVAE.from_pretrained(job.component("vqvae"))

    def __call__(self, case: Case) -> torch.Tensor:
        """Codes (1, n, cH, cW) of the scene of a case."""
        return self.codes(self.latent(case))

    @torch.inference_mode()
    def latent(self, case: Case) -> torch.Tensor:
        """Latent (1, C, T, H, W) of the scene of a case."""
        size = {"height": self._defaults.height, "width": self._defaults.width}
        frames = np.concatenate(suite.render_case(case, fps=self._defaults.fps, **size))
        return self._vae.encode(resize_and_crop(frames, **size)[None]).float()

    @torch.inference_mode()
    def codes(self, latent: torch.Tensor) -> torch.Tensor:
        """Codes (1, n, cH, cW) of a latent (1, C, T, H, W)."""
        return self._vqvae.encode(latent)


class BaseRefineWorker(RefineWorker):
    """The diffusion transformer without semantic injection; frames are carried over as ever."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.injection = self.vqvae = None  # blank codes are not decoded either


class CoarseWorker(RefineWorker):
    """No diffusion: the latent of a segment is what the VQ-VAE decodes from its codes."""

    @torch.inference_mode()
    def run(self, request: RefineRequest) -> RefineResult:
        """Decode the codes."""
        assert request.codes is not None
        segment = request.segment
        codes = request.codes.codes[:, : segment.num_code_frames].to(self.settings.device)
        latent = self.coarse_latent(codes, request)[:, :, segment.overlap :].contiguous().cpu()
        return RefineResult(latent=latent, overlap_hash=None, codes_hash="", elapsed_s=0.0)


@dataclass(frozen=True)
class SegmentParts:
    """Output of each role for a segment of a film; the frames (F, pH, pW, 3) uint8 are those it adds to the film."""

    frames: np.ndarray
    codes: CodeResult
    refined: RefineResult


class FilmMaker:
    """Makes the frames of one film after another; the networks are loaded once."""

    def __init__(
        self,
        job: Job,
        mode: Mode = "arlon",
        shown: Callable[[CodeResult, Job], CodeResult] | None = None,
        codes: CodeStep | None = None,
    ) -> None:
        """Load the workers that `mode` needs, for films of the model and settings of `job`.

        `shown` changes the codes that the diffusion transformer sees; the code model continues from its own. `codes`
        writes them in place of the model's.
        """
        refine = {"base": BaseRefineWorker, "codes": CoarseWorker}.get(mode, RefineWorker)
        self.mode = mode
        self._text = TextWorker(job)
        self._codes = codes
        if codes is None and mode != "true_codes":
            self._codes = BlankCodes(job) if mode == "base" else CodeWorker(job)
        self._refine, self._decode = refine(job), DecodeWorker(job)
        self._shown = shown or (lambda codes, job: codes)

    def shots(
        self, job: Job, given: torch.Tensor | None = None, media: Mapping[int, TakeMedia] | None = None
    ) -> list[np.ndarray]:
        """Frames (F, pH, pW, 3) uint8 of every shot of a film, as they are before the film is encoded."""
        return shots_of(job, [parts.frames for parts in self.segments(job, given, media)])

    def segments(
        self, job: Job, given: torch.Tensor | None = None, media: Mapping[int, TakeMedia] | None = None
    ) -> Iterator[SegmentParts]:
        """The segments of a film in order.

        Args:
            job: The film.
            given: Codes (1, n, cH, cW) in place of those of the code model.
            media: What its shots are given, by shot.
        """
        code_step = self._codes if given is None else GivenCodes(given)
        if code_step is None:
            raise ValueError("the codes of this mode must be given")
        text = self._text.run(text_request(job.plan))
        codes: CodeResult | None = None
        refined: RefineResult | None = None
        for request in film_requests(job, media):
            if request.segment.starts_take:
                codes = refined = None
            codes = code_step.run(replace(request.code, text=text, before=codes))
            shown = self._shown(codes, job)
            before, refined = refined, self._refine.run(replace(request.refine, text=text, codes=shown, before=refined))
            frames = self._decode.run(replace(request.decode, refined=refined, before=before)).frames
            yield SegmentParts(frames, codes, refined)


def shots_of(job: Job, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The shots of a film whose frames come in `parts`; these may end a few frames before a shot does."""
    ends = [shot.start_frame + shot.num_frames for shot in job.plan.shots]
    return np.split(np.concatenate(parts), ends[:-1])


# --- measuring -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """Result of a case, and some frames (n, pH, pW, 3) of each of its shots."""

    outcome: Outcome
    pictures: tuple[np.ndarray, ...]


def run_cases(model: Model, cases: Sequence[Case], mode: Mode, progress: Callable[[int, int], None]) -> list[Result]:
    """Make and judge cases; `progress` is called with (done, all) after each."""
    results = []
    with torch_threads(model.settings.num_threads):
        maker = FilmMaker(model.job(cases[0]), mode)
        encode = SceneEncoder(model.job(cases[0])) if mode == "true_codes" else None
        for case in cases:
            shots = maker.shots(model.job(case), encode and encode(case))
            pictures = tuple(frames[evenly_spaced(0, len(frames), SHEET_COLUMNS)] for frames in shots)
            results.append(Result(suite.judge(case, shots, fps=model.geometry.defaults.fps), pictures))
            progress(len(results), len(cases))
    return results


# --- showing -------------------------------------------------------------------------------------------------


def table_lines(rows: Mapping[str, Row]) -> list[str]:
    """The table as text; figures without any case are left out."""
    lines = [COLUMNS]
    for name, row in rows.items():
        if row.right.count:
            interval = f"[{row.right.low:.3f}, {row.right.high:.3f}]"
            others = f"{_cell(row.guess):>8}{_cell(row.shuffled):>10}{_cell(row.truth):>8}"
            lines.append(f"{name:22}{row.right.mean:7.3f}{interval:>18}{row.right.count:5}{others}")
    return lines


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"


def sheet_rows(results: Iterable[Result]) -> list[SheetRow]:
    """Rows of the contact sheet: a row a shot, its prompt above it, and what is wrong above the last of a case."""
    rows = []
    for number, result in enumerate(results, start=1):
        prompts, scores = result.outcome.case.prompts, result.outcome.scores
        wrong = ", ".join(name for name, value in scores.items() if value < 1 and name != "appears")
        titles = [f"{number}. {prompt}" for prompt in prompts]
        titles[-1] += f"   (wrong: {wrong})" if wrong else ""
        rows += [SheetRow(title=t, frames=frames) for t, frames in zip(titles, result.pictures, strict=True)]
    return rows


def to_plain(outcome: Outcome) -> dict[str, Any]:
    """A case and what came of it, for JSON."""
    case = outcome.case
    return {
        "prompts": list(case.prompts),
        "seed": case.seed,
        "changed": case.changed,
        "asked": [asdict(shot) for shot in case.scene.shots],
        "read": [plain_reading(reading) for reading in outcome.readings],
        "scores": _without_nan(outcome.scores),
        "truth_scores": _without_nan(outcome.truth_scores),
    }


def _without_nan(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {name: _without_nan(value) for name, value in values.items()}
    return None if isinstance(values, float) and math.isnan(values) else values


class ProgressLine:
    """Shows on stderr how far a suite is and how long it will take."""

    def __init__(self, label: str) -> None:
        self._label, self._started_s = label, time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        """Show."""
        elapsed_s = time.perf_counter() - self._started_s
        left_s = elapsed_s / done * (total - done)
        end = "\n" if done == total or not sys.stderr.isatty() else ""
        start = "\r" if sys.stderr.isatty() else ""
        text = f"{start}{self._label} {done}/{total}, {elapsed_s:.0f} s, {left_s:.0f} s left "
        print(text, end=end, file=sys.stderr, flush=True)


# --- command line --------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="shapes", help="name or folder of the model")
    add("--mode", choices=MODES, default="arlon", help="whole model, or parts of it")
    add("--prompts", type=int, default=64, help="single-shot films; 0 for none")
    add("--switches", type=int, default=24, help="takes with a prompt switch; 0 for none")
    add("--split", choices=("held_out", "train"), default="held_out", help="attribute pairs and phrasings")
    add("--two-objects", type=float, default=0.0, metavar="SHARE", help="share of prompts with two objects")
    add("--steps", type=int, help="solver steps; default: the model's")
    add("--guidance-scale", type=float, help="of the diffusion transformer; default: the model's")
    add("--ar-guidance-scale", type=float, help="of the code model; default: the model's")
    add("--ar-temperature", type=float, help="of the code model; default: the model's")
    add("--ar-top-p", type=float, help="of the code model; default: the model's")
    add("--seed", type=int, default=0, help="of the suite: scenes, phrasings and film seeds")
    add("--threads", type=int, default=1, help="of PyTorch")
    add("--sheet", type=Path, metavar="OUT.png", help="write a contact sheet")
    add("--json", type=Path, metavar="OUT.json", help="write all figures, and what was read of every case")
    args = parser.parse_args(argv)
    if args.prompts < 0 or args.switches < 0 or not args.prompts + args.switches:
        parser.error("--prompts and --switches count cases: neither may be negative, and one must be positive")
    if not 0 <= args.two_objects <= 1:
        parser.error(f"--two-objects is a share in [0, 1], got {args.two_objects}")
    return args


def model_from_args(args: argparse.Namespace) -> Model:
    """Open the model that the command line asks for."""
    names = ("ar_guidance_scale", "ar_temperature", "ar_top_p")
    return load_model(
        args.model,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance_scale,
        settings={"num_threads": args.threads} | {name: getattr(args, name) for name in names},
    )


def make_cases(args: argparse.Namespace, geometry: ModelGeometry) -> dict[str, list[Case]]:
    """The suites asked for, by name."""
    defaults, grid = geometry.defaults, geometry.grid
    first_s, later_s = grid.segment_frames / defaults.fps, grid.stride_frames / defaults.fps
    common: dict[str, Any] = {"split": args.split, "seed": args.seed, "aspect": defaults.width / defaults.height}
    prompts = suite.sample_cases(args.prompts, seconds=[first_s], two_objects_prob=args.two_objects, **common)
    switches = suite.sample_cases(args.switches, seconds=[first_s, later_s], **common)
    return {name: cases for name, cases in (("prompts", prompts), ("switches", switches)) if cases}


def report(args: argparse.Namespace, model: Model, results: Mapping[str, Sequence[Result]]) -> None:
    """Print the tables, and write what else is asked for."""
    rows = {name: suite.tabulate([result.outcome for result in part]) for name, part in results.items()}
    for name, part in results.items():
        print(f"\n{len(part)} {name}, {args.split} split, model {model.name}, mode {args.mode}, seed {args.seed}")
        print("\n".join(table_lines(rows[name])))
    if args.json:
        figures = {name: {key: asdict(row) for key, row in part.items()} for name, part in rows.items()}
        cases = {name: [to_plain(result.outcome) for result in part] for name, part in results.items()}
        options = {key: value for key, value in vars(args).items() if key not in ("json", "sheet", "model")}
        identity = {"name": model.name, "hash": model.model_hash}
        record = {"model": identity, "options": options, "settings": asdict(model.settings)}
        write_json(args.json, record | {"figures": _without_nan(figures), "cases": cases})
    if args.sheet:
        everything = [row for part in results.values() for row in sheet_rows(part)]
        write_sheet(frames_to_sheet(everything), args.sheet)


def prepare_places(*paths: Path | None) -> None:
    """Make the folders of files that are written at the end.

    Raises:
        ValueError: If one of the files is a folder.
        OSError: If a folder cannot be made.
    """
    for path in filter(None, paths):
        if path.is_dir():
            raise ValueError(f"'{path}' is a folder: name a file to write")
        path.parent.mkdir(parents=True, exist_ok=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the suites."""
    args = parse_args(argv)
    try:
        prepare_places(args.json, args.sheet)
        model = model_from_args(args)
        suites = make_cases(args, model.geometry)
        results = {name: run_cases(model, cases, args.mode, ProgressLine(name)) for name, cases in suites.items()}
        report(args, model, results)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
