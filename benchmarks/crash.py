"""Cost of a crash: kill a film while it is made, resume it, and compare it with a film that was left alone.

    python benchmarks/crash.py --kills 26 --json local.json
    python benchmarks/crash.py --kills 24 --executor ray --json ray.json

Half of the kills are SIGKILL at named write points (`arlon.files`), spread evenly over all that a film
passes; the others come at random times. After each that ended the command, `arlon resume` continues with the local
executor.
Without `--model`, the random model of the tests makes a film of three shots; the kill is what is tested, not the film.

With `--executor ray`, one Ray of this machine is started for all commands, which join it by its address, so that actors
may outlive the command that started them. The kills take turns: the driver at a time, a single actor at a time (both
counted from when the first actor is there), the driver at a write point, and the writer at a write point, where it dies
each time it gets there.

Columns: `identical`, whether the film has the bytes of the one left alone; `twice`, segments that were committed
before the kill and written again after it; `kept`, segments that were committed at the kill; `ended`, whether the kill
ended the command.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path

from arlon.files import CRASH_VARIABLE, write_json
from pipelines.store.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
FILM = (
    *("--prompt", "a red circle moves left", "--prompt", "a green circle moves left"),
    *("--prompt", "a blue square", "--seed", "7", "--threads", "1"),
)
FILE_STEPS = ("written", "synced", "renamed")
LOG_STEPS = ("written", "synced")
DRIVER_FILES = ("run.json", "film.json", "film.mp4")
"""Files that the command itself writes under Ray; the writer writes the rest."""
JOB_CONFIG_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable in which Ray passes a configuration to the command of a job."""
START_LIMIT_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Kill:
    """Target and moment of a kill."""

    target: str
    """`local`, `driver` or `actor`."""
    point: str | None = None
    """The write point; None: at a time."""
    share: float = 0.0
    """Moment of the kill, as a share of the time that the undisturbed film took."""

    def __str__(self) -> str:
        return f"{self.target} {self.point or f'{self.share:.0%}'}"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of a kill."""

    kill: str
    ended: bool
    kept: int
    twice: int
    identical: bool


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Inputs that all kills share."""

    generate: tuple[object, ...]
    whole: bytes
    duration_s: float
    """Seconds that the undisturbed film took; under Ray counted from its first actor on."""
    drawn: random.Random


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


