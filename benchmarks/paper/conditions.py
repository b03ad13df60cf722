"""Films made under named conditions and their figures; a record for each film lets a stopped run continue.

A condition says which parts of the model make a film and how; every condition makes the same films: the same prompts
under the same seeds, fixed beforehand.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from arlon.checkpoint import read_json
from arlon.diffusion import samplers
from arlon.evaluation import cases as suite
from arlon.evaluation.cases import Case
from arlon.evaluation.film import FilmShot, Outline, measure_film, plain_number
from arlon.evaluation.metric_table import FORMAT
from arlon.files import append_line, make_folder, read_lines
from arlon.film.messages import CodeResult, Job
from arlon.film.workers import CodeWorker, torch_threads
from arlon.shapes import oracle, world
from benchmarks.prompt_accuracy import FilmMaker, Mode, Model, SceneEncoder, load_model

Record = dict[str, Any]
"""Record of a film: `figures` by name, scores of its `shots` and of their joins, what is `asked` of each,
`seconds` by role, `calls` of the DiT."""


@dataclass(frozen=True, kw_only=True)
class Condition:
    """Conditions under which films are made."""

    name: str
    mode: Mode = "arlon"
    steps: int | None = None
    """Solver steps; None: the model's."""
    model: str | None = None
    """Another model than the one of the experiment."""
    variant: str | None = None
    """Name of the variant whose model is meant; see `variants`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `arlon generate`, where they differ from the model's."""
    window_hop: int | None = None
    """Code frames by which the full window of the AR model moves, keeping the others; None for the model's own."""
    flipped: float = 0.0
    """Share of the codes that the DiT sees which are replaced by random ones, [0, 1]."""
    video: Literal["as asked", "other colours"] | None = None
    """Codes of a video in place of those of the AR model: the scene that the prompt asks for, or the same one with
    another colour of every object and another background. None: the AR model's."""
    measures_path: bool = False
    """Whether to compare the places of objects with the scene that the prompt asks for, as `path_followed`."""


def flip_codes(codes: torch.Tensor, share: float, codebook_size: int, seed: int) -> torch.Tensor:
    """Replace a share of codes (1, n, cH, cW) by others drawn evenly; which and by what depends on the seed alone.

    The draws of the first frames do not depend on how many frames there are.
    """
    flipped = codes.clone()
    for frame in range(codes.shape[1]):
        address = samplers.address_seed(seed, "flip", frame)
        generator = torch.Generator().manual_seed(address)
        chosen = torch.rand(codes.shape[2:], generator=generator) < share
        away = torch.randint(1, codebook_size, codes.shape[2:], generator=generator)
        flipped[0, frame] = torch.where(chosen, (codes[0, frame] + away) % codebook_size, codes[0, frame])
    return flipped


class HoppingCodeWorker(CodeWorker):
    """The AR model with another step of its window."""

    def __init__(self, job: Job, window_hop: int) -> None:
        super().__init__(job)
        assert self.model is not None
        self.model.config = replace(self.model.config, window_hop=window_hop)


def run_condition(
    condition: Condition,
    cases: Sequence[Case],
    folder: Path,
    *,
    model: str,
    written: dict[str, CodeResult],
    progress: Callable[[int, int], None],
) -> list[Record]:
    """Make and measure the film of every case; records in `folder` that fit are not made again.

    Args:
        condition: How.
        cases: What.
        folder: Where records are kept, a file a condition.
        model: Name or folder of the model.
        written: Codes that the AR model wrote under earlier conditions, to which these are added. It would write the
            same ones again wherever it has the same weights, sampling, prompts and seed, so they are taken over, and
            the seconds that they took are counted as if they had not been.
        progress: Called with (done, all) after each film.
    """
    loaded = load_model(condition.model or model, num_inference_steps=condition.steps, settings=condition.settings)
    path = folder / f"{condition.name.replace(' ', '_')}.jsonl"
    kept = {line.pop("key"): line for line in read_lines(path)}
    records: list[Record] = []
    maker: FilmMaker | None = None
    encode: SceneEncoder | None = None
    with torch_threads(loaded.settings.num_threads):
        for case in cases:
            key = _key(condition, case, loaded)
            if key not in kept:
                job = loaded.job(case)
                maker = maker or _make_maker(condition, job)
                encode = encode or (SceneEncoder(job) if condition.video else None)
                if encode:
                    scene = case if condition.video == "as asked" else in_other_colours(case)
                    given: CodeResult | None = CodeResult(codes=encode(scene), elapsed_s=0.0)
                else:
                    given = written.get(_code_key(condition, case, loaded))
                kept[key], codes = _film_record(maker, job, case, loaded, given, measures_path=condition.measures_path)
                if not encode:
                    written[_code_key(condition, case, loaded)] = codes
                make_folder(path.parent)
                append_line(path, {"key": key, **kept[key]})
            records.append(kept[key])
            progress(len(records), len(cases))
    return records


def _make_maker(condition: Condition, job: Job) -> FilmMaker:
    size = json.loads((job.component("ar") / "config.json").read_text())["codebook_size"]

    def shown(codes: CodeResult, job: Job) -> CodeResult:
        flipped = flip_codes(codes.codes, condition.flipped, size, job.plan.storyboard.seed or 0)
        return CodeResult(codes=flipped, elapsed_s=codes.elapsed_s)

    codes = None if condition.window_hop is None else HoppingCodeWorker(job, condition.window_hop)
    return FilmMaker(job, condition.mode, shown if condition.flipped else None, codes)


