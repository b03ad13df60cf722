"""Make a film with Ray: the workers of `pipelines.workers` as actors. The only file that knows Ray.

    text -> codes -> refine -> decode -> write

Every call gets the results it waits for as object references, so tensors go from actor to actor through the object
store and never through the driver. All code requests are submitted at once: the code model runs ahead, while decoding
and writing follow behind. The number of segments between refining and writing is bounded. Calls of one actor run in
the order they were submitted, so segments are written in order, and the film equals that of `local` bit for bit.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

from pipelines.requests import Job, TextRequest, WriteResult, fill, film_requests

MAX_IN_FLIGHT = 3
"""Segments that are refined, decoded or written at the same time."""
OBJECT_STORE_BYTES = 512 * 1024**2
"""Object store of a Ray that lives for one film."""


class _Actor:
    """One worker in a process of its own. It is built by `start`, whose errors reach the caller as they are."""

    def __init__(self, worker_name: str, job: Job) -> None:
        self.worker_name, self.job = worker_name, job
        self.worker: Any = None

    def start(self) -> None:
        """Load the worker."""
        import torch

        from pipelines import workers

        torch.set_num_threads(self.job.settings.num_threads)
        self.worker = getattr(workers, self.worker_name)(self.job)

    def run(self, request: Any, **results: Any) -> Any:
        """Run the worker on a request filled with results; Ray has put those in the place of their references."""
        return self.worker.run(fill(request, **results))

    def keep_codes(self, take: int, result: Any) -> None:
        """See `WriteWorker.keep_codes`."""
        self.worker.keep_codes(take, result)

    def close(self) -> None:
        """See `WriteWorker.close`."""
        self.worker.close()


def run_graph(
    job: Job, *, address: str | None = None, max_in_flight: int = MAX_IN_FLIGHT
) -> Generator[WriteResult, None, None]:
    """Make all segments of a film, in order; each is stored when it is yielded.

    Args:
        job: The film; its run folder is ready. On a cluster, the model must lie under the same path on every node;
            the run folder is only used on the node of the caller.
        address: Ray cluster to join; None starts a Ray for this film on this machine, reachable from it alone.
        max_in_flight: Segments between refining and writing at the same time.

    Raises:
        ImportError: If Ray is not installed.
        FileNotFoundError, ValueError: As raised in a worker.
        RuntimeError: If a worker process died.
    """
    with _ray_session(address) as ray, _readable_errors(ray):
        actors: dict[str, Any] = {}
        try:
            for name in ("TextWorker", "CodeWorker", "RefineWorker", "DecodeWorker", "WriteWorker"):
                actors[name] = _start_actor(ray, name, job)
            ray.get([actor.start.remote() for actor in actors.values()])
            yield from _run_film(ray, job, actors, max_in_flight)
            ray.get(actors["WriteWorker"].close.remote())
        finally:
            for actor in actors.values():
                ray.kill(actor)


def _start_actor(ray: Any, name: str, job: Job) -> Any:
    """An actor for a worker; the writer stays on the node of the caller, whose disk it writes."""
    options: dict[str, Any] = {"num_cpus": 0}
    if name == "WriteWorker":
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = ray.get_runtime_context().get_node_id()
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(here, soft=False)
    elif job.settings.device.startswith("cuda"):
        options["num_gpus"] = 1 if name == "RefineWorker" else 0.2
    return ray.remote(_Actor).options(**options).remote(name, job)


def _run_film(ray: Any, job: Job, actors: dict[str, Any], max_in_flight: int) -> Generator[WriteResult, None, None]:
    texts: dict[tuple[str, ...], Any] = {}

    def text_of(prompts: tuple[str, ...]) -> Any:
        if prompts not in texts:
            texts[prompts] = actors["TextWorker"].run.remote(TextRequest(prompts=prompts))
        return texts[prompts]

    write = actors["WriteWorker"]
    requests = list(film_requests(job))
    codes: list[Any] = []
    for request in requests:
        before = None if request.is_take_start else codes[-1]
        text = text_of(request.code.prompts)
        codes.append(actors["CodeWorker"].run.remote(request.code, text=text, before=before))
    take_ends = [(r.segment.take, code) for r, code in zip(requests, codes, strict=True) if r.is_take_end]

    refined, written = None, deque()
    for request, code in zip(requests, codes, strict=True):
        if len(written) >= max_in_flight:
            yield ray.get(written.popleft())
        take_ends = _keep_codes(ray, write, take_ends)
        before = None if request.is_take_start else refined
        text = text_of(request.refine.prompts)
        refined = actors["RefineWorker"].run.remote(request.refine, text=text, codes=code, before=before)
        decoded = actors["DecodeWorker"].run.remote(request.decode, refined=refined)
        written.append(write.run.remote(request.write, codes=code, refined=refined, decoded=decoded))
    while written:
        yield ray.get(written.popleft())
    ray.get([write.keep_codes.remote(take, code) for take, code in take_ends])


def _keep_codes(ray: Any, write: Any, take_ends: list[tuple[int, Any]]) -> list[tuple[int, Any]]:
    """Have finished takes' codes stored; what is not finished is returned.

    Waiting for them in the writer would hold up the segments that are submitted after.
    """
    while take_ends and ray.wait([take_ends[0][1]], timeout=0)[0]:
        write.keep_codes.remote(*take_ends[0])
        take_ends = take_ends[1:]
    return take_ends


@contextmanager
def _ray_session(address: str | None) -> Iterator[Any]:
    """Ray, ready to use: the one that runs in this process, that of `address`, or a new one on loopback."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise ImportError("the ray executor needs Ray: pip install 'arlon[ray]'") from error
    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        options |= {"_node_ip_address": "127.0.0.1", "object_store_memory": OBJECT_STORE_BYTES}
    else:
        options = {"address": address, "log_to_driver": False, "logging_level": "ERROR"}
    try:
        ray.init(**options)
    except (ConnectionError, OSError, ValueError) as error:
        raise RuntimeError(f"cannot reach Ray at {address or 'this machine'}: {error}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def _readable_errors(ray: Any) -> Iterator[None]:
    """Errors of workers as they were raised there; a dead worker as a RuntimeError."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        raise error.cause or RuntimeError(str(error)) from None
    except ray.exceptions.RayActorError as error:
        reason = str(error).strip().splitlines()[0]
        raise RuntimeError(f"a worker process died, perhaps for lack of memory: {reason}") from error
