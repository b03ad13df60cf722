"""`arlon batch` as a job of a Ray cluster: a head with its job server, and `ray job submit` from outside."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import OBJECT_STORE_BYTES

pytestmark = [pytest.mark.ray, pytest.mark.slow]
RAY = (sys.executable, "-m", "ray.scripts.scripts")
START_S = 120.0
JOB_S = 240.0


@dataclass(frozen=True)
class Cluster:
    """Where its job server is, and the environment of those who may use it."""

    address: str
    environment: Mapping[str, str]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head of its own with a job server and a token; all its processes are gone afterwards."""
    pytest.importorskip("opencensus", reason="the job server needs ray[default]: make test-jobs")
    port = free_port()
    temporary = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # short: sockets in it have paths of 107 bytes at most
    command = (
        *(*RAY, "start", "--head", "--block", "--node-ip-address", "127.0.0.1", "--port", str(free_port())),
        *("--dashboard-host", "127.0.0.1", "--dashboard-port", str(port), "--temp-dir", temporary),
        *("--num-cpus", "2", "--object-store-memory", str(OBJECT_STORE_BYTES), "--disable-usage-stats"),
    )
    folder = tmp_path_factory.mktemp("head")
    log, token = folder / "log", folder / "token"
    token.write_text(secrets.token_hex(32))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_worker_niceness": "0"}
    with log.open("w") as out:
        head = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for_server(address, head, log)
        yield Cluster(address, environment)
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(timeout=5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)
        shutil.rmtree(temporary, ignore_errors=True)


def wait_for_server(address: str, head: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if head.poll() is not None:
            raise RuntimeError(f"the head ended: {log.read_text()[-2000:]}")
        try:
            with urllib.request.urlopen(f"{address}/api/jobs/", timeout=5):
                return
        except urllib.error.HTTPError as error:
            if error.code == 401:  # it is there, and asks who we are
                return
            raise
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(f"no job server after {START_S} s: {log.read_text()[-2000:]}")


def submit(cluster: Cluster, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `arlon ARGUMENTS` as docs/cluster.md says, and wait for its end."""
    command = (*RAY, "job", "submit", "--address", cluster.address, "--")
    program = (sys.executable, "-m", "pipelines.cli", *map(str, arguments))
    deadline = time.monotonic() + START_S
    while True:
        done = subprocess.run(
            [*command, *program], capture_output=True, text=True, timeout=JOB_S, env=cluster.environment
        )
        if "No available agent" not in done.stderr or time.monotonic() > deadline:
            return done
        time.sleep(1)  # the job server answers some seconds before it can take jobs


def test_a_job_makes_its_films_and_its_end_tells_whether_all_are_there(
    cluster: Cluster, tiny_model: Path, tmp_path: Path
) -> None:
    good = {"name": "good", "prompts": ["a blue square"], "duration": "51f", "num_threads": 1, "seed": 4}
    films = tmp_path / "films.jsonl"
    films.write_text("\n".join(map(json.dumps, [good, {"name": "bad", "prompts": ["a"], "fps": -1}])))
    out = tmp_path / "out"
    command = ("batch", films, "--output-dir", out, "--model", tiny_model, "--executor", "ray", "--threads", 1)
    failed = submit(cluster, *command)
    assert failed.returncode != 0
    assert "1 done, 0 skipped, 1 failed" in failed.stdout
    assert "fps must be between 1 and 240, got -1" in " ".join(failed.stdout.split())
    film = (out / "good" / "film.mp4").stat()

    films.write_text(json.dumps(good))
    succeeded = submit(cluster, *command)
    assert succeeded.returncode == 0, succeeded.stdout + succeeded.stderr
    assert "0 done, 1 skipped, 0 failed" in succeeded.stdout
    assert (out / "good" / "film.mp4").stat() == film
