"""Make the segments of a film one after the other, in one process and in memory.

Codes are written as far as the next segment needs them, so the first segment is ready after the same time however long
the film is. Codes are small and stay in memory; text features, latents and frames are held for one segment at a time. A
large text encoder works first and is unloaded before the other networks are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from arlon.film.messages import (
    CodeResult,
    Committed,
    DecodeResult,
    Job,
    RefineResult,
    SegmentRequests,
    TextRequest,
)
from arlon.film.schedule import film_requests, prompts_to_encode
from arlon.film.workers import CodeWorker, DecodeWorker, RefineWorker, TextWorker, torch_threads

WorkerSource = Callable[[type[Any], Job], Any]
"""(class of worker, film) -> a worker for the film."""


@dataclass(frozen=True, kw_only=True)
class MadeSegment:
    """One segment and the results of its steps."""

    request: SegmentRequests
    codes: CodeResult
    refined: RefineResult
    decoded: DecodeResult


def new_worker(kind: type[Any], job: Job) -> Any:
    """Build a worker that serves one film."""
    return kind(job)


class KeptWorkers:
    """Source of workers that stay loaded for the next film, as long as it has the same model and settings."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._workers: dict[type[Any], Any] = {}

    def __call__(self, kind: type[Any], job: Job) -> Any:
        """The worker of a class; it is built if none fits."""
        key = (job.model_path, job.model_hash, job.settings, job.plan.geometry.has_codes)
        if key != self._key:
            self._key, self._workers = key, {}
        if kind not in self._workers:
            self._workers[kind] = kind(job)
        return self._workers[kind]


def make_segments(
    job: Job,
    committed: Committed | None = None,
    *,
    worker: WorkerSource = new_worker,
    read_latent: Callable[[int], Tensor] | None = None,
    keep_codes: Callable[[int, CodeResult], None] | None = None,
) -> Iterator[MadeSegment]:
    """Make the segments of a film that do not exist yet, in order.

    Args:
        job: The film.
        committed: Parts that exist already; None: none.
        worker: Source of the workers, which load the networks.
        read_latent: Gives the new latent frames (1, C, T, H, W) of an existing segment, by index; needed if a segment
            continues from one.
        keep_codes: Called with a take and its first code frames whenever new ones are written, before they are used.

    Raises:
        FileNotFoundError: If a part of the model is missing.
        CheckpointError: If a part of the model is damaged.
    """
    committed = committed or Committed()
    with torch_threads(job.settings.num_threads):
        text_worker = worker(TextWorker, job)
        text_worker.encode_ahead(prompts_to_encode(job, committed))
        refine_worker, decode_worker = worker(RefineWorker, job), worker(DecodeWorker, job)
    film_codes = _FilmCodes(job, committed, worker, text_worker, keep_codes)
    refined: RefineResult | None = None
    for request in film_requests(job, committed.media):
        index = request.segment.index
        # Each segment has the threads to itself, and whoever reads the results has back what was set before.
        with torch_threads(job.settings.num_threads):
            codes = film_codes.of_segment(request)
            if index in committed.segments:
                refined = None
                continue
            if request.segment.starts_take:
                refined = None
            elif refined is None:
                if read_latent is None:
                    raise ValueError(
                        f"segment {index} continues from an existing one: read_latent must give its latent"
                    )
                refined = RefineResult.from_disk(read_latent(index - 1))
            text = text_worker.run(TextRequest(prompts=request.refine.prompts))
            before, refined = (
                refined,
                refine_worker.run(replace(request.refine, text=text, codes=codes, before=refined)),
            )
            decoded = decode_worker.run(replace(request.decode, refined=refined, before=before))
        yield MadeSegment(request=request, codes=codes, refined=refined, decoded=decoded)


class _FilmCodes:
    """Codes of a film, written as far as the next segment needs them; segments ask in order."""

    def __init__(
        self,
        job: Job,
        committed: Committed,
        worker: WorkerSource,
        text_worker: TextWorker,
        keep_codes: Callable[[int, CodeResult], None] | None,
    ) -> None:
        self.job, self.committed, self.worker = job, committed, worker
        self.text_worker, self.keep_codes = text_worker, keep_codes
        self._code_worker: CodeWorker | None = None
        self._of_take: Tensor | None = None
        """Code frames of the present take so far, (1, n, cH, cW)."""

    def of_segment(self, request: SegmentRequests) -> CodeResult:
        """Codes of the take up to the last that a segment needs; existing ones cost no time."""
        code = request.code
        if request.segment.starts_take:
            self._of_take = self.committed.codes.get(code.take)
        if self._of_take is not None and self._of_take.shape[1] >= code.stop:
            return CodeResult(codes=self._of_take[:, : code.stop], elapsed_s=0.0)
        self._code_worker = self._code_worker or self.worker(CodeWorker, self.job)
        text = self.text_worker.run(TextRequest(prompts=code.prompts))
        before = None if self._of_take is None else CodeResult(codes=self._of_take, elapsed_s=0.0)
        result: CodeResult = self._code_worker.run(replace(code, text=text, before=before))
        if self.keep_codes is not None:
            self.keep_codes(code.take, result)
        self._of_take = result.codes
        return result
