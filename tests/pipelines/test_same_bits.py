"""The bits of a result do not depend on where its inputs lie in memory, nor on the threads that were set before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from arlon.data.video_io import REPEATABLE, encode_fragment, hash_frames
from arlon.film.container import read_film_record
from arlon.film.messages import Job, RefineResult, TextRequest
from arlon.film.schedule import film_requests
from arlon.film.workers import CodeWorker, DecodeWorker, RefineWorker, TextWorker, torch_threads
from pipelines.runs.generate import generate
from pipelines.runs.resume import open_run
from pipelines.store.run_folder import FRAMES
from tests.pipelines.films import assert_same_film, prepared_film

pytestmark = pytest.mark.slow

LINE = 16
"""Floats in 64 bytes, which PyTorch aligns its own memory to."""
OFFSETS = (1, 2)
"""In floats: products of small matrices depend on the place of a factor within 16 bytes."""


def moved(values: Any, offset: int) -> Any:
    """The same request or result, its floating-point tensors `offset` floats behind a multiple of 64 bytes."""
    if isinstance(values, Tensor) and values.is_floating_point():
        room = torch.full((values.numel() + 2 * LINE,), torch.nan)
        start = -(room.data_ptr() // 4) % LINE + offset
        return room[start : start + values.numel()].view(values.shape).copy_(values)
    if isinstance(values, dict):
        return {name: moved(value, offset) for name, value in values.items()}
    if is_dataclass(values) and not isinstance(values, type):
        return replace(values, **{f.name: moved(getattr(values, f.name), offset) for f in fields(values) if f.init})
    return values


@pytest.fixture(scope="module")
def steps(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[[int], Any]]:
    """For every worker, its results of a film whose inputs all lie at an offset."""
    shots = ({"prompt": "a", "duration": "51f"}, {"prompt": "a red circle moves left", "duration": "34f"})
    settings = {"ar_guidance_scale": 1.0}  # the shortest text in one row: the smallest products there are
    job = prepared_film(tiny_model, tmp_path_factory.mktemp("bits") / "a.mp4", *shots, settings=settings).job
    coder, refiner, decoder = CodeWorker(job), RefineWorker(job), DecodeWorker(job)
    inputs = list(_inputs(job, coder, refiner))

    def code(offset: int) -> list[Tensor]:
        return [CodeWorker(job).run(moved(request, offset)).codes for request, _, _ in inputs]

    def refine(offset: int) -> list[Tensor]:
        return [refiner.run(moved(request, offset)).latent for _, request, _ in inputs]

    def decode(offset: int) -> list[Tensor]:
        return [torch.from_numpy(decoder.run(moved(request, offset)).frames) for _, _, request in inputs]

    return {"code": code, "refine": refine, "decode": decode}


def _inputs(job: Job, coder: CodeWorker, refiner: RefineWorker) -> Iterator[tuple[Any, Any, Any]]:
    """Requests of every segment for codes, latent and frames, filled."""
    text_worker, codes, refined = TextWorker(job), None, None
    for request in film_requests(job):
        text = text_worker.run(TextRequest(prompts=(*request.code.prompts, *request.refine.prompts)))
        before = (None, None) if request.segment.starts_take else (codes, refined)
        code = replace(request.code, text=text, before=before[0])
        codes = coder.run(code)
        refine = replace(request.refine, text=text, codes=codes, before=before[1])
        refined = refiner.run(refine)
        yield code, refine, replace(request.decode, refined=refined)


@pytest.mark.parametrize("role", ["code", "refine", "decode"])
def test_results_do_not_depend_on_where_inputs_lie(steps: dict[str, Callable[[int], Any]], role: str) -> None:
    expected = steps[role](0)
    for offset in OFFSETS:
        for segment, (one, other) in enumerate(zip(steps[role](offset), expected, strict=True)):
            assert one.equal(other), f"segment {segment}, inputs {offset} floats behind a multiple of 64 bytes"


def test_a_film_does_not_depend_on_the_threads_before(tiny_model: Path, tmp_path: Path) -> None:
    films = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            films.append(generate(prepared_film(tiny_model, tmp_path / f"{threads}.mp4")).film_hash)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert films[0] == films[1]


def test_a_film_that_differs_tells_at_which_step(tiny_model: Path, tmp_path: Path) -> None:
    shot = {"prompt": "a", "duration": "51f"}
    whole = generate(prepared_film(tiny_model, tmp_path / "whole", shot)).film
    for name, changes in {
        "latent of segment 0 by up to": {"num_inference_steps": 3},
        "codes of take 0": {"seed": 8},
    }.items():
        other = generate(prepared_film(tiny_model, tmp_path / f"{name[:5]}.mp4", shot, **changes)).film
        with pytest.raises(AssertionError, match=name):
            assert_same_film(other, whole)
    coarser = generate(prepared_film(tiny_model, tmp_path / "crf.mp4", shot, settings={"crf": 30})).film
    with pytest.raises(AssertionError, match="encoding of segment 0"):
        assert_same_film(coarser, whole)


@pytest.mark.parametrize("is_independent", [False, True])
def test_a_film_tells_how_it_was_encoded(tiny_model: Path, tmp_path: Path, is_independent: bool) -> None:
    """A record that does not name the setting means what the first version did, so that its runs go on as they were."""
    shot = {"prompt": "a", "duration": "51f"}
    settings = {} if is_independent else {"x264_cpu_independent": False}
    made = generate(prepared_film(tiny_model, tmp_path / "a.mp4", shot, settings=settings))
    run = open_run(made.run_dir)
    told = [
        run.record["settings"],
        read_film_record(made.film)["settings"],
        run.folder.read_segment(0).inputs,
    ]
    assert [values.get("x264_cpu_independent") for values in told] == [True if is_independent else None] * 3
    assert run.prepared.job.settings.x264_cpu_independent is is_independent
    options = REPEATABLE if is_independent else ""
    request = next(film_requests(run.prepared.job))
    refined = RefineResult(latent=run.folder.read_latent(0), overlap_hash=None, codes_hash="", elapsed_s=0.0)
    with torch_threads(1):
        frames = DecodeWorker(run.prepared.job).run(replace(request.decode, refined=refined)).frames
    assert run.folder.read_segment(0).outputs[FRAMES] == hash_frames(frames)
    encoded = encode_fragment(frames, fps=8, crf=16, preset="medium", x264_params=options).data
    assert run.folder.read_fragment(0) == encoded
