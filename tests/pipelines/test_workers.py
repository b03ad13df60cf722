"""Workers against naive loops over the same models, and against themselves in another order."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from arlon.data.transforms import video_to_frames
from arlon.diffusion import flow, samplers
from arlon.film import workers
from arlon.film.make import KeptWorkers, WorkerSource, new_worker
from arlon.film.messages import (
    CodeResult,
    Committed,
    DecodeRequest,
    Job,
    RefineResult,
    SegmentRequests,
    TextRequest,
    TextResult,
)
from arlon.film.schedule import film_requests, prompts_to_encode, text_request
from arlon.film.storyboard import parse_storyboard
from arlon.film.workers import CodeWorker, DecodeWorker, RefineWorker, TextWorker
from arlon.models.code_sampling import PromptSpan, SamplingConfig, generate_codes
from arlon.models.injection import SemanticInjection
from arlon.models.stdit import STDiT3
from arlon.models.video_vae import VideoVAE
from arlon.models.vqvae import LatentVQVAE
from arlon.text.encoders import TextEncoder, load_text_encoder
from pipelines.deliver.paths import FilmOutput, OutputPaths
from pipelines.executors import ray_graph as graph
from pipelines.executors.write import WriteWorker
from pipelines.runs.generate import generate
from pipelines.runs.prepare import prepare
from pipelines.store.run_folder import RunFolder
from tests.closeness import assert_close_to_scale
from tests.hash_encoder import HashEncoder
from tests.pipelines import tiny_model as tiny
from tests.pipelines.films import prepared_film


class Chain:
    """All results of a film up to the latents, with the text encoder above."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.requests = list(film_requests(job))
        self.text: TextResult = TextWorker(job, HashEncoder(tiny.TEXT_DIM, tiny.TEXT_LENGTH)).run(
            text_request(job.plan)
        )
        self.codes: list[CodeResult] = []
        worker = CodeWorker(job)
        for request in self.requests:
            before = None if request.segment.starts_take else self.codes[-1]
            self.codes.append(worker.run(replace(request.code, text=self.text, before=before)))

    def refine(self, worker: RefineWorker, index: int, before: RefineResult | None) -> RefineResult:
        request = self.requests[index].refine
        return worker.run(replace(request, text=self.text, codes=self.codes[index], before=before))

    def refine_all(self, worker: RefineWorker) -> list[RefineResult]:
        results: list[RefineResult] = []
        for request in self.requests:
            before = None if request.segment.starts_take else results[-1]
            results.append(self.refine(worker, request.segment.index, before))
        return results


