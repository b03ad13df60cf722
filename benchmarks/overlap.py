"""Time that Ray hides by overlapping work, and its overhead: the same film with both executors, from their events.

    python benchmarks/overlap.py --seconds 60 --picture overlap.png --json figures.json
    python benchmarks/overlap.py --seconds 60 --steps 5 --base-steps 30 --threads 2 1    # against the base alone

Figures, of each executor:

- `work`: seconds from the beginning of the first step to the finished film, so without loading and without Ray's start.
- `hidden`: share of the time of the code model, and of decoding, in which the diffusion transformer worked too.
- `first second`: from the start of the command until the first segment could be played, by parts: `checks` (up to the
  start of the run), `load` (up to the first step), `codes`, `refine`, `decode`, `write`, and `waits` between them.

`overhead` is work with Ray over work without it, minus 1. It needs an idle machine: with one core for both it is what
Ray costs, with more cores what it gains is in it too. With --repeat the least of each is taken. With --base-steps the
base alone makes the film too, with every executor; the fastest of it is compared to the fastest with codes.
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
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from arlon.files import write_json
from pipelines.store.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
ROLES = ("code", "refine", "decode", "write")
PROMPTS = ("a red circle moves left on a black background", "a green circle moves right on a black background")
BASE = "base, "
"""Before the name of an executor: the film of the base alone."""
COLOURS = {"code": "#4477aa", "refine": "#cc6677", "decode": "#ddaa33", "write": "#228833"}
Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """When each role worked, in seconds since the command started."""

    steps: Mapping[str, tuple[Interval, ...]]
    """By role, in order of segments."""
    run_started_s: float
    first_commit_s: float
    film_s: float
    """When the film was in its place."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Result for an executor; times in seconds."""

    work_s: float
    hidden: dict[str, float]
    busy_s: dict[str, float]
    first_second_s: dict[str, float]