def spread(points: Sequence[str], number: int) -> list[str]:
    """Choose `number` points, evenly spread; all of them, repeated, if there are fewer."""
    if number > len(points):
        return list(islice(cycle(points), number))
    return [points[i * len(points) // number] for i in range(number)]


def plan_kills(executor: str, number: int, num_segments: int, drawn: random.Random) -> list[Kill]:
    """The kills to try."""
    points = list(write_points(num_segments))
    if executor == "local":
        at_points = [Kill(target="local", point=point) for point in spread(points, (number + 1) // 2)]
        return at_points + [Kill(target="local", share=drawn.random()) for _ in range(number // 2)]
    by_driver = [point for point in points if point.split(":")[0] in DRIVER_FILES]
    by_writer = [point for point in points if point.split(":")[0] not in (*DRIVER_FILES, "events.jsonl")]
    shares = [len(range(turn, number, 4)) for turn in range(4)]
    kills = [Kill(target="driver", share=drawn.random()) for _ in range(shares[0])]
    kills += [Kill(target="actor", share=drawn.random()) for _ in range(shares[1])]
    kills += [Kill(target="driver", point=point) for point in spread(by_driver, shares[2])]
    return kills + [Kill(target="actor", point=point) for point in spread(by_writer, shares[3])]


def start(*arguments: object, kill: Kill | None = None) -> subprocess.Popen[str]:
    """Start a command, which ends itself, or its writer, at the write point of `kill`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if kill and kill.point:
        if kill.target == "actor":
            runtime_env = {"env_vars": {CRASH_VARIABLE: kill.point}}
            environment[JOB_CONFIG_VARIABLE] = json.dumps({"runtime_env": runtime_env})
        else:
            environment[CRASH_VARIABLE] = kill.point
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", *map(str, arguments)],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )


def arlon(*arguments: object) -> None:
    """Run a command that must work."""
    process = start(*arguments)
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"arlon {arguments[0]} failed:\n{errors}")


def actors() -> list[int]:
    """Process numbers of the actors of films in the Ray that this process started."""
    parents, found = {}, []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with suppress(OSError):
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if (folder / "cmdline").read_bytes().startswith(b"ray::RoleActor"):
                    found.append(int(folder.name))

    def is_ours(process: int) -> bool:
        while process in parents:
            process = parents[process]
            if process == os.getpid():
                return True
        return False

    return [process for process in found if is_ours(process)]


def await_actor(process: subprocess.Popen[str], earlier: Sequence[int]) -> None:
    """Return when a command has an actor, or has ended."""
    until_s = time.monotonic() + START_LIMIT_S
    while process.poll() is None and not set(actors()) - set(earlier):
        if time.monotonic() > until_s:
            raise RuntimeError("the command started no actor")
        time.sleep(0.02)


def strike(process: subprocess.Popen[str], kill: Kill, stage: Stage, earlier: Sequence[int]) -> None:
    """Kill at a time, and wait until the command has ended."""
    if kill.target != "local":
        await_actor(process, earlier)
    with suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=kill.share * stage.duration_s)
    if process.poll() is None and kill.target == "actor":
        living = sorted(set(actors()) - set(earlier))
        with suppress(ProcessLookupError, IndexError):  # it ended meanwhile
            os.kill(stage.drawn.choice(living), signal.SIGKILL)
    elif process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def committed(folder: RunFolder) -> dict[int, int]:
    """The inode of the record of every committed segment: another one means that it was written again."""
    return {index: (folder.segment_dir(index) / "segment.json").stat().st_ino for index in folder.committed_indices()}


def commits(folder: RunFolder) -> Counter[int]:
    """Number of commits of each segment, from the log of events."""
    return Counter(event["segment"] for event in folder.events() if event["event"] == "commit")


def try_kill(stage: Stage, output: Path, kill: Kill) -> Outcome:
    """Make a film, kill it, resume it, compare."""
    folder = RunFolder(output.with_suffix(".run"))
    earlier = actors()
    process = start(*stage.generate, "--output", output, kill=kill)
    if kill.point:
        process.communicate()
    else:
        strike(process, kill, stage, earlier)
    before = committed(folder)
    if process.returncode:
        go_on: Sequence[object] = ("resume", folder.path, "--executor", "local")
        arlon(*(go_on if folder.has_run() else (*stage.generate, "--output", output)))
    after = committed(folder)
    again = {index for index, inode in before.items() if after.get(index) != inode}
    again |= {index for index, number in commits(folder).items() if number > 1}
    return Outcome(
        kill=str(kill),
        ended=process.returncode != 0,
        kept=len(before),
        twice=len(again),
        identical=output.read_bytes() == stage.whole,
    )


@contextmanager
def cluster(executor: str) -> Iterator[tuple[str, ...]]:
    """Options of commands that are to join a Ray of this process; none for the local executor."""
    if executor == "local":
        yield ()
        return
    from pipelines.executors.ray_graph import ray_session

    os.environ["PYTHONPATH"] = str(ROOT)  # of the actors
    with ray_session(None) as ray:
        yield "--address", ray.get_runtime_context().gcs_address


def prepare_stage(generate: tuple[object, ...], whole: Path, executor: str, seed: int) -> Stage:
    """Make the film that is left alone: always with the local executor, and once more with Ray for its time."""
    arlon(*generate[: len(FILM) + 3], "--output", whole)
    started_s = time.perf_counter()
    process = start(*generate, "--output", whole.with_name("timed.mp4"))
    if executor == "ray":
        await_actor(process, [])
        started_s = time.perf_counter()
    process.communicate()
    duration_s = time.perf_counter() - started_s
    return Stage(generate=generate, whole=whole.read_bytes(), duration_s=duration_s, drawn=random.Random(seed))


def run(
    num_kills: int, model: str | None, seed: int, executor: str, on_outcome: Callable[[Outcome], None]
) -> list[Outcome]:
    """Kill as often as asked."""
    with tempfile.TemporaryDirectory() as name, cluster(executor) as joined:
        work = Path(name)
        generate = ("generate", *FILM, "--model", model or _tiny_model(work), "--executor", executor, *joined)
        stage = prepare_stage(generate, work / "whole.mp4", executor, seed)
        num_segments = len(list(RunFolder(work / "whole.run").committed_indices()))
        outcomes = []
        for number, kill in enumerate(plan_kills(executor, num_kills, num_segments, stage.drawn)):
            folder = work / f"{number:03d}"
            folder.mkdir()
            # Every film is called the same, for the write points carry its name.
            outcomes.append(try_kill(stage, folder / "film.mp4", kill))
            on_outcome(outcomes[-1])
    return outcomes


def _tiny_model(work: Path) -> Path:
    sys.path.insert(0, str(ROOT))
    from tests.pipelines.tiny_model import make_tiny_model

    return make_tiny_model(work / "tiny")


def show(last: Outcome) -> None:
    """A row of the table."""
    flags = "yes" if last.ended else "no", "yes" if last.identical else "NO"
    print(f"{last.kill:36}{flags[0]:>6}{last.kept:>6}{last.twice:>7}{flags[1]:>11}", flush=True)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--model", help="name or folder of a model; without: the random one of the tests")
    parser.add_argument("--executor", choices=("local", "ray"), default="local")
    parser.add_argument("--seed", type=int, default=0, help="of the random times")
    parser.add_argument("--json", type=Path, help="write the outcomes there")
    arguments = parser.parse_args()
    print(f"{'killed at':36}{'ended':>6}{'kept':>6}{'twice':>7}{'identical':>11}")
    outcomes = run(arguments.kills, arguments.model, arguments.seed, arguments.executor, show)
    identical, twice = sum(o.identical for o in outcomes), sum(o.twice for o in outcomes)
    print(f"{identical} of {len(outcomes)} films identical, {twice} committed segments made twice")
    if arguments.json:
        write_json(arguments.json, {"outcomes": [asdict(outcome) for outcome in outcomes]})
    sys.exit(0 if identical == len(outcomes) and not twice else 1)


if __name__ == "__main__":
    main()
