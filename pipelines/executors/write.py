"""The last step of making a film: segments into the run folder, as they come, and into the growing film, in order."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import cached_property
from typing import Any, Self

from arlon.data.video_io import REPEATABLE, Fragment, VideoWriter, encode_fragment, hash_frames
from arlon.film.appearance import Look, measure_drift, measure_look
from arlon.film.messages import CodeResult, Committed, Job, WriteRequest, WriteResult
from arlon.film.workers import process_memory_bytes
from pipelines.deliver.hls import stream_of
from pipelines.deliver.paths import FilmOutput
from pipelines.store.run_folder import FRAGMENT_NAME, LATENTS_NAME, RunFolder, SegmentRecord


def film_settings(job: Job) -> dict[str, Any]:
    """Arguments of `arlon.data.video_io.encode_fragment` and `VideoWriter` with which a film is encoded."""
    return {
        "fps": job.plan.fps,
        "crf": job.settings.crf,
        "preset": job.settings.preset,
        "x264_params": REPEATABLE if job.settings.x264_cpu_independent else "",
    }


class WriteWorker:
    """Keeps the run folder and the growing film. Segments are committed as they come and enter the film in order.

    Args:
        job: The film.
        output: Where it is written.
        committed: What the run folder holds; it is put into the film when its turn comes.
    """

    def __init__(self, job: Job, output: FilmOutput, committed: Committed | None = None) -> None:
        committed = committed or Committed()
        self.plan = job.plan
        self.folder = RunFolder(output.paths.run_dir)
        self._committed = set(committed.segments)
        self._codes = dict(committed.codes)
        self._next = 0
        self._settings = film_settings(job)
        # Not truncated: under its second name the old file may be a stream that someone watches.
        output.paths.partial.unlink(missing_ok=True)
        self._writer = VideoWriter(output.paths.partial, **self._settings, tags=output.tags)
        self._hls = stream_of(job.plan, output)
        self._catch_up()
        self._gather_codes()

    def run(self, request: WriteRequest) -> WriteResult:
        """Store."""
        codes, refined, decoded = request.codes, request.refined, request.decoded
        assert codes is not None
        assert refined is not None
        assert decoded is not None
        started_s = time.perf_counter()
        segment = request.segment
        is_known = segment.index in self._committed  # by a writer that ended before it could answer
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
            ended_s = {
                "code": codes.ended_s,
                "refine": refined.ended_s,
                "decode": decoded.ended_s,
                "write": time.time(),
            }
            self._log(segment.index, elapsed_s, memory, ended_s)
            self.folder.log("commit", segment=segment.index, look=asdict(look), drift=asdict(drift))
        return WriteResult(
            segment=segment,
            fragment_hash=record.outputs[FRAGMENT_NAME],
            latent_hash=record.outputs[LATENTS_NAME],
            elapsed_s=elapsed_s,
            drift=drift,
        )

    def _catch_up(self) -> None:
        """Put committed segments whose turn it is into the film."""
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
        """The look of the first segment of a shot, as it was committed."""
        first = self._first_segment_of_shot[shot]
        return _look_of(self.folder.read_segment(first, verify=False))

    @cached_property
    def _first_segment_of_shot(self) -> dict[int, int]:
        return {segment.shot: segment.index for segment in reversed(self.plan.segments)}

    def _log(self, index: int, elapsed_s: dict[str, float], memory: dict[str, int], ended_s: dict[str, float]) -> None:
        for role, seconds in elapsed_s.items():
            values = {"seconds": round(seconds, 4), "memory_mb": round(memory[role] / 2**20)}
            self.folder.log("step", segment=index, role=role, **values, ended=round(ended_s[role], 3))

    def keep_codes(self, take: int, result: CodeResult) -> None:
        """Store what is new among the first code frames of a take; with the last of the film they get one file."""
        known = self._codes.get(take)
        start = 0 if known is None else known.shape[1]
        if result.codes.shape[1] <= start:
            return
        self.folder.append_codes(take, start, result.codes[:, start:])
        self._codes[take] = result.codes
        self._gather_codes()

    def _gather_codes(self) -> None:
        """Put the codes in one file once all are there; a writer that ended just before left that to the next."""
        if self.folder.has_logged_codes() and self._has_all_codes():
            self.folder.write_codes(self._codes)
            self.folder.log("codes", takes=len(self._codes))

    def _has_all_codes(self) -> bool:
        takes = self.plan.takes
        return len(self._codes) == len(takes) and all(
            self._codes[take.index].shape[1] == take.num_code_frames for take in takes
        )

    def close(self) -> None:
        """Close the film."""
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _look_of(record: SegmentRecord) -> Look | None:
    values = record.look
    return Look(colour=tuple(values["colour"]), contrast=values["contrast"]) if values else None