def read_timeline(events: Iterable[Mapping[str, Any]], started_s: float) -> Timeline:
    """The timeline of a run that was made in one go.

    Args:
        events: Of its run folder.
        started_s: Clock time at which the command started.

    Raises:
        ValueError: If the run was not made to its end.
    """
    steps: dict[str, list[Interval]] = {role: [] for role in ROLES}
    marks: dict[str, float] = {}
    for event in events:
        if event["event"] == "step" and event["role"] in steps and event["ended"]:
            end = event["ended"] - started_s
            steps[event["role"]].append((end - event["seconds"], end))
        elif event["event"] in ("start", "commit", "film"):
            marks.setdefault(event["event"], event["time"] - started_s)
    if set(marks) != {"start", "commit", "film"}:
        raise ValueError(f"the run was not made to its end: it has {', '.join(sorted(marks)) or 'no events'}")
    return Timeline(
        steps={role: tuple(intervals) for role, intervals in steps.items()},
        run_started_s=marks["start"],
        first_commit_s=marks["commit"],
        film_s=marks["film"],
    )


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Disjoint intervals that cover the same, in order."""
    joined: list[Interval] = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        elif end > start:
            joined.append((start, end))
    return joined


def hidden_share(intervals: Iterable[Interval], behind: Iterable[Interval]) -> float:
    """Share of the time of some intervals that lies within others; 0 if they are empty."""
    ours, theirs = union(intervals), union(behind)
    total = sum(end - start for start, end in ours)
    both = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in ours for b in theirs)
    return both / total if total else 0.0


def measure(timeline: Timeline) -> Figures:
    """The figures of a timeline."""
    steps = timeline.steps
    first_step_s = min(start for intervals in steps.values() for start, _ in intervals)
    code_end_s = max((end for _, end in steps["code"] if end <= steps["refine"][0][0]), default=first_step_s)
    parts = {
        "checks": timeline.run_started_s,
        "load": first_step_s - timeline.run_started_s,
        "codes": max(0.0, code_end_s - first_step_s),
        **{role: steps[role][0][1] - steps[role][0][0] for role in ("refine", "decode", "write")},
    }
    parts["waits"] = timeline.first_commit_s - sum(parts.values())
    return Figures(
        work_s=timeline.film_s - first_step_s,
        hidden={role: hidden_share(steps[role], steps["refine"]) for role in ("code", "decode")},
        busy_s={role: sum(end - start for start, end in steps[role]) for role in ROLES},
        first_second_s=parts,
    )


def draw(timelines: Mapping[str, Timeline], path: Path, *, width: int = 1200, row: int = 26) -> None:
    """The timelines below each other as a picture, on one scale."""
    font = ImageFont.load_default(size=13)
    left, scale = 110, (width - 130) / max(timeline.film_s for timeline in timelines.values())
    height = (len(ROLES) + 2) * row * len(timelines)
    picture = Image.new("RGB", (width, height), "white")
    draw, y = ImageDraw.Draw(picture), 4
    for name, timeline in timelines.items():
        draw.text((6, y), f"{name}: {timeline.film_s:.1f} s, loading included", fill="black", font=font)
        y += row
        for role in ROLES:
            draw.text((6, y + 3), role, fill="black", font=font)
            for number, (start, end) in enumerate(timeline.steps[role]):
                edge = "white" if (end - start) * scale > 3 else COLOURS[role]
                box = (
                    left + start * scale,
                    y + 2 + number % 2,
                    left + max(end * scale, start * scale + 1),
                    y + row - 4,
                )
                draw.rectangle(box, fill=COLOURS[role], outline=edge)
            y += row
        y += row
    picture.save(path)


def make_film(name: str, threads: int, arguments: argparse.Namespace, output: Path) -> Timeline:
    """Make the film with an executor, in a process of its own; with `BASE` before its name, without codes."""
    executor, steps = name.removeprefix(BASE), arguments.steps
    each = f"{arguments.seconds / len(PROMPTS):g}"
    prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    command = ["generate", *prompts, "--duration", each, "--seed", "7", "--threads", str(threads)]
    command += ["--executor", executor, "--output", str(output), "--quiet"]
    command += ["--model", arguments.model] if arguments.model else []
    if name.startswith(BASE):
        command, steps = [*command, "--base-only"], arguments.base_steps
    command += ["--num-inference-steps", str(steps)] if steps else []
    started_s = time.time()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *command], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"arlon generate failed:\n{done.stderr}")
    return read_timeline(RunFolder(output.with_suffix(".run")).events(), started_s)


def report(figures: Mapping[str, Figures]) -> list[str]:
    """The figures as lines of a table."""
    lines = [f"{'':12}{'work':>8}{'code hidden':>13}{'decode hidden':>15}{'first second':>14}"]
    for name, found in figures.items():
        first_s = sum(found.first_second_s.values())
        hidden = found.hidden
        lines.append(f"{name:12}{found.work_s:>8.2f}{hidden['code']:>13.2f}{hidden['decode']:>15.2f}{first_s:>14.2f}")
    for name, found in figures.items():
        lines.append(f"{name}: " + ", ".join(f"{part} {spent:.2f}" for part, spent in found.first_second_s.items()))
        lines.append(f"{name}: busy " + ", ".join(f"{role} {spent:.2f}" for role, spent in found.busy_s.items()))
    if {"local", "ray"} <= figures.keys():
        lines.append(f"overhead of Ray: {100 * (figures['ray'].work_s / figures['local'].work_s - 1):+.1f} %")
    base = [found.work_s for name, found in figures.items() if name.startswith(BASE)]
    if base:
        fastest = min(found.work_s for name, found in figures.items() if not name.startswith(BASE))
        lines.append(f"the base alone takes {min(base) / fastest:.2f} times as long")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of the film")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="of all executors, or one for each")
    parser.add_argument("--steps", type=int, help="solver steps; without: the model's")
    parser.add_argument("--base-steps", type=int, help="make it with the base alone as well, in so many solver steps")
    parser.add_argument("--model", help="name or folder; without: shapes")
    parser.add_argument("--executors", nargs="+", choices=("local", "ray"), default=["local", "ray"])
    parser.add_argument("--repeat", type=int, default=1, help="the fastest counts")
    parser.add_argument("--picture", type=Path, help="PNG of the timelines")
    parser.add_argument("--json", type=Path, help="write the figures there")
    given = parser.parse_args(arguments)
    if len(given.threads) not in (1, len(given.executors)):
        parser.error(f"--threads takes 1 or {len(given.executors)} numbers, got {len(given.threads)}")
    threads = dict(zip(given.executors, given.threads * len(given.executors), strict=False))
    if given.base_steps:
        threads |= {BASE + name: count for name, count in threads.items()}
    timelines: dict[str, Timeline] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(given.repeat):
            for name, count in threads.items():
                made = make_film(name, count, given, Path(folder) / f"{name}-{number}.mp4")
                best = timelines.get(name)
                if best is None or measure(made).work_s < measure(best).work_s:
                    timelines[name] = made
    figures = {name: measure(timeline) for name, timeline in timelines.items()}
    print("\n".join(report(figures)))
    if given.picture:
        draw(timelines, given.picture)
    if given.json:
        write_json(given.json, {name: asdict(found) for name, found in figures.items()})


if __name__ == "__main__":
    main()
