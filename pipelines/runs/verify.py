"""Check that a run is what its records say: compare all hashes, or make a segment again and compare its bits."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from arlon.data.video_io import Fragment, VideoWriter, encode_fragment, hash_frames
from arlon.files import hash_file
from arlon.film.container import encoder_options, finalise
from arlon.film.messages import CodeResult, RefineResult, SegmentRequests, TextRequest
from arlon.film.schedule import film_requests
from arlon.film.storyboard import UsageError
from arlon.film.workers import CodeWorker, DecodeWorker, RefineWorker, TextWorker, torch_threads
from pipelines.runs.resume import Run, misfit, read_fitting_codes
from pipelines.store.media import read_media
from pipelines.store.run_folder import FRAMES, RunFolderError


def verify_run(run: Run) -> Iterator[str]:
    """Check the codes, the committed segments and the film of a run by their hashes; yield a sentence for each problem.

    The files of a segment must be those that its record names, and the record must agree with the plan, the codes and
    the segment before. The film must consist of its segments in order, byte for byte.
    """
    try:
        codes = read_fitting_codes(run)
    except RunFolderError as error:
        yield str(error)
        return
    there = set(run.folder.committed_indices())
    is_sound = True
    for request in film_requests(run.prepared.job, read_media(run.folder, run.plan)):
        index = request.segment.index
        if index in there and (problem := _problem(run, request, codes, there)) is not None:
            is_sound = False
            yield f"segment {index}: {problem}"
    if is_sound and len(there) == len(run.plan.segments) and run.prepared.paths.film.exists():
        yield from _verify_film(run)


def _problem(run: Run, request: SegmentRequests, codes: Mapping[int, Tensor], there: set[int]) -> str | None:
    """Describe what is wrong with a committed segment; None if nothing is."""
    segment = request.segment
    known = codes.get(segment.take)
    if known is None or known.shape[1] < segment.num_code_frames:
        return "its codes are not there"
    if segment.overlap and segment.index - 1 not in there:
        return "the segment it goes on from is not there"
    try:
        return misfit(run.folder, segment, request.write.inputs, known)
    except (RunFolderError, FileNotFoundError) as error:
        return str(error)


def _verify_film(run: Run) -> Iterator[str]:
    job, paths, tags = run.prepared.job, run.prepared.paths, run.prepared.output.tags
    with tempfile.TemporaryDirectory() as folder:
        partial, film = Path(folder) / "partial.mp4", Path(folder) / "film.mp4"
        with VideoWriter(partial, **encoder_options(job.plan, job.settings), tags=tags) as writer:
            for segment in run.plan.segments:
                writer.append_fragment(Fragment(data=run.folder.read_fragment(segment.index)))
        if finalise(partial, film, num_frames=run.plan.num_frames) != hash_file(paths.film):
            yield f"'{paths.film}' is not made of the segments of this run; `arlon resume` puts it together again"


def replay_segment(run: Run, index: int) -> Iterator[str]:
    """Make a committed segment again and yield a sentence for each result that differs from the stored one.

    Codes, latents, frames and encoded frames are compared. Latents are made from the stored codes, so that they can be
    right even if the codes come out otherwise; frames are made from the new latents.

    Args:
        run: The run; frames that the segment carries over come from the segment that is stored before it.
        index: Number of the segment in the film, from 0.

    Raises:
        UsageError: If the segment is not committed.
        RunFolderError: If what it is compared with is damaged.
    """
    folder, job = run.folder, run.prepared.job
    if not 0 <= index < len(run.plan.segments) or not folder.has_segment(index):
        raise UsageError(f"segment {index} is not among those of '{folder.path}'")
    requests = film_requests(job, read_media(folder, run.plan))
    request = next(request for request in requests if request.segment.index == index)
    outputs = folder.read_segment(index).outputs
    stored = CodeResult(codes=read_fitting_codes(run)[request.code.take], elapsed_s=0.0)
    with torch_threads(job.settings.num_threads):
        text_worker = TextWorker(job)
        text_worker.encode_ahead((*replace(request.code, start=0).prompts, *request.refine.prompts))
        again = _replay_codes(run, request, text_worker)
        if not again.codes.equal(stored.codes[:, : request.code.stop]):
            yield f"segment {index}: its codes come out otherwise"
        before = None if request.segment.starts_take else RefineResult.from_disk(folder.read_latent(index - 1))
        text = text_worker.run(TextRequest(prompts=request.refine.prompts))
        refined = RefineWorker(job).run(replace(request.refine, text=text, codes=stored, before=before))
        if not refined.latent.equal(folder.read_latent(index)):
            yield f"segment {index}: its latents come out otherwise"
        decoded = DecodeWorker(job).run(replace(request.decode, refined=refined, before=before))
    stored_hash = outputs.get(FRAMES)  # records of the first version lack it
    if stored_hash not in (None, hash_frames(decoded.frames)):
        yield f"segment {index}: its frames come out otherwise"  # and so must their encoding
    elif encode_fragment(decoded.frames, **encoder_options(job.plan, job.settings)).data != folder.read_fragment(index):
        if stored_hash is None:
            yield f"segment {index}: its encoded frames come out otherwise"
        else:
            yield (
                f"segment {index}: its frames come out the same, but the encoder wrote other bytes for them; "
                f"delete '{folder.segment_dir(index)}' to have it made again"
            )


def _replay_codes(run: Run, request: SegmentRequests, text_worker: TextWorker) -> CodeResult:
    """Generate the codes of a take from its start to the end of a segment."""
    whole = replace(request.code, start=0)
    text = text_worker.run(TextRequest(prompts=whole.prompts))
    return CodeWorker(run.prepared.job).run(replace(whole, text=text))
