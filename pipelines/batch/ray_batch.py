"""Make the films of a batch on a Ray cluster, spread over pipelines.

A pipeline is one process that makes a film as `local` does, and then the next, with the networks it has loaded. Films
do not need each other, so this keeps every pipeline busy without a tensor between processes. A pipeline that dies is
replaced; its film goes on from the last segment that was committed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from arlon.errors import UsageError
from pipelines.batch.batch import BatchOptions, FilmOutcome, FilmTask, attempt_film
from pipelines.executors.ray_graph import first_line, ray_session


class _Pipeline:
    """Makes films, one after another; nothing that fails but the process ends it."""

    def __init__(self, options: BatchOptions) -> None:
        from arlon.memory import keep_freed_memory
        from pipelines.executors.local import KeptWorkers

        keep_freed_memory()
        self.options, self.worker = options, KeptWorkers()

    def make(self, task: FilmTask) -> FilmOutcome:
        """See `attempt_film`."""
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
        tasks: The films. The model and the output folder must lie under the same path on every node.
        options: Of the batch.
        address: Ray cluster to join; None: that of RAY_ADDRESS, or a Ray for this batch on this machine.
        num_pipelines: Films made at the same time. None: one for every GPU, or for every `num_threads` cores.
        device: Where the networks run; with `cuda` a pipeline has a GPU of its own.
        num_threads: Threads of a pipeline.

    Raises:
        UsageError: If the cluster has no room for the pipelines.
        ImportError: If Ray is not installed.
        RuntimeError: If the cluster cannot be reached.
    """
    needs = {"GPU": 1} if device.startswith("cuda") else {"CPU": num_threads}
    with ray_session(address) as ray:
        room = _room(ray, needs)
        if num_pipelines is None:
            num_pipelines = max(1, room)
        if num_pipelines > room:
            kind, each = next(iter(needs.items()))
            has = ray.cluster_resources().get(kind, 0)
            raise UsageError(
                f"{num_pipelines} pipelines of {each} {kind} each do not fit: the cluster has {has:g} {kind}; "
                f"lower --pipelines{'' if kind == 'GPU' else ' or --threads'}"
            )
        # No process is started for a pipeline that would have no film.
        actors = [_start_pipeline(ray, needs, options) for _ in range(min(num_pipelines, len(tasks)))]
        try:
            yield from _share_out(ray, tasks, options, actors, lambda: _start_pipeline(ray, needs, options))
        finally:
            for actor in actors:
                ray.kill(actor)


def _room(ray: Any, needs: dict[str, int]) -> int:
    """Pipelines that the cluster has room for."""
    resources = ray.cluster_resources()
    return int(min(resources.get(kind, 0) // number for kind, number in needs.items()))


def _start_pipeline(ray: Any, needs: dict[str, int], options: BatchOptions) -> Any:
    return (
        ray.remote(_Pipeline)
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
    """Give every pipeline a film whenever it has none; one that died is replaced, in `actors` too."""
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
            reason = f"its process died, perhaps for lack of memory: {first_line(error)}"
            outcome = FilmOutcome(line=task.line, name=task.name, state="failed", error=reason, may_retry=True)
            # Ray could restart it too, but refuses calls while it does.
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