@pytest.fixture(scope="module")
def chain(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    output = tmp_path_factory.mktemp("film") / "a.mp4"
    return Chain(prepared_film(tiny_model, output, negative_prompt="blurry").job)


@pytest.fixture(scope="module")
def refine_worker(chain: Chain) -> RefineWorker:
    return RefineWorker(chain.job)


def test_scores_and_camera_motion_are_said_to_the_encoder_and_stand_in_the_records(
    tiny_model: Path, tmp_path: Path
) -> None:
    shots = [{"prompt": "a red circle"}, {"prompt": "a blue square", "camera_motion": "zoom in", "blend": 1}]
    film = {"aesthetic_score": 6.5, "camera_motion": "pan left", "negative_prompt": "blurry"}
    board = parse_storyboard({"seed": 1, "shots": shots, **film})
    job = prepare(board, model=str(tiny_model), output=tmp_path / "a.mp4").job
    first = "a red circle aesthetic score: 6.5. camera motion: pan left."
    second = "a blue square aesthetic score: 6.5. camera motion: zoom in."
    assert text_request(job.plan).prompts == (first, second, "blurry")
    requests = list(film_requests(job))
    assert requests[0].code.schedule.prompts(0, 9) == (first, second)
    assert [requests[0].refine.prompts, requests[-1].refine.prompt] == [(first, "blurry"), second]
    blends = [request.refine.blend for request in requests if request.refine.blend]
    assert [blend.prompt for blend in blends] == [first]
    assert requests[-1].write.inputs.prompt == second
    silent = replace(board, aesthetic_score=0.0, camera_motion=None)
    plan = prepare(silent, model=str(tiny_model), output=tmp_path / "b.mp4").job.plan
    assert text_request(plan).prompts[0] == "a red circle"


def test_one_frame_is_made_at_the_rate_of_pictures(tiny_model: Path, tmp_path: Path) -> None:
    for frames, fps in ((1, 120.0), (2, tiny.FPS)):
        shots = [{"prompt": "a red circle", "duration": f"{frames}f"}]
        board = parse_storyboard({"seed": 1, "shots": shots, "use_codes": False})
        job = prepare(board, model=str(tiny_model), output=tmp_path / f"{frames}.mp4").job
        (request,) = film_requests(job)
        assert (request.refine.fps, request.write.inputs.fps, job.plan.fps) == (fps, fps, tiny.FPS)


def test_every_prompt_is_encoded_once_and_alone(chain: Chain) -> None:
    assert list(chain.text.features) == [
        "a red circle moves left",
        "a green circle moves left",
        "a blue square",
        "blurry",
    ]
    assert all(len(features) == 1 for features in chain.text.features.values())


def test_the_text_encoder_has_its_weights_in_the_precision_that_is_set(chain: Chain) -> None:
    exact = TextWorker(chain.job)
    rounded = TextWorker(replace(chain.job, settings=replace(chain.job.settings, text_dtype="bfloat16")))
    dtypes = [{weight.dtype for weight in worker.encoder.network.parameters()} for worker in (exact, rounded)]
    assert dtypes == [{torch.float32}, {torch.bfloat16}]
    one, other = (worker.run(text_request(chain.job.plan)).features["a blue square"] for worker in (exact, rounded))
    assert other.tokens.dtype == torch.float32
    assert 0 < (other.tokens - one.tokens).norm() < 0.05 * one.tokens.norm()


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[TextEncoder]]:
    """Every text encoder that is loaded; all count as large."""
    encoders: list[weakref.ref[TextEncoder]] = []

    def load(*args: Any, **options: Any) -> TextEncoder:
        encoder = load_text_encoder(*args, **options)
        encoders.append(weakref.ref(encoder))
        return encoder

    monkeypatch.setattr(workers, "load_text_encoder", load)
    monkeypatch.setattr(workers, "LARGE_ENCODER_BYTES", 0)
    return encoders


def test_a_large_text_encoder_is_let_go_and_comes_again_for_another_prompt(
    chain: Chain, loads: list[weakref.ref[TextEncoder]]
) -> None:
    expected = TextWorker(chain.job).run(TextRequest(prompts=("a red circle", "a blue square", "a green circle")))
    worker = TextWorker(chain.job)
    worker.encode_ahead(["a red circle", "a blue square", "a red circle"])
    assert [load() for load in loads] == [None, None], "nobody uses it any more"
    known = worker.run(TextRequest(prompts=("a blue square", "a red circle"))).features
    assert len(loads) == 2
    known |= worker.run(TextRequest(prompts=("a green circle",))).features
    assert len(loads) == 3
    assert loads[2]() is worker.encoder
    assert all(known[prompt].tokens.equal(features.tokens) for prompt, features in expected.features.items())
    worker.encode_ahead(["a green circle"])
    assert (loads[2](), len(loads)) == (None, 3)


