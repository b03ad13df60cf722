"""Make a film in one process: the reference that the Ray graph is tested against."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

from arlon.film.make import WorkerSource, make_segments, new_worker
from arlon.film.messages import Committed, Job, WriteResult
from pipelines.deliver.paths import FilmOutput
from pipelines.executors.write import WriteWorker
from pipelines.store.run_folder import RunFolder


def run_local(
    job: Job, output: FilmOutput, committed: Committed | None = None, *, worker: WorkerSource = new_worker
) -> Generator[WriteResult, None, None]:
    """Make the segments of a film that are not committed, in order; each is stored when it is yielded.

    Args:
        job: The film.
        output: Where it is written; its run folder is ready.
        committed: What the run folder holds already.
        worker: Source of the workers, which load the networks.

    Raises:
        FileNotFoundError: If a part of the model is missing.
        CheckpointError: If a part of the model is damaged.
    """
    committed = committed or Committed()
    with WriteWorker(job, output, committed) as write_worker:
        if len(committed.segments) == len(job.plan.segments):
            return  # no network is loaded for a film that is only put together again
        folder = RunFolder(output.paths.run_dir)
        segments = make_segments(
            job, committed, worker=worker, read_latent=folder.read_latent, keep_codes=write_worker.keep_codes
        )
        for made in segments:
            yield write_worker.run(
                replace(made.request.write, codes=made.codes, refined=made.refined, decoded=made.decoded)
            )
