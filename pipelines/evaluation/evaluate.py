"""Evaluation of a set of films: figures in one file and one page, several films at a time, resumable.

    OUTPUT/evaluation.json      every figure of every film, and their means with bootstrap intervals
    OUTPUT/index.html           the same figures as a page to look at
    OUTPUT/films/KEY.json, .png figures of one film, and its contact sheet

KEY is a hash of the film, of its prompts as far as they are known, and of the networks used. A film whose KEY is there
already is not measured again.
"""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from arlon.data.video_io import probe, read_video
from arlon.errors import UsageError
from arlon.evaluation import cases
from arlon.evaluation.film import measure_film
from arlon.evaluation.metric_table import FIGURES, FORMAT
from arlon.evaluation.vbench.networks import Backbone, load_backbone
from arlon.evaluation.vbench.rules import RULES
from arlon.files import hash_file, hash_plain, write_bytes, write_json
from arlon.version import version
from pipelines.deliver.sheet import SheetRow, evenly_spaced, frames_to_sheet
from pipelines.evaluation.film_set import FilmFile, Problem, add_prompts, find_films, outline_of, prompt_of_name
from pipelines.evaluation.report import render_report

RESULT_NAME = "evaluation.json"
PAGE_NAME = "index.html"
FILMS_NAME = "films"
SHEET_COLUMNS = 8
SHEET_HEIGHT = 96
BOOTSTRAP_SEED = 0


@dataclass(frozen=True, kw_only=True)
class EvaluationProgress:
    """State of an evaluation after a film."""

    done: int
    total: int
    name: str
    problem: str = ""
    """Why the film could not be measured; empty if it was."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A finished evaluation."""

    result: Path
    page: Path
    num_films: int
    """Films measured, in this evaluation or an earlier one."""
    num_reused: int
    """Number of those that an earlier evaluation measured."""
    problems: tuple[Problem, ...]
    figures: dict[str, cases.Share]


@dataclass(frozen=True, kw_only=True)
class _Task:
    """One film to measure; all fields can be sent to another process."""

    film: FilmFile
    key: str
    folder: Path


@dataclass(kw_only=True)
class _Worker:
    """State of a process that measures films: its networks, which are loaded once."""

    backbones: Mapping[str, Backbone] = field(default_factory=dict)


_worker = _Worker()


def evaluate(
    sources: Sequence[Path],
    output: Path,
    *,
    prompts: Path | None = None,
    backbones: Mapping[str, str] | None = None,
    device: str = "cpu",
    num_workers: int = 1,
    on_progress: Callable[[EvaluationProgress], None] | None = None,
) -> Evaluation:
    """Measure films, and write the figures and the page.

    A film, prompt or backbone that cannot be used becomes a problem of the result, and everything else is measured. An
    interrupted evaluation continues where it was.

    Args:
        sources: Films and folders; see `pipelines.evaluation.film_set`.
        output: Folder of the results.
        prompts: Prompt file; see `pipelines.evaluation.film_set`.
        backbones: Folder or hub id of a network, by VBench's name of the dimension.
        device: Device that the networks compute on.
        num_workers: Number of processes.
        on_progress: Called after every film.

    Raises:
        UsageError: If there is nothing to measure, or an argument is out of range.
        OSError: If the output cannot be written.
    """
    if num_workers < 1:
        raise UsageError(f"--workers must be at least 1, got {num_workers}")
    if output.exists() and not output.is_dir():
        raise UsageError(f"'{output}' is a file: name a folder as --output")
    films, problems = find_films(sources, leave_out=output)
    if not films:
        raise UsageError("\n  ".join(["there is no film to evaluate:", *(f"{p.source}: {p.reason}" for p in problems)]))
    if prompts is not None:
        films, more = add_prompts(films, prompts)
        problems += more
    loaded, more = _load_backbones(backbones or {}, device)
    problems += more
    used = {name: backbone.description for name, backbone in loaded.items()}
    folder = output / FILMS_NAME
    folder.mkdir(parents=True, exist_ok=True)
    tasks = []
    for film in films:
        try:
            tasks.append(_Task(film=film, key=film_key(film, used), folder=folder))
        except OSError as error:
            problems.append(Problem(source=film.name, reason=f"cannot be read: {error.strerror or error}"))
    waiting = list({task.key: task for task in tasks if _stored(task) is None}.values())
    sources_used = {name: source for name, source in (backbones or {}).items() if name in loaded}
    failed = _measure_all(waiting, loaded, sources_used, device, num_workers, on_progress)
    problems += [Problem(source=t.film.name, reason=failed[t.key]) for t in tasks if t.key in failed]
    entries = [{"name": t.film.name, "key": t.key} | (_stored(t) or {}) for t in tasks if t.key not in failed]
    reused = len({task.key for task in tasks}) - len(waiting)
    record = summarise(entries, problems, used)
    write_json(output / RESULT_NAME, record)
    sheets = {entry["key"]: (folder / f"{entry['key']}.png").read_bytes() for entry in entries}
    write_bytes(output / PAGE_NAME, render_report(record, sheets).encode(errors="backslashreplace"))
    return Evaluation(
        result=output / RESULT_NAME,
        page=output / PAGE_NAME,
        num_films=len(entries),
        num_reused=reused,
        problems=tuple(problems),
        figures=_shares(entries),
    )