def test_a_text_encoder_stays_if_it_is_small_or_prompts_are_many(
    chain: Chain, loads: list[weakref.ref[TextEncoder]], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = TextWorker(chain.job)
    worker.encode_ahead(f"a {word}" for word in range(workers.MAX_KNOWN_PROMPTS + 1))
    assert loads[0]() is worker.encoder is not None
    monkeypatch.setattr(workers, "LARGE_ENCODER_BYTES", worker.encoder.weight_bytes)
    worker.encode_ahead(["a red circle"])
    assert loads[0]() is worker.encoder is not None


@pytest.mark.slow
@pytest.mark.parametrize("source", [new_worker, KeptWorkers()])
def test_films_have_the_same_bits_where_the_text_encoder_works_first(
    tiny_model: Path,
    tmp_path: Path,
    loads: list[weakref.ref[TextEncoder]],
    monkeypatch: pytest.MonkeyPatch,
    source: WorkerSource,
) -> None:
    """Films of one batch, too: the second has a prompt that the first has not."""
    shots = {
        "one": {"prompt": "a red circle", "duration": "17f"},
        "two": {"prompt": "a blue square", "duration": "17f"},
    }
    monkeypatch.setattr(workers, "LARGE_ENCODER_BYTES", 10**9)
    expected = {name: generate(prepared_film(tiny_model, tmp_path / f"{name}.mp4", shots[name])) for name in shots}
    loads.clear()
    monkeypatch.setattr(workers, "LARGE_ENCODER_BYTES", 0)
    there: list[int] = []
    build = RefineWorker.__init__

    def counted(self: RefineWorker, job: Job) -> None:
        there.append(sum(load() is not None for load in loads))
        build(self, job)

    monkeypatch.setattr(RefineWorker, "__init__", counted)
    for name, shot in shots.items():
        made = generate(prepared_film(tiny_model, tmp_path / name / "again.mp4", shot), worker=source)
        assert made.film_hash == expected[name].film_hash
    assert len(loads) == 2
    assert set(there) == {0}, "the text encoder is gone before the others come"
    assert all(load() is None for load in loads)


def test_an_actor_for_text_lets_its_encoder_go(chain: Chain, loads: list[weakref.ref[TextEncoder]]) -> None:
    output = FilmOutput(paths=OutputPaths(film=Path("film.mp4"), run_dir=Path("film.run")))
    actor = graph.RoleActor("text", chain.job, output, "", ("a red circle", "a blue square"))
    actor.start()
    assert actor.run(TextRequest(prompts=("a blue square",))).features
    assert [load() for load in loads] == [None]


def test_prompts_of_what_is_on_disk_are_not_encoded(chain: Chain) -> None:
    codes = {0: chain.codes[1].codes, 1: chain.codes[2].codes}
    nothing, all_codes = Committed(), Committed(codes=codes)
    some = Committed(codes=codes, segments=frozenset({0, 1}))
    first, second, third = (shot.prompt for shot in chain.job.plan.storyboard.shots)
    wanted = [set(prompts_to_encode(chain.job, there)) for there in (nothing, all_codes, some)]
    assert wanted == [{first, second, third, "blurry"}, {first, second, third, "blurry"}, {third, "blurry"}]
    short = Committed(codes={0: chain.codes[0].codes}, segments=frozenset({0, 2}))
    assert set(prompts_to_encode(chain.job, short)) == {second, "blurry"} | set(chain.requests[1].code.prompts)


def test_codes_written_segment_by_segment_equal_the_take_in_one_go(chain: Chain) -> None:
    schedule = [
        PromptSpan(
            text=chain.text.features[span.prompt].tokens,
            text_mask=chain.text.features[span.prompt].mask,
            num_code_frames=span.num_code_frames,
        )
        for span in chain.requests[0].code.schedule.spans
    ]
    model = CodeWorker(chain.job).model

    def generator(frame: int) -> torch.Generator:
        return torch.Generator().manual_seed(samplers.address_seed(7, "ar", 0, frame))

    whole = generate_codes(
        model,
        schedule,
        generator_for_frame=generator,
        sampling=SamplingConfig(temperature=1.0, top_p=0.95, guidance_scale=3.0),
    )
    assert whole.shape == (1, 13, 2, 3)
    assert chain.codes[1].codes.equal(whole)


def test_a_fresh_code_worker_goes_on_where_another_stopped(chain: Chain) -> None:
    request = replace(chain.requests[1].code, text=chain.text, before=chain.codes[0])
    assert CodeWorker(chain.job).run(request).codes.equal(chain.codes[1].codes)


def test_takes_with_the_same_prompt_get_other_codes(tiny_model: Path, tmp_path: Path) -> None:
    shots = [{"prompt": "a red circle", "transition": "cut"}] * 2
    first, second = Chain(prepared_film(tiny_model, tmp_path / "a.mp4", *shots).job).codes
    assert not first.codes.equal(second.codes)


def naive_latent(chain: Chain, request: SegmentRequests, carried: Tensor | None) -> Tensor:
    """The latent of a segment by the formulas: whole-take decoding, two forward passes, plain Euler."""
    model = Path(chain.job.model_path)
    dit, vqvae = STDiT3.from_pretrained(model / "dit"), LatentVQVAE.from_pretrained(model / "vqvae")
    injection = SemanticInjection.from_pretrained(model / "injection")
    take_end = max(r.segment.index for r in chain.requests if r.segment.take == request.segment.take)
    codes = chain.codes[take_end].codes
    coarse_take = vqvae.decode(codes, request.refine.take.num_latents, grid=(4, 6))
    start = request.segment.start_latent
    inject = injection.condition(coarse_take[:, :, start : start + 15])
    x = samplers.draw_noise((1, 4, 15, 4, 6), 7, "dit", request.segment.index)
    mask = torch.ones(1, 15, dtype=torch.bool)
    if carried is not None:
        x[:, :, :5], mask[:, :5] = carried, False
    text, negative = (chain.text.features[prompt] for prompt in (request.refine.prompt, "blurry"))
    sizes = {"fps": 8.0, "height": 32.0, "width": 48.0, "frame_mask": mask, "inject": inject}
    for t, t_next in ((1.0, 0.5), (0.5, 0.0)):
        t, t_next = (
            flow.shift_times(torch.tensor(u), height=32, width=48, num_frames=51, base_size=64) for u in (t, t_next)
        )
        conditional = dit(x, t[None], text.tokens, text.mask, **sizes)
        null = dit(x, t[None], negative.tokens, negative.mask, **sizes)
        velocity = null + 2.0 * (conditional - null)
        x = x + (t_next - t) * velocity
        if carried is not None:
            x[:, :, :5] = carried
    return x[:, :, 5:] if carried is not None else x


@torch.no_grad()
def test_refining_equals_the_naive_loop(chain: Chain, refine_worker: RefineWorker) -> None:
    results = chain.refine_all(refine_worker)
    assert [tuple(r.latent.shape) for r in results] == [(1, 4, 15, 4, 6), (1, 4, 10, 4, 6), (1, 4, 15, 4, 6)]
    for request, result, carried in zip(
        chain.requests, results, (None, results[0].latent[:, :, -5:], None), strict=True
    ):
        assert_close_to_scale(result.latent, naive_latent(chain, request, carried))
    assert [r.overlap_hash is None for r in results] == [True, False, True]


def test_a_segment_made_again_alone_has_the_same_bits(chain: Chain, refine_worker: RefineWorker) -> None:
    results = chain.refine_all(refine_worker)
    again = chain.refine(RefineWorker(chain.job), 1, results[0])
    assert again.latent.equal(results[1].latent)
    assert (again.codes_hash, again.overlap_hash) == (results[1].codes_hash, results[1].overlap_hash)


def test_everything_a_segment_is_asked_for_changes_it(chain: Chain, refine_worker: RefineWorker) -> None:
    results = chain.refine_all(refine_worker)
    request = replace(chain.requests[1].refine, text=chain.text, codes=chain.codes[1], before=results[0])
    other_codes = CodeResult(codes=(chain.codes[1].codes + 1) % tiny.CODEBOOK_SIZE, elapsed_s=0.0)
    changes = {
        "prompt": "a blue square",
        "negative_prompt": "",
        "seed": 8,
        "guidance_scale": 1.0,
        "num_inference_steps": 3,
        "fps": 24.0,
        "codes": other_codes,
        "before": replace(results[0], latent=results[0].latent + 0.1),
    }
    for name, value in changes.items():
        changed = refine_worker.run(replace(request, **{name: value}))
        assert not changed.latent.equal(results[1].latent), f"{name} has no effect"


def test_a_segment_without_what_it_goes_on_from_is_refused(chain: Chain, refine_worker: RefineWorker) -> None:
    with pytest.raises(ValueError, match="segment 1 needs the segment before it"):
        chain.refine(refine_worker, 1, None)


@torch.no_grad()
def test_segments_decode_like_the_whole_take(chain: Chain, refine_worker: RefineWorker) -> None:
    results = chain.refine_all(refine_worker)[:2]
    vae = VideoVAE.from_pretrained(Path(chain.job.model_path) / "vae")
    whole = vae.decode(torch.cat([r.latent for r in results], dim=2), 85)
    worker = DecodeWorker(chain.job)
    frames = [worker.run(DecodeRequest(num_frames=n, refined=r)).frames for n, r in zip((51, 34), results, strict=True)]
    expected = video_to_frames(whole[0])
    difference = torch.from_numpy(expected).int() - torch.cat([torch.from_numpy(f) for f in frames]).int()
    assert difference.abs().max() <= 1  # a value may round to the other side


@torch.no_grad()
@pytest.mark.slow
def test_blended_segments_are_the_take_decoded_at_once(chain: Chain, refine_worker: RefineWorker) -> None:
    job = replace(chain.job, settings=replace(chain.job.settings, vae_blend_frames=2))
    first, second, other_take = chain.refine_all(refine_worker)
    requests = [
        replace(request.decode, refined=refined, before=before)
        for request, refined, before in zip(
            film_requests(job), (first, second, other_take), (None, first, second), strict=True
        )
    ]
    frames = [DecodeWorker(job).run(request).frames for request in requests]
    assert [len(part) for part in frames] == [49, 36, 51]
    vae = VideoVAE.from_pretrained(Path(job.model_path) / "vae")
    latent = torch.cat([first.latent, second.latent], dim=2)
    plain, blended = (video_to_frames(vae.decode(latent, 85, blend_frames=n)[0]).astype(int) for n in (0, 2))
    made = np.concatenate(frames[:2]).astype(int)
    assert abs(made - blended).max() <= 1  # a value may round to the other side
    changed = {frame for frame in range(85) if abs(made[frame] - plain[frame]).max() > 1}
    assert {49, 50, 51, 52} & changed, "the border between the segments is not blended"
    assert changed <= {border + side for border in (17, 34, 51, 68) for side in (-2, -1, 0, 1)}
    alone = vae.decode(other_take.latent, 51, blend_frames=2)
    assert np.array_equal(frames[2], video_to_frames(alone[0]))
    with pytest.raises(ValueError, match="needs its latents"):
        DecodeWorker(job).run(replace(requests[1], before=None))


@torch.no_grad()
@pytest.mark.slow
def test_a_segment_is_decoded_in_tiles(chain: Chain, refine_worker: RefineWorker) -> None:
    vae = VideoVAE.from_pretrained(Path(chain.job.model_path) / "vae")
    tiling = DecodeWorker(replace(chain.job, settings=replace(chain.job.settings, vae_tile=32)))
    refined = chain.refine_all(refine_worker)[0]
    frames = tiling.run(DecodeRequest(num_frames=51, refined=refined)).frames
    assert torch.from_numpy(frames).equal(torch.from_numpy(video_to_frames(vae.decode(refined.latent, 51, tile=32)[0])))
    assert not torch.from_numpy(frames).equal(torch.from_numpy(video_to_frames(vae.decode(refined.latent, 51)[0])))


@torch.no_grad()
def test_frames_are_decoded_as_many_at_a_time_as_is_set(chain: Chain, refine_worker: RefineWorker) -> None:
    refined, films = chain.refine_all(refine_worker)[0], {}
    for micro_batch in (None, 1, 17):
        worker = DecodeWorker(replace(chain.job, settings=replace(chain.job.settings, vae_micro_batch=micro_batch)))
        counts: list[int] = []
        decoder = worker.vae.spatial_vae.module.decoder
        decoder.register_forward_pre_hook(lambda module, args, counts=counts: counts.append(len(args[0])))
        frames = worker.run(DecodeRequest(num_frames=51, refined=refined)).frames
        films[micro_batch] = torch.from_numpy(frames).int()
        assert (max(counts), sum(counts)) == (micro_batch or 4, 51)
    assert all((frames - films[None]).abs().max() <= 1 for frames in films.values())


def test_frames_are_the_nearest_levels() -> None:
    video = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, 0.5]).view(1, 1, 2, 3).expand(3, 1, 2, 3)
    frames = video_to_frames(video)
    assert frames.shape == (1, 2, 3, 3)
    assert frames[0, :, :, 0].tolist() == [[0, 0, 128], [255, 255, 191]]


