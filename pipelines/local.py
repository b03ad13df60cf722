"""Make a film in one process: the reference that the graph is tested against.

The codes of the whole film are written first, so that its plan is on disk before any expensive step.
"""

from __future__ import annotations

from collections.abc import Generator

from pipelines.requests import CodeResult, Job, RefineResult, WriteResult, fill, film_requests, text_request
from pipelines.workers import (
    CodeWorker,
    DecodeWorker,
    RefineWorker,
    TextWorker,
    WriteWorker,
    torch_threads,
)


def run_local(job: Job) -> Generator[WriteResult, None, None]:
    """Make all segments of a film, in order; each is stored when it is yielded.

    Args:
        job: The film; its run folder is ready.

    Raises:
        FileNotFoundError: If a part of the model is missing.
        ValueError: If a part of the model is damaged.
    """
    with torch_threads(job.settings.num_threads), WriteWorker(job) as write_worker:
        text = TextWorker(job).run(text_request(job.plan))
        requests = list(film_requests(job))
        codes: list[CodeResult] = []
        code_worker = CodeWorker(job)
        for request in requests:
            before = None if request.is_take_start else codes[-1]
            codes.append(code_worker.run(fill(request.code, text=text, before=before)))
            if request.is_take_end:
                write_worker.keep_codes(request.segment.take, codes[-1])

        refine_worker, decode_worker = RefineWorker(job), DecodeWorker(job)
        refined: RefineResult | None = None
        for request, code in zip(requests, codes, strict=True):
            before = None if request.is_take_start else refined
            refined = refine_worker.run(fill(request.refine, text=text, codes=code, before=before))
            decoded = decode_worker.run(fill(request.decode, refined=refined))
            yield write_worker.run(fill(request.write, codes=code, refined=refined, decoded=decoded))
