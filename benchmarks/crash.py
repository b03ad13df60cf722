"""What a crash costs: kill a film while it is made, go on, and compare with a film that was left alone.

    python benchmarks/crash.py --kills 50 --json figures.json

Half of the kills are SIGKILL at named write points (`pipelines.durable`), spread evenly over all that a film passes;
the others come at random times between start and end. After each, `arlon resume` goes on. Without `--model`, the
random model of the tests makes a film of three shots; the kill is what is tested, not the film.

Columns: `identical`, whether the film has the bytes of the one left alone; `twice`, segments that were committed
before the kill and written again after it; `kept`, segments that were committed at the kill.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipelines.durable import CRASH_VARIABLE, write_json
from pipelines.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
FILM = (
    *("--prompt", "a red circle moves left", "--prompt", "a green circle moves left"),
    *("--prompt", "a blue square", "--seed", "7", "--threads", "1"),
)
FILE_STEPS = ("written", "synced", "renamed")
LOG_STEPS = ("written", "synced")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a kill."""

    kill: str
    """The write point, or the seconds after the start."""
    kept: int
    twice: int
    identical: bool


def write_points(num_segments: int) -> Iterator[str]:
    """Every write point a film passes, in order of file; of the log of events, the first few."""
    for name in ("run.json", "codes.safetensors", "film.json"):
        yield from (f"{name}:{step}:1" for step in FILE_STEPS)
    yield from (f"film.mp4:{step}:1" for step in ("synced", "renamed"))
    for count in range(1, num_segments + 1):
        for name in ("latents.safetensors", "fragment.mp4", "segment.json"):
            yield from (f"{name}:{step}:{count}" for step in FILE_STEPS)
        for name in ("codes.jsonl", "events.jsonl"):
            yield from (f"{name}:{step}:{count}" for step in LOG_STEPS)


def arlon(*arguments: object, crash_at: str | None = None, kill_after_s: float | None = None) -> int:
    """Run a command; its exit code, negative for a signal."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if crash_at is not None:
        environment[CRASH_VARIABLE] = crash_at
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", *map(str, arguments)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    try:
        _, errors = process.communicate(timeout=kill_after_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return -signal.SIGKILL
    if process.returncode > 0:
        raise RuntimeError(f"arlon {arguments[0]} failed:\n{errors}")
    return process.returncode


def committed(folder: RunFolder) -> dict[int, int]:
    """The inode of the record of every committed segment: another one means that it was written again."""
    return {index: (folder.segment_dir(index) / "segment.json").stat().st_ino for index in folder.committed_indices()}


def try_kill(generate: Sequence[object], output: Path, whole: bytes, kill: str | float) -> Outcome:
    """Make a film, kill it, go on, compare."""
    at = {"crash_at": kill} if isinstance(kill, str) else {"kill_after_s": kill}
    folder = RunFolder(output.with_suffix(".run"))
    ended = arlon(*generate, "--output", output, **at)
    before = committed(folder)
    if ended:
        arlon(*(("resume", folder.path) if folder.has_run() else (*generate, "--output", output)))
    after = committed(folder)
    return Outcome(
        kill=kill if isinstance(kill, str) else f"{kill:.2f} s",
        kept=len(before),
        twice=sum(after.get(index) != inode for index, inode in before.items()),
        identical=output.read_bytes() == whole,
    )


def run(num_kills: int, model: str | None, seed: int, executor: str) -> list[Outcome]:
    """Kill as often as asked, and print a line for each."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        generate = ("generate", *FILM, "--model", model or _tiny_model(work), "--executor", executor)
        started_s = time.perf_counter()
        arlon(*generate, "--output", work / "whole.mp4")
        duration_s = time.perf_counter() - started_s
        whole = (work / "whole.mp4").read_bytes()
        points = list(write_points(len(list(RunFolder(work / "whole.run").committed_indices()))))
        num_points = min(len(points), (num_kills + 1) // 2)
        kills: list[str | float] = [points[i * len(points) // num_points] for i in range(num_points)]
        drawn = random.Random(seed)
        kills += [drawn.uniform(0, duration_s) for _ in range(num_kills - num_points)]
        print(f"{'killed at':32}{'kept':>6}{'twice':>7}{'identical':>11}")
        outcomes = []
        for number, kill in enumerate(kills):
            folder = work / f"{number:03d}"
            folder.mkdir()
            # Every film is called the same, for the write points carry its name.
            outcomes.append(try_kill(generate, folder / "film.mp4", whole, kill))
            last = outcomes[-1]
            print(f"{last.kill:32}{last.kept:>6}{last.twice:>7}{'yes' if last.identical else 'NO':>11}", flush=True)
    return outcomes


def _tiny_model(work: Path) -> Path:
    sys.path.insert(0, str(ROOT))
    from tests.pipelines.tiny_model import make_tiny_model

    return make_tiny_model(work / "tiny")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--model", help="name or folder of a model; without: the random one of the tests")
    parser.add_argument("--executor", choices=("local", "ray"), default="local")
    parser.add_argument("--seed", type=int, default=0, help="of the random times")
    parser.add_argument("--json", type=Path, help="write the outcomes there")
    arguments = parser.parse_args()
    outcomes = run(arguments.kills, arguments.model, arguments.seed, arguments.executor)
    identical, twice = sum(o.identical for o in outcomes), sum(o.twice for o in outcomes)
    print(f"{identical} of {len(outcomes)} films identical, {twice} committed segments made twice")
    if arguments.json:
        write_json(arguments.json, {"outcomes": [asdict(outcome) for outcome in outcomes]})
    sys.exit(0 if identical == len(outcomes) and not twice else 1)


if __name__ == "__main__":
    main()