def in_other_colours(case: Case) -> Case:
    """The case with the next colour of every object in every shot, and the next background; layout and motion stay."""

    def shot_of(shot: world.Shot) -> world.Shot:
        objects = tuple(replace(look, colour=_next(world.COLOURS, look.colour)) for look in shot.objects)
        return replace(shot, objects=objects, background=_next(world.BACKGROUNDS, shot.background))

    return replace(case, scene=replace(case.scene, shots=tuple(map(shot_of, case.scene.shots))))


def _next(names: Sequence[str], name: str) -> str:
    names = tuple(names)
    return names[(names.index(name) + 1) % len(names)]


def _film_record(
    maker: FilmMaker, job: Job, case: Case, model: Model, given: CodeResult | None, *, measures_path: bool
) -> tuple[Record, CodeResult]:
    """Make and measure a film of one take, of `given` codes if there are any; its record and its codes."""
    started_s = time.perf_counter()
    made, code_s, refine_s = [], 0.0, 0.0
    for parts in maker.segments(job, None if given is None else given.codes):
        made.append(parts.frames)
        code_s, refine_s = code_s + parts.codes.elapsed_s, refine_s + parts.refined.elapsed_s
    total_s = time.perf_counter() - started_s
    if given is not None:
        code_s, total_s = given.elapsed_s, total_s + given.elapsed_s
    codes = CodeResult(codes=parts.codes.codes, elapsed_s=code_s)
    starts = [segment.start_frame for segment in job.plan.segments]
    lengths = [shot.num_frames for shot in job.plan.shots]
    outline = _outline(case.prompts, lengths, starts)
    frames = np.concatenate(made)
    measured = measure_film(frames, outline, fps=model.geometry.defaults.fps)
    if measures_path:
        measured["figures"]["path_followed"] = plain_number(_path_followed(frames, case, lengths, model))
    steps = 0 if maker.mode == "codes" else job.plan.storyboard.num_inference_steps or 0
    record = {
        "figures": measured["figures"],
        "shots": _shot_figures(measured),
        "asked": [_asked(shot) for shot in case.scene.shots],
        "seconds": {"total": total_s, "code": code_s, "refine": refine_s, "film": job.plan.duration_s},
        "calls": len(starts) * steps,
    }
    return record, codes


def _shot_figures(measured: Mapping[str, Any]) -> list[dict[str, float | None]]:
    """Scores of every shot, and of its join to the one before."""
    shots = [dict(shot["scores"]) for shot in measured["shots"]]
    for join in measured["joins"]:
        shots[join["shot"]] |= join["scores"] | {"seam_strength_switch": join["seam_strength"]}
    return shots


def _path_followed(frames: np.ndarray, case: Case, lengths: Sequence[int], model: Model) -> float:
    """Mean over shots of how far objects are where the scene of a case has them."""
    defaults = model.geometry.defaults
    rendered = suite.render_case(case, fps=defaults.fps, height=defaults.height, width=defaults.width)
    shares = []
    for shown, given in zip(np.split(frames, np.cumsum(lengths)[:-1]), rendered, strict=True):
        readings = (oracle.read_clip(clip, fps=defaults.fps) for clip in (given[: len(shown)], shown[: len(given)]))
        shares.append(oracle.path_followed(*readings))
    return float(np.mean(shares))


def _asked(shot: world.Shot) -> dict[str, Any]:
    """Whether an object of a shot has an attribute pair that training never shows, and the motions."""
    return {
        "held_out": any(world.is_held_out(look) for look in shot.objects),
        "motions": [look.motion for look in shot.objects],
    }


def _outline(prompts: Sequence[str], lengths: Sequence[int], segment_starts: Sequence[int]) -> Outline:
    ends = np.cumsum(lengths)
    shots = tuple(
        FilmShot(prompt=prompt, start_frame=int(end) - length, num_frames=length)
        for prompt, length, end in zip(prompts, lengths, ends, strict=True)
    )
    return Outline(shots=shots, segment_starts=tuple(segment_starts))


def _key(condition: Condition, case: Case, model: Model) -> str:
    """Everything that the figures of a film depend on. The hash of a model covers its weights, not its defaults."""
    settings = {name: value for name, value in asdict(model.settings).items() if name != "num_threads"}
    what = {"figures": FORMAT, **asdict(condition), "model": model.model_hash}
    what |= {"made_with": settings, "defaults": asdict(model.geometry.defaults)}
    what |= {"prompts": case.prompts, "seed": case.seed}
    return json.dumps(what, sort_keys=True, default=str)


def _code_key(condition: Condition, case: Case, model: Model) -> str:
    """Everything that the codes of a film depend on."""
    components = read_json(Path(model.path) / "model_index.json", "a model index")["components"]
    weights = None if condition.mode == "base" else [components[name]["sha256"] for name in ("ar", "text_encoder")]
    what = {
        "weights": weights,
        "window_hop": condition.window_hop,
        "settings": asdict(model.settings),
        "prompts": case.prompts,
        "seed": case.seed,
    }
    return json.dumps(what, sort_keys=True, default=str)
