"""Batches on a Ray cluster: the films are spread over pipelines.

A pipeline is one process that makes a film as the local executor does, and then the next, with the networks it has
loaded. Films do not depend on each other, so every pipeline stays busy without a tensor between processes. A pipeline
that dies is replaced, and its film continues from the last segment that was committed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from arlon.errors import UsageError, one_line
from arlon.film.make import KeptWorkers
from arlon.memory import keep_freed_memory
from pipelines.batch.batch import BatchOptions, FilmOutcome, FilmTask, attempt_film
from pipelines.executors.ray_graph import ray_session


class FilmPipeline:
    """Makes films, one after another, in a process of its own; only the end of the process ends it."""

    def __init__(self, options: BatchOptions) -> None:
        keep_freed_memory()
        self.options, self.worker = options, KeptWorkers()

    def make(self, task: FilmTask) -> FilmOutcome:
        """Make, resume or skip one film."""
        return attempt_film(task, self.options, self.worker)


def run_batch_graph(
    tasks: list[FilmTask],
    options: BatchOptions,
    *,
    address: str | None = None,
    num_pipelines: int | None = None,
    device: str = "cpu",
    num_threads: int = 1,
) -> Iterator[FilmOutcome]:
    """Make films on a Ray cluster; outcomes come as films are done.

    Args:
        tasks: The films. The model and the output folder must have the same path on every node.
        options: Options of the batch.
        address: Ray cluster to join. Default: that of RAY_ADDRESS, or a Ray that is started here for this batch.
        num_pipelines: Films made at the same time. Default: one for each GPU, or for every `num_threads` cores.
        device: Where the networks run; with `cuda` each pipeline has its own GPU.
        num_threads: Threads of each pipeline.

    Raises:
        UsageError: If the cluster has no room for the pipelines.
        ImportError: If Ray is not installed.
        RuntimeError: If the cluster cannot be reached.
    """
    needs = {"GPU": 1} if device.startswith("cuda") else {"CPU": num_threads}
    with ray_session(address) as ray:
        resources = ray.cluster_resources()
        room = int(min(resources.get(kind, 0) // number for kind, number in needs.items()))
        if num_pipelines is None:
            num_pipelines = max(1, room)
        if num_pipelines > room:
            kind, each = next(iter(needs.items()))
            raise UsageError(
                f"{num_pipelines} pipelines of {each} {kind} each do not fit: the cluster has "
                f"{resources.get(kind, 0):g} {kind}; "
                f"lower --pipelines{'' if kind == 'GPU' else ' or --threads'}"
            )
        # A pipeline without a film would only take memory.
        actors = [_start_pipeline(ray, needs, options) for _ in range(min(num_pipelines, len(tasks)))]
        try:
            yield from _share_out(ray, tasks, options, actors, lambda: _start_pipeline(ray, needs, options))
        finally:
            for actor in actors:
                ray.kill(actor)


def _start_pipeline(ray: Any, needs: dict[str, int], options: BatchOptions) -> Any:
    return (
        ray.remote(FilmPipeline)
        .options(
            num_cpus=needs.get("CPU", 0),
            num_gpus=needs.get("GPU", 0),
            scheduling_strategy="SPREAD",
        )
        .remote(options)
    )


def _share_out(
    ray: Any, tasks: list[FilmTask], options: BatchOptions, actors: list[Any], start: Callable[[], Any]
) -> Iterator[FilmOutcome]:
    """Give every idle pipeline a film. One that died is replaced, in `actors` too, so that the caller can end it."""
    waiting = deque((task, 1) for task in tasks)
    idle, working = deque(actors), dict[Any, tuple[Any, FilmTask, int]]()
    while waiting or working:
        while waiting and idle:
            actor, (task, attempt) = idle.popleft(), waiting.popleft()
            working[actor.make.remote(task)] = actor, task, attempt
        done = ray.wait(list(working), num_returns=1)[0][0]
        actor, task, attempt = working.pop(done)
        try:
            outcome = ray.get(done)
        except ray.exceptions.RayError as error:
            reason = f"its process died, perhaps for lack of memory: {one_line(error)}"
            outcome = FilmOutcome(line=task.line, name=task.name, state="failed", error=reason, may_retry=True)
            # Ray could restart the actor itself, but would refuse calls meanwhile.
            ray.kill(actor)
            actors.remove(actor)
            actor = start()
            actors.append(actor)
        idle.append(actor)
        outcome = replace(outcome, num_attempts=attempt)
        if outcome.may_retry and attempt <= options.num_retries:
            waiting.appendleft((task, attempt + 1))
        else:
            yield outcome