def test_bfloat16_stays_near_float32(chain: Chain, tiny_model: Path, tmp_path: Path) -> None:
    job = prepared_film(tiny_model, tmp_path / "a.mp4", negative_prompt="blurry", settings={"dtype": "bfloat16"}).job
    exact = chain.refine(RefineWorker(chain.job), 0, None).latent
    rough = chain.refine(RefineWorker(job), 0, None).latent
    assert rough.dtype == torch.float32
    assert not rough.equal(exact)
    assert (rough - exact).norm() / exact.norm() < 0.05


def test_bfloat16_keeps_state_and_weights_in_float32(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = RefineWorker(replace(chain.job, settings=replace(chain.job.settings, dtype="bfloat16")))
    assert {weight.dtype for weight in worker.backbone.dit.parameters()} == {torch.float32}
    states: list[Tensor] = []
    forward = STDiT3.forward
    monkeypatch.setattr(
        STDiT3, "forward", lambda dit, x, *args, **options: states.append(x) or forward(dit, x, *args, **options)
    )
    latent = chain.refine(worker, 0, None).latent
    assert len(states) == 2
    for state in (*states, latent):
        assert state.dtype == torch.float32
        assert not state.equal(state.bfloat16().float()), "rounded on the way"


def test_segments_are_committed_as_they_come_and_enter_the_film_in_order(chain: Chain, tmp_path: Path) -> None:
    """And a segment that is sent again is not stored again."""
    decode = DecodeWorker(chain.job)
    writes = []
    for request, code, refined in zip(
        chain.requests, chain.codes, chain.refine_all(RefineWorker(chain.job)), strict=True
    ):
        decoded = decode.run(replace(request.decode, refined=refined))
        writes.append(replace(request.write, codes=code, refined=refined, decoded=decoded))
    films = []
    for order in ((0, 1, 2), (2, 0, 1, 2)):
        film = tmp_path / f"{len(order)}.mp4"
        output = FilmOutput(paths=OutputPaths(film=film, run_dir=film.with_suffix(".run")))
        folder = RunFolder(output.paths.run_dir)
        folder.path.mkdir()
        with WriteWorker(chain.job, output) as writer:
            results = {index: writer.run(writes[index]) for index in order}
        films.append((output.paths.partial.read_bytes(), [results[index].fragment_hash for index in (0, 1, 2)]))
        committed = [event["segment"] for event in folder.events() if event["event"] == "commit"]
        assert committed == list(order[:3])
    assert films[0] == films[1]
