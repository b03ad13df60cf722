"""Make a film in one process: the reference that the graph is tested against.

Segment after segment, each from its codes to its fragment of the film, so the first can be watched after the same time
however long the film is. Codes are written as far as the segment at hand needs them; they are small and stay in memory.
Of text features, latents and frames, only what one segment needs is. A large text encoder works first, and is gone when
the other networks are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any

from torch import Tensor

from arlon.film.messages import (
    CodeRequest,
    CodeResult,
    Committed,
    Job,
    RefineResult,
    SegmentRequests,
    TextRequest,
    WriteResult,
)
from arlon.film.schedule import film_requests, prompts_to_encode
from arlon.film.workers import CodeWorker, DecodeWorker, RefineWorker, TextWorker, torch_threads
from pipelines.deliver.paths import FilmOutput
from pipelines.executors.write import WriteWorker
from pipelines.store.run_folder import RunFolder

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
    job: Job, output: FilmOutput, committed: Committed | None = None, *, worker: WorkerSource = new_worker
) -> Generator[WriteResult, None, None]:
    """Make the segments of a film that are not committed, in order; each is stored when it is yielded.

    Args:
        job: The film.
        output: Where it is written; its run folder is ready.
        committed: What the run folder holds already.
        worker: Where the workers come from that load networks.

    Raises:
        FileNotFoundError: If a part of the model is missing.
        ValueError: If a part of the model is damaged.
    """
    committed = committed or Committed()
    with torch_threads(job.settings.num_threads), WriteWorker(job, output, committed) as write_worker:
        if len(committed.segments) < len(job.plan.segments):
            yield from _make(job, RunFolder(output.paths.run_dir), committed, worker, write_worker)


def _make(
    job: Job, folder: RunFolder, committed: Committed, worker: WorkerSource, write_worker: WriteWorker
) -> Generator[WriteResult, None, None]:
    text_worker = worker(TextWorker, job)
    text_worker.encode_ahead(prompts_to_encode(job, committed))
    refine_worker, decode_worker = (worker(kind, job) for kind in (RefineWorker, DecodeWorker))
    film_codes = _FilmCodes(job, committed, worker, text_worker, write_worker)
    refined: RefineResult | None = None
    for request in film_requests(job, committed.media):
        codes, index = film_codes.of_segment(request), request.segment.index
        if index in committed.segments:
            refined = None
            continue
        if request.segment.starts_take:
            refined = None
        elif refined is None:
            refined = RefineResult.from_disk(folder.read_latent(index - 1))
        text = text_worker.run(TextRequest(prompts=request.refine.prompts))
        before, refined = refined, refine_worker.run(replace(request.refine, text=text, codes=codes, before=refined))
        decoded = decode_worker.run(replace(request.decode, refined=refined, before=before))
        yield write_worker.run(replace(request.write, codes=codes, refined=refined, decoded=decoded))


class _FilmCodes:
    """The codes of a film, written and stored as far as the segment at hand needs them; asked for in order."""

    def __init__(
        self, job: Job, committed: Committed, worker: WorkerSource, text_worker: TextWorker, write_worker: WriteWorker
    ) -> None:
        self.job, self.committed, self.worker = job, committed, worker
        self.text_worker, self.write_worker = text_worker, write_worker
        self._code_worker: CodeWorker | None = None
        self._of_take: Tensor | None = None
        """(1, n, cH, cW), those of the take so far."""

    def of_segment(self, request: SegmentRequests) -> CodeResult:
        """The codes that a segment needs; they cost nothing where they were there."""
        code = request.code
        if request.segment.starts_take:
            self._of_take = self.committed.codes.get(code.take)
        if self._of_take is None or self._of_take.shape[1] < code.stop:
            return self._write(code)
        return CodeResult(codes=self._of_take[:, : code.stop], elapsed_s=0.0)

    def _write(self, code: CodeRequest) -> CodeResult:
        self._code_worker = self._code_worker or self.worker(CodeWorker, self.job)
        text = self.text_worker.run(TextRequest(prompts=code.prompts))
        before = None if self._of_take is None else CodeResult(codes=self._of_take, elapsed_s=0.0)
        result = self._code_worker.run(replace(code, text=text, before=before))
        self.write_worker.keep_codes(code.take, result)
        self._of_take = result.codes
        return result