def film_key(film: FilmFile, backbones: Mapping[str, str]) -> str:
    """Hash everything that the figures of a film depend on.

    Raises:
        OSError: If the film cannot be read.
    """
    if not film.path.is_file():
        raise FileNotFoundError("no regular file")
    sidecar = film.path.with_suffix(".json")
    known = {
        "format": FORMAT,
        "film": hash_file(film.path),
        "sidecar": hash_file(sidecar) if sidecar.is_file() else None,
        "prompts": film.prompts or prompt_of_name(film.path),
        "backbones": dict(backbones),
        "rules": RULES,
    }
    return hash_plain(known)[:24]


def _stored(task: _Task) -> dict[str, Any] | None:
    """Read the figures of a film that was measured before; None if there are none, or they are damaged."""
    try:
        values = json.loads((task.folder / f"{task.key}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_whole = isinstance(values, dict) and values.get("format") == FORMAT
    return values if is_whole and (task.folder / f"{task.key}.png").is_file() else None


def _load_backbones(sources: Mapping[str, str], device: str) -> tuple[dict[str, Backbone], list[Problem]]:
    """Load networks by VBench's names of their dimensions; those that cannot be loaded become problems."""
    loaded, problems = {}, []
    for name, source in sources.items():
        try:
            loaded[name] = load_backbone(name, source, device=device)
        except Exception as error:  # a folder may hold anything, and errors of several libraries come through
            problems.append(Problem(source=f"--backbone {name}", reason=str(error) or type(error).__name__))
    return loaded, problems


# --- measuring -----------------------------------------------------------------------------------------------


def _measure_all(
    tasks: Sequence[_Task],
    loaded: Mapping[str, Backbone],
    sources: Mapping[str, str],
    device: str,
    num_workers: int,
    on_progress: Callable[[EvaluationProgress], None] | None,
) -> dict[str, str]:
    """Measure films and store their figures.

    Returns:
        Reasons why films failed, by key.
    """
    failed = {}
    num_workers = min(num_workers, len(tasks))
    if num_workers < 2:
        steps: Iterable[tuple[_Task, str]] = ((task, _measure(task, loaded)) for task in tasks)
    else:
        steps = _measure_in_processes(tasks, sources, device, num_workers)
    for done, (task, problem) in enumerate(steps, start=1):
        if problem:
            failed[task.key] = problem
        if on_progress is not None:
            on_progress(EvaluationProgress(done=done, total=len(tasks), name=task.film.name, problem=problem))
    return failed


def _measure_in_processes(
    tasks: Sequence[_Task], sources: Mapping[str, str], device: str, num_workers: int
) -> Iterator[tuple[_Task, str]]:
    """Measure several films at a time, and yield each with its problem.

    A process that dies takes its whole pool with it. The films that were not measured by then are measured again, each
    in a process of its own, so that only the film that kills its process fails.
    """
    left = list(tasks)
    # The pool may break while films are still being submitted.
    with suppress(BrokenProcessPool), _pool(sources, device, num_workers) as pool:
        futures = {pool.submit(_measure_here, task): task for task in tasks}
        for future in as_completed(futures):
            with suppress(BrokenProcessPool):
                problem = future.result()
                left.remove(futures[future])
                yield futures[future], problem
    for task in left:
        with _pool(sources, device, 1) as pool:
            try:
                problem = pool.submit(_measure_here, task).result()
            except BrokenProcessPool:
                problem = "measuring it ended the process, perhaps for want of memory"
        yield task, problem


@contextmanager
def _pool(sources: Mapping[str, str], device: str, num_workers: int) -> Iterator[Executor]:
    """A pool of processes that have the networks loaded; it ends with the `with` block."""
    context = multiprocessing.get_context("spawn")  # a forked process may hang, since PyTorch has threads
    pool = ProcessPoolExecutor(
        num_workers, mp_context=context, initializer=_start_worker, initargs=(dict(sources), device)
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(sources: dict[str, str], device: str) -> None:
    """Make a process of the pool ready: load the networks, and end with the process that owns the pool."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides; a film that is started is finished
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _worker.backbones = {name: load_backbone(name, source, device=device) for name, source in sources.items()}


def _end_with_parent() -> None:
    """End this process when its parent dies; it would wait forever for its next film."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _measure_here(task: _Task) -> str:
    """Measure a film with the networks of this process."""
    return _measure(task, _worker.backbones)


def _measure(task: _Task, backbones: Mapping[str, Backbone]) -> str:
    """Measure a film and store its figures; returns the reason if it cannot be measured, else an empty text."""
    try:
        info = probe(task.film.path)
        frames = read_video(task.film.path)
        outline = outline_of(task.film, info.tags, len(frames))
        found = measure_film(frames, outline, fps=info.fps, backbones=backbones)
        about = {
            "num_frames": len(frames),
            "fps": info.fps,
            "height": frames.shape[1],
            "width": frames.shape[2],
            "duration_s": len(frames) / info.fps,
        }
        write_bytes(task.folder / f"{task.key}.png", _sheet(frames, found["shots"]))
        write_json(task.folder / f"{task.key}.json", {"format": FORMAT, **about, **found})
    except Exception as error:  # whatever is wrong with one film, the others are measured
        text = " ".join(str(error).split()) or type(error).__name__
        return text.replace(str(task.film.path), task.film.path.name)
    return ""


def _sheet(frames: np.ndarray, shots: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw a contact sheet as PNG, with a row for each shot and what the oracle found wrong in its title."""
    rows = []
    for number, shot in enumerate(shots, start=1):
        scores = {name: shot["scores"].get(name) for name in cases.PROMPT_ATTRIBUTES}
        wrong = [name for name, value in scores.items() if value is not None and value < 1]
        title = f"{number}. {shot['prompt']}" + (f"   (not as asked: {', '.join(wrong)})" if wrong else "")
        picked = frames[evenly_spaced(shot["start_frame"], shot["num_frames"], SHEET_COLUMNS)]
        height, width = picked.shape[1:3]
        if height > SHEET_HEIGHT:
            size = (max(1, round(width * SHEET_HEIGHT / height)), SHEET_HEIGHT)
            small = [Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS) for frame in picked]
            picked = np.stack([np.asarray(frame) for frame in small])
        rows.append(SheetRow(title=title, frames=picked))
    buffer = io.BytesIO()
    frames_to_sheet(rows).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


# --- the result ----------------------------------------------------------------------------------------------


def summarise(
    films: Sequence[Mapping[str, Any]], problems: Sequence[Problem], backbones: Mapping[str, str]
) -> dict[str, Any]:
    """Build the content of `evaluation.json` in plain values.

    Means are over films, or over the films that have a shot at a position. Intervals are 95 % percentile bootstrap
    intervals over the same films.

    Args:
        films: Figures of each film.
        problems: What could not be used.
        backbones: Descriptions of the networks used, by VBench's name of the dimension.
    """
    skipped: dict[str, Counter[str]] = {}
    for film in films:
        for name, reason in film["skipped"].items():
            skipped.setdefault(name, Counter())[reason] += 1
    return {
        "format": FORMAT,
        "arlon": version(),
        "num_films": len(films),
        "problems": [asdict(problem) for problem in problems],
        "definitions": {name: asdict(figure) for name, figure in FIGURES.items()},
        "backbones": dict(backbones),
        "bootstrap_seed": BOOTSTRAP_SEED,
        "figures": {name: _plain_share(share) for name, share in _shares(films).items()},
        "skipped": {name: dict(counts) for name, counts in skipped.items()},
        "by_shot": {name: [_plain_share(share) for share in shares] for name, shares in _shares_by_shot(films).items()},
        "films": list(films),
    }


def _shares(films: Sequence[Mapping[str, Any]]) -> dict[str, cases.Share]:
    """Compute mean and interval of every figure over films."""
    rows = [{name: _number(film["figures"][name]) for name in FIGURES} for film in films]
    return cases.summarise(rows, seed=BOOTSTRAP_SEED) if rows else {}


def _shares_by_shot(films: Sequence[Mapping[str, Any]]) -> dict[str, list[cases.Share]]:
    """Compute mean and interval of every prompt attribute at each position of a shot, over the films that have one."""
    shares: dict[str, list[cases.Share]] = {}
    for position in range(max((len(film["shots"]) for film in films), default=0)):
        shots = [film["shots"][position] for film in films if position < len(film["shots"])]
        rows = [{name: _number(shot["scores"].get(name)) for name in cases.PROMPT_ATTRIBUTES} for shot in shots]
        for name, share in cases.summarise(rows, seed=BOOTSTRAP_SEED).items():
            shares.setdefault(name, []).append(share)
    return {name: row for name, row in shares.items() if any(share.count for share in row)}


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _plain_share(share: cases.Share) -> dict[str, Any]:
    return {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in asdict(share).items()}
