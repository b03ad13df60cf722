"""Is memory flat and time linear in the length of a film? A short and a long film, each in processes of its own.

    python benchmarks/long_film.py --minutes 1 10 --json figures.json

Figures, of each film:

- `peak`: most memory of the whole process tree at once (Pss: shared pages count once), looked at five times a second.
- `segment`: seconds from commit to commit, in the first and the second half of the film.
- `windows`: largest difference between the coarse latent decoded from the codes in windows, as the film was made, and
  decoded from all codes of the take at once; of the films whose take is at most --whole latent frames long.

Memory is flat if the peak of the long film is at most 1.05 times that of the short one; time is linear if its second
half takes at most 1.05 times the first, per segment. The exit code says so.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

from arlon.files import write_json
from pipelines.store.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
PROMPTS = ("a red circle moves left on a black background", "a green circle moves right on a black background")
INTERVAL_S = 0.2
LIMIT = 1.05


@dataclass(frozen=True, kw_only=True)
class Film:
    """Time and memory that a film took."""

    minutes: float
    num_segments: int
    total_s: float
    peak_bytes: int
    first_half_s: float
    """Mean seconds a segment."""
    second_half_s: float
    window_difference: float | None
    """None: not looked at, the take is too long."""


def halves(commit_times_s: Sequence[float]) -> tuple[float, float]:
    """Mean seconds from commit to commit in the first and the second half.

    Raises:
        ValueError: If there are fewer than three commits.
    """
    if len(commit_times_s) < 3:
        raise ValueError(f"two halves need three segments, got {len(commit_times_s)}: make a longer film")
    spent = [after - before for before, after in pairwise(commit_times_s)]
    middle = len(spent) // 2
    return mean(spent[:middle]), mean(spent[middle:])


def descendants(parents: Mapping[int, int], root: int) -> set[int]:
    """A process and all below it, from the parent of each."""
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def tree_bytes(root: int) -> int:
    """Memory of a process and all below it; those that end meanwhile count as nothing."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, IndexError):
                continue
    return sum(_process_bytes(pid) for pid in descendants(parents, root))


def _process_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def make_film(minutes: float, arguments: argparse.Namespace, output: Path) -> tuple[float, int]:
    """Make a film of one take; seconds, and the most memory at once in bytes."""
    count = max(2, round(minutes * 60 / arguments.shot_seconds))
    prompts = [part for index in range(count) for part in ("--prompt", PROMPTS[index % len(PROMPTS)])]
    command = ["generate", *prompts, "--duration", f"{minutes * 60 / count:g}", "--seed", "7", "--quiet"]
    command += ["--threads", str(arguments.threads), "--executor", arguments.executor, "--output", str(output)]
    command += ["--model", arguments.model] if arguments.model else []
    command += ["--num-inference-steps", str(arguments.steps)] if arguments.steps else []
    started_s, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", *command],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        while process.poll() is None:
            peak = max(peak, tree_bytes(process.pid))
            time.sleep(INTERVAL_S)
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"arlon generate failed:\n{errors.read()}")
    return time.perf_counter() - started_s, peak


def window_difference(run_dir: Path, max_latents: int) -> float | None:
    """Largest difference of coarse latents decoded in windows and at once; None: a take is longer than that."""
    import torch

    from arlon.film.schedule import film_requests
    from arlon.film.workers import RefineWorker
    from pipelines.runs.resume import open_run, read_fitting_codes
    from pipelines.store.media import read_media

    run = open_run(run_dir)
    if max(take.num_latents for take in run.plan.takes) > max_latents:
        return None
    worker, codes, largest = RefineWorker(run.prepared.job), read_fitting_codes(run), 0.0
    whole: dict[int, Any] = {}
    with torch.inference_mode():
        for request in film_requests(run.prepared.job, read_media(run.folder, run.plan)):
            segment, take = request.segment, request.refine.take
            if take.index not in whole:
                grid = run.plan.geometry.latent_size(request.refine.height, request.refine.width)
                latents = worker.vqvae.decode(codes[take.index], num_latent_frames=take.num_latents)
                whole = {take.index: latents[..., : grid[0], : grid[1]]}
            part = worker.coarse_latent(codes[take.index][:, : segment.num_code_frames], request.refine)
            expected = whole[take.index][:, :, segment.start_latent : segment.start_latent + segment.num_latents]
            largest = max(largest, float((part - expected).abs().max()))
    return largest


def measure(minutes: float, arguments: argparse.Namespace, folder: Path) -> Film:
    """Make a film and measure it."""
    output = folder / f"{minutes:g}.mp4"
    total_s, peak = make_film(minutes, arguments, output)
    run = RunFolder(output.with_suffix(".run"))
    times = [event["time"] for event in run.events() if event["event"] == "commit"]
    first, second = halves(times)
    return Film(
        minutes=minutes,
        num_segments=len(times),
        total_s=total_s,
        peak_bytes=peak,
        first_half_s=first,
        second_half_s=second,
        window_difference=window_difference(run.path, arguments.whole),
    )


def verdicts(films: Sequence[Film]) -> dict[str, bool]:
    """Claims, and whether each holds: flat memory over lengths, linear time in the longest film, equal windows."""
    films = sorted(films, key=lambda film: film.minutes)
    short, long = films[0], films[-1]
    looked_at = [film.window_difference for film in films if film.window_difference is not None]
    return {
        "flat memory": long.peak_bytes <= LIMIT * short.peak_bytes,
        "linear time": long.second_half_s <= LIMIT * long.first_half_s,
        "equal windows": all(difference < 1e-5 for difference in looked_at),
    }


def report(films: Iterable[Film]) -> list[str]:
    """A line a film."""
    lines = [f"{'minutes':>8}{'segments':>10}{'seconds':>10}{'peak MB':>10}{'1st half':>10}{'2nd half':>10}  windows"]
    for film in films:
        difference = "-" if film.window_difference is None else f"{film.window_difference:.1e}"
        lines.append(
            f"{film.minutes:>8g}{film.num_segments:>10}{film.total_s:>10.1f}{film.peak_bytes / 2**20:>10.1f}"
            f"{film.first_half_s:>10.3f}{film.second_half_s:>10.3f}  {difference}"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; 0 if memory is flat, time linear and windows equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, nargs="+", default=[1.0, 10.0])
    parser.add_argument("--shot-seconds", type=float, default=10.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, help="solver steps; without: the model's")
    parser.add_argument("--model", help="name or folder; without: shapes")
    parser.add_argument("--executor", choices=("local", "ray"), default="local")
    parser.add_argument("--whole", type=int, default=400, help="latent frames that may be decoded at once")
    parser.add_argument("--json", type=Path, help="write the figures there")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        films = [measure(minutes, given, Path(folder)) for minutes in given.minutes]
    found = verdicts(films)
    print("\n".join(report(films)))
    print(", ".join(f"{name}: {'yes' if holds else 'NO'}" for name, holds in found.items()))
    if given.json:
        write_json(given.json, {"films": [asdict(film) for film in films], "verdicts": found})
    return 0 if all(found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
