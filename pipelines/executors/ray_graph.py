"""Executor on Ray: the workers of `arlon.film.workers` and the writer as actors. The only file that knows Ray.

    text -> codes -> refine -> decode -> write

Every call gets the results it waits for as object references, so tensors go from actor to actor through the object
store and never through the driver. The code model runs ahead, and decoding and writing follow; how far is bounded on
both sides.

A role may have several actors. The segments of a take depend on each other, so they are refined one after another, and
so are its codes written. Takes are therefore distributed over refiners and code writers, segments over decoders. There
is one writer. It commits segments as they come and puts them into the film in order, and the film equals that of the
local executor bit for bit.

Ray restarts an actor that dies, repeats the call that it was working on, and holds the calls that wait. Workers keep no
state that decides a result, and the writer reads from the run folder what was committed.
"""

from __future__ import annotations

import os
from collections import OrderedDict, deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from itertools import groupby
from typing import Any

from arlon.errors import UsageError, one_line
from arlon.film.messages import (
    MAX_KNOWN_PROMPTS,
    CodeResult,
    Committed,
    Job,
    RefineResult,
    SegmentRequests,
    TextRequest,
    WriteResult,
)
from arlon.film.schedule import film_requests, prompts_to_encode
from arlon.threads import limit_spinning
from pipelines.deliver.paths import FilmOutput
from pipelines.store.lock import WriterLock, holder_mark
from pipelines.store.run_folder import RunFolder

MAX_REPLICAS = 1024
MAX_RESTARTS = 3
"""How often an actor may die, and a call be repeated, before the film is given up."""
CODES_AHEAD = 64
"""Most segments whose codes are requested before they can be refined."""
OBJECT_STORE_BYTES = 512 * 1024**2
"""Object store of a Ray that lives for one film."""
WORKER_OF_ROLE = {
    "text": ("arlon.film.workers", "TextWorker"),
    "code": ("arlon.film.workers", "CodeWorker"),
    "refine": ("arlon.film.workers", "RefineWorker"),
    "decode": ("arlon.film.workers", "DecodeWorker"),
    "write": ("pipelines.executors.write", "WriteWorker"),
}


