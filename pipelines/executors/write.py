"""The last step of making a film: store each segment in the run folder and append it to the growing film."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import cached_property
from typing import Self

from arlon.data.video_io import Fragment, VideoWriter, encode_fragment, hash_frames
from arlon.film.appearance import Look, measure_drift, measure_look
from arlon.film.container import encoder_options
from arlon.film.messages import CodeResult, Committed, Job, WriteRequest, WriteResult
from arlon.film.workers import process_memory_bytes
from pipelines.deliver.hls import stream_of
from pipelines.deliver.paths import FilmOutput
from pipelines.store.run_folder import FRAGMENT_NAME, LATENTS_NAME, RunFolder, SegmentRecord


class WriteWorker:
    """Last worker of a film: it commits segments in any order, and appends them to the film in the order of the plan.

    Args:
        job: The film.
        output: Run folder and paths that the film is written to.
        committed: Codes and segments that the run folder holds already; segments enter the film in their turn.
    """

    def __init__(self, job: Job, output: FilmOutput, committed: Committed | None = None) -> None:
        committed = committed or Committed()
        self.plan = job.plan
        self.folder = RunFolder(output.paths.run_dir)
        self._committed = set(committed.segments)
        self._codes = dict(committed.codes)
        self._next = 0
        self._settings = encoder_options(job.plan, job.settings)
        # Not truncated: under its second name the old file may be a stream that someone watches.
        output.paths.partial.unlink(missing_ok=True)
        self._writer = VideoWriter(output.paths.partial, **self._settings, tags=output.tags)
        self._hls = stream_of(job.plan, output)
        self._catch_up()
        self._gather_codes()

    def run(self, request: WriteRequest) -> WriteResult:
        """Encode and commit a segment, log its steps, and append to the film all segments whose turn has come."""
        codes, refined, decoded = request.codes, request.refined, request.decoded
        assert codes is not None
        assert refined is not None
        assert decoded is not None
        started_s = time.perf_counter()
        segment = request.segment
        # a writer that ended after the commit but before its answer is asked again
        is_known = segment.index in self._committed
        if is_known:
            record = self.folder.read_segment(segment.index, verify=False)
            look = _look_of(record) or measure_look(decoded.frames)
        else:
            look = measure_look(decoded.frames)
            record = self.folder.commit_segment(
                segment.index,
                latent=refined.latent,
                fragment=encode_fragment(decoded.frames, **self._settings).data,
                frames_hash=hash_frames(decoded.frames),
                inputs=request.inputs.to_plain() | {"codes": refined.codes_hash, "overlap": refined.overlap_hash},
                look=asdict(look),
            )
            self._committed.add(segment.index)
            self._catch_up()
        elapsed_s = {
            "code": codes.elapsed_s,
            "refine": refined.elapsed_s,
            "decode": decoded.elapsed_s,
            "write": time.perf_counter() - started_s,
        }
        memory = {"code": codes.memory_bytes, "refine": refined.memory_bytes, "decode": decoded.memory_bytes}
        drift = measure_drift(look, self._first_look(segment.shot) or look)
        if not is_known:
            memory["write"] = process_memory_bytes()
            ended_s = {"code": codes.ended_s, "refine": refined.ended_s, "decode": decoded.ended_s}
            ended_s["write"] = time.time()
            for role, seconds in elapsed_s.items():
                values = {"seconds": round(seconds, 4), "memory_mb": round(memory[role] / 2**20)}
                self.folder.log("step", segment=segment.index, role=role, **values, ended=round(ended_s[role], 3))
            self.folder.log("commit", segment=segment.index, look=asdict(look), drift=asdict(drift))
        return WriteResult(
            segment=segment,
            fragment_hash=record.outputs[FRAGMENT_NAME],
            latent_hash=record.outputs[LATENTS_NAME],
            elapsed_s=elapsed_s,
            drift=drift,
        )

    def _catch_up(self) -> None:
        """Append to the film, and to the stream beside it, all committed segments whose turn has come."""
        start = self._next
        while self._next in self._committed:
            fragment = Fragment(data=self.folder.read_fragment(self._next))
            self._writer.append_fragment(fragment)
            if self._hls is not None:
                self._hls.add(fragment.num_frames, head_bytes=self._writer.head_bytes, end=self._writer.num_bytes)
            self._next += 1
        if self._hls is not None and self._next > start:
            self._hls.publish(is_whole=self._next == len(self.plan.segments))

    def _first_look(self, shot: int) -> Look | None:
        """Colour and contrast of the first segment of a shot; None if its record lacks them."""
        first = self._first_segment_of_shot[shot]
        return _look_of(self.folder.read_segment(first, verify=False))

    @cached_property
    def _first_segment_of_shot(self) -> dict[int, int]:
        return {segment.shot: segment.index for segment in reversed(self.plan.segments)}

    def keep_codes(self, take: int, result: CodeResult) -> None:
        """Store the code frames of a take that are not stored yet.

        Args:
            take: Number of the take.
            result: All code frames of the take so far.
        """
        known = self._codes.get(take)
        start = 0 if known is None else known.shape[1]
        if result.codes.shape[1] <= start:
            return
        self.folder.append_codes(take, start, result.codes[:, start:])
        self._codes[take] = result.codes
        self._gather_codes()

    def _gather_codes(self) -> None:
        """Write the codes of all takes to one file once they are complete.

        Called at the start too: an earlier writer may have ended between the last codes and this file.
        """
        stored = {take: codes.shape[1] for take, codes in self._codes.items()}
        is_complete = stored == {take.index: take.num_code_frames for take in self.plan.takes}
        if is_complete and self.folder.has_logged_codes():
            self.folder.write_codes(self._codes)
            self.folder.log("codes", takes=len(self._codes))

    def close(self) -> None:
        """Close the file of the growing film."""
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _look_of(record: SegmentRecord) -> Look | None:
    values = record.look
    return Look(colour=tuple(values["colour"]), contrast=values["contrast"]) if values else None
