"""Make a film in one process: the reference that the graph is tested against.

The codes of the whole film are written first, so that its plan is on disk before any expensive step. They are small
and stay in memory; of text features, latents and frames, only what one segment needs is.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from pipelines.requests import (
    CodeResult,
    Committed,
    Job,
    RefineResult,
    TextRequest,
    WriteResult,
    carried_on,
    fill,
    film_requests,
)
from pipelines.run_folder import RunFolder
from pipelines.workers import CodeWorker, DecodeWorker, RefineWorker, TextWorker, WriteWorker, torch_threads

WorkerSource = Callable[[type[Any], Job], Any]
"""From a class of worker and a film to a worker for it."""


def new_worker(kind: type[Any], job: Job) -> Any:
    """A worker of its own for every film."""
    return kind(job)


class KeptWorkers:
    """Workers that stay loaded for the next film, as long as it has the same model and settings."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._workers: dict[type[Any], Any] = {}

    def __call__(self, kind: type[Any], job: Job) -> Any:
        """The worker of a kind; it is built if there is none that fits."""
        key = (job.model_path, job.model_hash, job.settings, job.plan.geometry.has_codes)
        if key != self._key:
            self._key, self._workers = key, {}
        if kind not in self._workers:
            self._workers[kind] = kind(job)
        return self._workers[kind]


def run_local(
    job: Job, committed: Committed | None = None, *, worker: WorkerSource = new_worker
) -> Generator[WriteResult, None, None]:
    """Make the segments of a film that are not committed, in order; each is stored when it is yielded.

    Args:
        job: The film; its run folder is ready.
        committed: What the run folder holds already.
        worker: Where the workers come from that load networks.

    Raises:
        FileNotFoundError: If a part of the model is missing.
        ValueError: If a part of the model is damaged.
    """
    committed = committed or Committed()
    with torch_threads(job.settings.num_threads), WriteWorker(job, committed) as write_worker:
        text_worker = worker(TextWorker, job)
        codes = _write_codes(job, committed, worker, text_worker, write_worker)
        yield from _render(job, committed, codes, worker, text_worker, write_worker)


class _FilmCodes:
    """The codes of a film, and what each segment's share cost."""

    def __init__(self, committed: Committed) -> None:
        self.takes = {take: CodeResult(codes=codes, elapsed_s=0.0) for take, codes in committed.codes.items()}
        self.costs: dict[int, tuple[float, int, float]] = {}

    def of_segment(self, index: int, take: int, stop: int) -> CodeResult:
        """The first `stop` code frames of a take, with the seconds and memory of a segment."""
        elapsed_s, memory_bytes, ended_s = self.costs.get(index, (0.0, 0, 0.0))
        codes = self.takes[take].codes[:, :stop]
        return CodeResult(codes=codes, elapsed_s=elapsed_s, memory_bytes=memory_bytes, ended_s=ended_s)


def _write_codes(
    job: Job, committed: Committed, worker: WorkerSource, text_worker: TextWorker, write_worker: WriteWorker
) -> _FilmCodes:
    film = _FilmCodes(committed)
    code_worker: CodeWorker | None = None
    for request in film_requests(job):
        code = request.code
        before = film.takes.get(code.take)
        if before is not None and before.codes.shape[1] >= code.stop:
            continue
        code_worker = code_worker or worker(CodeWorker, job)
        text = text_worker.run(TextRequest(prompts=code.prompts))
        result = code_worker.run(fill(code, text=text, before=before))
        write_worker.keep_codes(code.take, result)
        film.takes[code.take] = result
        film.costs[request.segment.index] = result.elapsed_s, result.memory_bytes, result.ended_s
    return film


def _render(
    job: Job,
    committed: Committed,
    codes: _FilmCodes,
    worker: WorkerSource,
    text_worker: TextWorker,
    write_worker: WriteWorker,
) -> Generator[WriteResult, None, None]:
    if len(committed.segments) == len(job.plan.segments):
        return
    refine_worker, decode_worker = worker(RefineWorker, job), worker(DecodeWorker, job)
    folder = RunFolder(job.run_dir)
    refined: RefineResult | None = None
    for request in film_requests(job):
        index = request.segment.index
        if index in committed.segments:
            refined = None
            continue
        if not request.is_take_start and refined is None:
            refined = carried_on(folder.read_latent(index - 1))
        code = codes.of_segment(index, request.code.take, request.code.stop)
        text = text_worker.run(TextRequest(prompts=request.refine.prompts))
        before = None if request.is_take_start else refined
        refined = refine_worker.run(fill(request.refine, text=text, codes=code, before=before))
        decoded = decode_worker.run(fill(request.decode, refined=refined))
        yield write_worker.run(fill(request.write, codes=code, refined=refined, decoded=decoded))