@dataclass(frozen=True, kw_only=True)
class Role:
    """Number of actors of a role, and what each takes."""

    replicas: int = 1
    num_gpus: float = 0.1
    """GPUs of each actor, or the share of one; used on a CUDA device only."""
    num_cpus: float = 0.0
    """Cores that Ray reserves for each actor; PyTorch threads are a setting of the film, since bits depend on them."""

    def __post_init__(self) -> None:
        if not 1 <= self.replicas <= MAX_REPLICAS:
            raise ValueError(f"replicas must be between 1 and {MAX_REPLICAS}, got {self.replicas}")
        for name in ("num_gpus", "num_cpus"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class GraphConfig:
    """Actors of each role, which do not change the film. By default they fit on one GPU together."""

    text: Role = field(default_factory=Role)
    code: Role = field(default_factory=Role)
    refine: Role = field(default_factory=lambda: Role(num_gpus=0.7))
    decode: Role = field(default_factory=Role)
    max_in_flight: int = 3
    """Most segments of one refiner that are being refined, decoded or written at the same time."""

    def __post_init__(self) -> None:
        if self.max_in_flight < 1:
            raise ValueError(f"max_in_flight must be 1 or more, got {self.max_in_flight}")


class RoleActor:
    """One worker in a process of its own. `start` builds it, so that its errors reach the caller unchanged."""

    def __init__(self, role: str, job: Job, output: FilmOutput, holder: str, prompts: tuple[str, ...] = ()) -> None:
        self.role, self.job, self.output, self.holder, self.prompts = role, job, output, holder, prompts
        self._lock: WriterLock | None = None
        self._worker: Any = None

    def start(self) -> None:
        """Load the worker; after a restart by Ray the next call does that."""
        import torch

        from arlon.memory import keep_freed_memory

        keep_freed_memory()
        torch.set_num_threads(self.job.settings.num_threads)
        if self.role == "write" and self._lock is None:
            self._lock = WriterLock(self.output.paths.run_dir, self.holder)
        state: tuple[Any, ...] = ()
        if self.role == "write":
            state = (self.output, _committed(RunFolder(self.output.paths.run_dir)))
        module, name = WORKER_OF_ROLE[self.role]
        self._worker = getattr(import_module(module), name)(self.job, *state)
        if self.role == "text":
            self._worker.encode_ahead(self.prompts)

    @property
    def worker(self) -> Any:
        """The worker."""
        if self._worker is None:
            self.start()
        return self._worker

    def run(self, request: Any, **results: Any) -> Any:
        """Run the worker on a request filled with results; Ray has put those in the place of their references."""
        return self.worker.run(replace(request, **results))

    def keep_codes(self, take: int, result: Any) -> None:
        """Store new codes of a take; see `WriteWorker.keep_codes`."""
        self.worker.keep_codes(take, result)

    def close(self) -> None:
        """Close the film."""
        self.worker.close()


def _committed(folder: RunFolder) -> Committed:
    """What a run folder holds that was made ready for this run: all of it fits."""
    folder.sweep()
    try:
        codes = folder.read_codes()
    except FileNotFoundError:
        codes = {}
    return Committed(codes=codes, segments=frozenset(folder.committed_indices()))


def run_graph(
    job: Job,
    output: FilmOutput,
    committed: Committed | None = None,
    *,
    address: str | None = None,
    config: GraphConfig | None = None,
) -> Generator[WriteResult, None, None]:
    """Make the segments of a film that are not committed; each is stored when it is yielded.

    Segments of one take come in order, and so do all if there is one refiner.

    Args:
        job: The film. On a cluster, the model must lie under the same path on every node.
        output: Where it is written, on the node of the caller; its run folder is ready.
        committed: What the run folder holds already.
        address: Ray cluster to join; None: that of RAY_ADDRESS, or a Ray for this film on this machine, whose
            ports are open on all its addresses (Ray knows no other way).
        config: Actors of each role.

    Raises:
        ImportError: If Ray is not installed.
        UsageError: If the cluster has no room for the actors.
        FileNotFoundError, ValueError: As raised in a worker.
        RuntimeError: If a worker process died again and again.
    """
    config, committed = config or GraphConfig(), committed or Committed()
    prompts = tuple(dict.fromkeys(prompts_to_encode(job, committed)))
    with ray_session(address) as ray, _readable_errors(ray):
        crew: dict[str, list[Any]] = {}
        try:
            _check_room(ray, job, config)
            for role in WORKER_OF_ROLE:
                replicas = getattr(config, role).replicas if role != "write" else 1
                crew[role] = [start_actor(ray, role, job, output, config, prompts) for _ in range(replicas)]
            ray.get([actor.start.remote() for actors in crew.values() for actor in actors])
            yield from _FilmDriver(ray, job, RunFolder(output.paths.run_dir), committed, crew, config).make()
            ray.get(crew["write"][0].close.remote())
        finally:
            for actor in (actor for actors in crew.values() for actor in actors):
                ray.kill(actor)


def _check_room(ray: Any, job: Job, config: GraphConfig) -> None:
    """Refuse actors for which the cluster has no room, since they would wait forever.

    Raises:
        UsageError: If they do not fit.
    """
    roles = [getattr(config, f.name) for f in fields(config) if f.name in WORKER_OF_ROLE]
    needs = {"CPU": sum(role.replicas * role.num_cpus for role in roles)}
    if job.settings.device.startswith("cuda"):
        needs["GPU"] = sum(role.replicas * role.num_gpus for role in roles)
    there = ray.cluster_resources()
    for kind, number in needs.items():
        if number > there.get(kind, 0) + 1e-6:
            raise UsageError(f"the actors need {number:g} {kind}, the cluster has {there.get(kind, 0):g}")


def start_actor(
    ray: Any, role: str, job: Job, output: FilmOutput, config: GraphConfig, prompts: tuple[str, ...]
) -> Any:
    """Start an actor of a role. The writer runs on the node of the caller, since it writes to its disk.

    `prompts` are those that an actor of the role `text` encodes at its start, if its encoder is large.
    """
    options: dict[str, Any] = {"num_cpus": 0, "max_restarts": MAX_RESTARTS, "max_task_retries": MAX_RESTARTS}
    if role == "write":
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = ray.get_runtime_context().get_node_id()
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(here, soft=False)
    else:
        options["num_cpus"] = getattr(config, role).num_cpus
        if job.settings.device.startswith("cuda"):
            options["num_gpus"] = getattr(config, role).num_gpus
    return (
        ray.remote(RoleActor)
        .options(**options)
        .remote(role, job, output, holder_mark(output.paths.run_dir), prompts if role == "text" else ())
    )


class _Take:
    """Take that is being made: its segments still to request, and the references that the next ones need."""

    def __init__(self, requests: list[SegmentRequests]) -> None:
        self.index = requests[0].segment.take
        self.pending_codes = deque(requests)
        self.pending = deque(requests)
        self.codes: deque[Any] = deque()
        """References to the codes of segments that are not yet requested to be refined."""
        self.last_code: Any = None
        self.refined: Any = None


class _Lane:
    """Refiner with the take it works on, and the number of its segments that are not written yet."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.take: _Take | None = None
        self.in_flight = 0


class _FilmDriver:
    """Driver of one film: decides which actor gets which request, and when."""

    def __init__(
        self,
        ray: Any,
        job: Job,
        folder: RunFolder,
        committed: Committed,
        crew: dict[str, list[Any]],
        config: GraphConfig,
    ) -> None:
        self.ray, self.committed, self.crew, self.config = ray, committed, crew, config
        requests = groupby(film_requests(job, committed.media), key=lambda request: request.segment.take)
        self._takes = deque(_Take(list(group)) for _, group in requests)
        self._without_codes = deque(self._takes)
        self._num_ahead = 0
        self._lanes = [_Lane(actor) for actor in crew["refine"]]
        self._texts: OrderedDict[tuple[str, ...], Any] = OrderedDict()
        self._written: dict[Any, _Lane] = {}
        self._folder = folder
        self._at: dict[Any, tuple[Any, Any]] = {}
        """References to the refined and decoded results of segments that are not written yet, by the written result."""
        self._unkept: dict[int, tuple[int, Any]] = {}
        """Take and reference to the codes, by segment, that the writer was not yet told to store."""

    def make(self) -> Generator[WriteResult, None, None]:
        """Make the segments, and yield each when it is stored."""
        while True:
            for lane in self._lanes:
                self._advance(lane)
            self._write_codes_ahead()
            self._keep_finished_codes()
            if not self._written:
                break
            done = self.ray.wait(list(self._written), num_returns=1)[0][0]
            self._written.pop(done).in_flight -= 1
            del self._at[done]
            self._log_queue()
            yield self.ray.get(done)
        self.ray.get([self._keep(index) for index in list(self._unkept)])

    def _advance(self, lane: _Lane) -> None:
        """Request as many segments of a lane as may be in flight."""
        while lane.in_flight < self.config.max_in_flight:
            if lane.take is None or not lane.take.pending:
                if not self._takes:
                    return
                lane.take = self._takes.popleft()
            take = lane.take
            request = take.pending.popleft()
            if not take.codes:
                self._write_codes(take)
            code = take.codes.popleft()
            self._num_ahead -= 1
            if request.segment.index in self.committed.segments:
                take.refined = None
            else:
                self._written[self._ask_for(lane.actor, take, request, code)] = lane
                lane.in_flight += 1

    def _ask_for(self, refine: Any, take: _Take, request: SegmentRequests, code: Any) -> Any:
        index, write = request.segment.index, self.crew["write"][0]
        before = None
        if not request.segment.starts_take:
            before = take.refined or RefineResult.from_disk(self._folder.read_latent(index - 1))
        text = self._text_of(request.refine.prompts)
        take.refined = refine.run.remote(request.refine, text=text, codes=code, before=before)
        decode = self.crew["decode"][index % len(self.crew["decode"])]
        decoded = decode.run.remote(request.decode, refined=take.refined, before=before)
        if index in self._unkept:  # without its codes, a committed segment would be made again
            self._keep(index)
        written = write.run.remote(request.write, codes=code, refined=take.refined, decoded=decoded)
        self._at[written] = take.refined, decoded
        return written

    def _log_queue(self) -> None:
        """Log how many segments wait for each role or are being processed by it."""
        num_refined, num_decoded = (self._num_ready(step) for step in (0, 1))
        depths = {"refine": len(self._at) - num_refined, "decode": num_refined - num_decoded, "write": num_decoded}
        self._folder.log("queue", **depths)

    def _num_ready(self, step: int) -> int:
        refs = [refs[step] for refs in self._at.values()]
        return len(self.ray.wait(refs, num_returns=len(refs), timeout=0)[0]) if refs else 0

    def _write_codes_ahead(self) -> None:
        while self._without_codes and self._num_ahead < CODES_AHEAD:
            if self._without_codes[0].pending_codes:
                self._write_codes(self._without_codes[0])
            else:
                self._without_codes.popleft()

    def _write_codes(self, take: _Take) -> None:
        """Request the codes of the next segment of a take."""
        request = take.pending_codes.popleft()
        code, known = request.code, self.committed.codes.get(take.index)
        if known is not None and known.shape[1] >= code.stop:
            take.last_code = self.ray.put(CodeResult(codes=known[:, : code.stop], elapsed_s=0.0))
        else:
            before: Any = None  # a result, or a reference to one
            if known is not None and known.shape[1] > code.start:
                before = CodeResult(codes=known, elapsed_s=0.0)
            elif not request.segment.starts_take:
                before = take.last_code
            actor = self.crew["code"][take.index % len(self.crew["code"])]
            take.last_code = actor.run.remote(code, text=self._text_of(code.prompts), before=before)
            self._unkept[request.segment.index] = take.index, take.last_code
        take.codes.append(take.last_code)
        self._num_ahead += 1

    def _keep_finished_codes(self) -> None:
        """Let the writer store finished codes. Unfinished ones would make it wait, and the segments behind them too."""
        for index in list(self._unkept):
            if not self.ray.wait([self._unkept[index][1]], timeout=0)[0]:
                return
            self._keep(index)

    def _keep(self, index: int) -> Any:
        return self.crew["write"][0].keep_codes.remote(*self._unkept.pop(index))

    def _text_of(self, prompts: tuple[str, ...]) -> Any:
        if prompts not in self._texts:
            actors = self.crew["text"]
            actor = actors[len(self._texts) % len(actors)]
            self._texts[prompts] = actor.run.remote(TextRequest(prompts=prompts))
        self._texts.move_to_end(prompts)
        while len(self._texts) > MAX_KNOWN_PROMPTS:
            self._texts.popitem(last=False)
        return self._texts[prompts]


@contextmanager
def ray_session(address: str | None) -> Iterator[Any]:
    """Ray, ready to use: the one this process has already joined, that of `address` or RAY_ADDRESS, or a new one.

    Raises:
        ImportError: If Ray is not installed.
        RuntimeError: If the cluster cannot be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise ImportError("the ray executor needs Ray: pip install 'arlon[ray]'") from error
    if ray.is_initialized():
        yield ray
        return
    address = address or os.environ.get("RAY_ADDRESS") or None  # set where Ray runs this process as a job
    options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        options |= {"_node_ip_address": "127.0.0.1", "object_store_memory": OBJECT_STORE_BYTES}
        # Ray's own choice is 15: on a machine with other work, actors would wait where the local executor does not.
        os.environ.setdefault("RAY_worker_niceness", "0")
        limit_spinning()  # the actors share the cores, and inherit this
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
    """Raise errors of workers as they were raised there, and a dead worker as a RuntimeError."""
    try:
        yield
    except ray.exceptions.RayError as error:
        # A call that waited for one of a dead actor fails with that actor's end as its cause.
        cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
        if isinstance(cause, ray.exceptions.RayActorError):
            reason = f"a worker process died, perhaps for lack of memory: {one_line(cause)}"
            raise RuntimeError(reason) from error
        if isinstance(cause, ray.exceptions.RayError):
            raise RuntimeError(one_line(cause)) from error
        raise cause or RuntimeError(str(error)) from None
