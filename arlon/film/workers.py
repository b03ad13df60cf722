"""The steps of making a film that run networks, as plain classes.

The last step, `pipelines.executors.write`, runs no network.

    TextWorker -> CodeWorker -> RefineWorker -> DecodeWorker -> WriteWorker

Each has one method, `run`, from one frozen request to one frozen result (see `arlon.film.messages`). Nothing that
decides a result hides in a worker: what a segment carries over comes in its request, so any segment can be made
again alone.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from arlon.backbones import open_backbone
from arlon.backbones.base import TimeShift
from arlon.data.transforms import crop_centre, video_to_frames
from arlon.diffusion import conditioning, samplers
from arlon.diffusion.denoiser import Denoiser, GuidedPrompt
from arlon.diffusion.references import condition_segment
from arlon.files import hash_tensor
from arlon.film.messages import (
    MAX_KNOWN_PROMPTS,
    CodeRequest,
    CodeResult,
    DecodeRequest,
    DecodeResult,
    Job,
    RefineRequest,
    RefineResult,
    TextRequest,
    TextResult,
)
from arlon.film.settings import Settings
from arlon.memory import release_memory
from arlon.models.ar import CodeTransformer
from arlon.models.code_sampling import CodeStream, PromptSpan, SamplingConfig
from arlon.models.injection import SemanticInjection
from arlon.models.video_vae import VideoVAE
from arlon.protocols import VideoSize
from arlon.text.encoders import TextEncoder, TextFeatures, load_text_encoder

if TYPE_CHECKING:
    from arlon.models.vqvae import LatentVQVAE

LARGE_ENCODER_BYTES = 10**9
"""Weights of a text encoder from which on it is let go once the prompts of a film are encoded."""
_NOT_IN_FORCE = torch.zeros(1, 1, 1)


@contextmanager
def torch_threads(num_threads: int) -> Iterator[None]:
    """Run PyTorch with a number of threads, and restore what was."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def process_memory_bytes() -> int:
    """Memory of this process that is in RAM; if the system does not tell, the most it ever was."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class TextWorker:
    """Encodes prompts, one at a time, so that features do not depend on what else is in the film.

    Args:
        job: The film.
        encoder: Used instead of the model's own, for tests.
    """

    def __init__(self, job: Job, encoder: TextEncoder | None = None) -> None:
        self._load = partial(
            load_text_encoder,
            job.component("text_encoder"),
            device=job.settings.device,
            dtype=getattr(torch, job.settings.text_dtype),
        )
        self.encoder: TextEncoder | None = encoder or self._load()
        self._known: OrderedDict[str, TextFeatures] = OrderedDict()

    def encode_ahead(self, prompts: Iterable[str]) -> None:
        """Encode the prompts of a film and let the encoder go; it is loaded again for a prompt that is not known then.

        Nothing is done if the encoder is small, or the prompts are more than are kept.
        """
        if self.encoder is not None and getattr(self.encoder, "weight_bytes", 0) <= LARGE_ENCODER_BYTES:
            return
        distinct: dict[str, None] = {}
        for prompt in prompts:
            distinct[prompt] = None
            if len(distinct) > MAX_KNOWN_PROMPTS:
                return
        self.run(TextRequest(prompts=tuple(distinct)))
        self.encoder = None
        release_memory()

    def run(self, request: TextRequest) -> TextResult:
        """Encode."""
        features = {prompt: self._features(prompt) for prompt in request.prompts}
        while len(self._known) > MAX_KNOWN_PROMPTS:
            self._known.popitem(last=False)
        return TextResult(features=features)

    def _features(self, prompt: str) -> TextFeatures:
        if prompt not in self._known:
            if self.encoder is None:
                self.encoder = self._load()
            self._known[prompt] = self.encoder.encode([prompt]).to("cpu")
        self._known.move_to_end(prompt)
        return self._known[prompt]


def should_unload_text_encoder(weight_bytes: int, num_prompts: int) -> bool:
    """Whether all prompts of a film are encoded first and the text encoder is then unloaded."""
    return weight_bytes > LARGE_ENCODER_BYTES and num_prompts <= MAX_KNOWN_PROMPTS


class CodeWorker:
    """Writes codes with the autoregressive model; for a base alone, code 0 once a frame, which nobody reads.

    It keeps the stream it last worked on only to save time: a request that does not continue it starts a new
    stream from the codes it brings, with the same result.
    """

    def __init__(self, job: Job) -> None:
        self.settings = job.settings
        self.model: CodeTransformer | None = None
        if job.plan.geometry.has_codes:
            self.model = CodeTransformer.from_pretrained(job.component("ar"), dropout=0.0).to(job.settings.device)
            if torch.device(job.settings.device).type == "cpu":
                self.model.store_column_major()
        self._stream: tuple[tuple[Any, ...], CodeStream] | None = None

    def run(self, request: CodeRequest) -> CodeResult:
        """Write."""
        started_s = time.perf_counter()
        if self.model is None:
            return CodeResult(codes=torch.zeros(1, request.stop, 1, 1, dtype=torch.int64), elapsed_s=0.0)
        existing = request.given if request.before is None else request.before.codes
        frames = [] if existing is None else list(existing[0])
        stream = self._stream_at(self.model, request, len(frames), existing)
        frames += [next(stream) for _ in range(request.stop - len(frames))]
        codes = torch.stack(frames)[None]
        self._stream = (self._key(request, request.stop, codes), stream)
        return CodeResult(
            codes=codes,
            elapsed_s=time.perf_counter() - started_s,
            memory_bytes=process_memory_bytes(),
            ended_s=time.time(),
        )

    def _key(self, request: CodeRequest, frame: int, codes: Tensor | None) -> tuple[Any, ...]:
        return request.take, request.schedule, frame, None if codes is None else hash_tensor(codes)

    def _stream_at(
        self, model: CodeTransformer, request: CodeRequest, frame: int, existing: Tensor | None
    ) -> CodeStream:
        if self._stream is not None and self._stream[0] == self._key(request, frame, existing):
            stream = self._stream[1]
            stream.schedule = self._spans(request)
            return stream
        settings = self.settings
        return CodeStream(
            model,
            self._spans(request),
            generator_for_frame=partial(_code_generator, request),
            sampling=SamplingConfig(
                temperature=settings.ar_temperature,
                top_p=settings.ar_top_p,
                guidance_scale=settings.ar_guidance_scale,
            ),
            existing=existing,
        )

    def _spans(self, request: CodeRequest) -> tuple[PromptSpan, ...]:
        """The prompts of the take; those not in force during this request come without their features."""
        features = {} if request.text is None else request.text.features
        return tuple(
            PromptSpan(
                text=_NOT_IN_FORCE if known is None else known.tokens,
                text_mask=None if known is None else known.mask,
                num_code_frames=span.num_code_frames,
                blend=span.blend,
            )
            for span, known in ((span, features.get(span.prompt)) for span in request.schedule.spans)
        )


def _code_generator(request: CodeRequest, frame: int) -> torch.Generator:
    """Generator of a code frame, addressed by (seed, "ar", take, frame)."""
    seed = samplers.address_seed(request.seed_of(frame), "ar", request.take, frame)
    return torch.Generator("cpu").manual_seed(seed)


class RefineWorker:
    """Makes the latent of a segment with the diffusion transformer, steered by codes if the model has any."""

    def __init__(self, job: Job) -> None:
        self.settings, self.geometry = job.settings, job.plan.geometry
        device, defaults = job.settings.device, self.geometry.defaults
        shift = TimeShift(base_size=defaults.shift_base_size, scale=defaults.shift_scale)
        self.backbone = open_backbone(job.component("dit"), device=device, shift=shift)
        self.vqvae: LatentVQVAE | None = None
        self.injection: SemanticInjection | None = None
        if self.geometry.has_codes:
            from arlon.models.vqvae import LatentVQVAE  # seconds to import, and the other workers do not need it

            self.vqvae = LatentVQVAE.from_pretrained(job.component("vqvae")).to(device)
            self.injection = SemanticInjection.from_pretrained(job.component("injection")).to(device)

    @torch.inference_mode()
    def run(self, request: RefineRequest) -> RefineResult:
        """Sample the latent of a segment around the frames it is given."""
        started_s = time.perf_counter()
        assert request.codes is not None
        segment, device = request.segment, self.settings.device
        codes = request.codes.codes[:, : segment.num_code_frames]
        carried = _carried_latent(request)  # comes with the request: the worker itself remembers nothing
        rows, columns = self.geometry.latent_size(request.height, request.width)
        shape = (1, self.backbone.spec.channels, segment.num_latents, rows, columns)
        # Noise by address: the same in every process and order, so that a segment can be made again alone.
        noise = samplers.draw_noise(shape, request.seed, "dit", segment.index)
        given = condition_segment(
            shape, head=request.head if carried is None else carried, tail=request.tail, placed=request.placed
        )
        denoiser = self.denoiser(request, codes)
        # Every segment that carries frames over is sampled as a whole one, though fewer of its frames are new.
        num_frames = self.geometry.grid.segment_frames if segment.overlap else segment.num_frames
        latent = conditioning.sample_with_edits(
            denoiser,
            conditioning.place_clean(noise, given.latent, given.is_free).to(device),
            given.edit_ratio.to(device),
            self.backbone.times(request.num_inference_steps, size=denoiser.size, num_frames=num_frames),
            lambda step: samplers.draw_noise(shape, request.seed, "dit", segment.index, "edit", step),
            solver=request.solver,
        ).cpu()
        return RefineResult(
            latent=latent[:, :, segment.overlap :].contiguous(),
            overlap_hash=None if carried is None else hash_tensor(carried),
            codes_hash=hash_tensor(codes[:, segment.start_code_frame :]),
            elapsed_s=time.perf_counter() - started_s,
            memory_bytes=process_memory_bytes(),
            ended_s=time.time(),
        )

    def denoiser(self, request: RefineRequest, codes: Tensor) -> Denoiser:
        """Velocity of a segment under its prompts and codes (1, n, cH, cW)."""
        inject = None
        if self.injection is not None:
            coarse = self.coarse_latent(codes, request)
            with self._precision():
                inject = self.injection.condition(coarse)
        blend = request.blend
        return Denoiser(
            self.backbone,
            self._guided_prompt(request, request.prompt),
            size=VideoSize(height=float(request.height), width=float(request.width), fps=request.fps),
            inject=inject,
            old_prompt=None if blend is None else self._guided_prompt(request, blend.prompt),
            new_share=None if blend is None else torch.tensor(blend.weights, device=self.settings.device),
            precision=self._precision,
        )

    def coarse_latent(self, codes: Tensor, request: RefineRequest) -> Tensor:
        """Coarse latent (1, C, T, H, W) of a segment, from the codes (1, n, cH, cW) that matter for it."""
        segment, take = request.segment, request.take
        is_whole = segment.num_code_frames == take.num_code_frames
        assert self.vqvae is not None
        with self._precision():
            coarse = self.vqvae.decode_frames(
                codes.to(self.settings.device),
                segment.start_latent,
                segment.start_latent + segment.num_latents,
                # The last code frame of a take may cover latent frames behind its end.
                num_latent_frames=take.num_latents
                if is_whole
                else segment.num_code_frames * self.geometry.code_ratio[0],
                grid=self.geometry.latent_size(request.height, request.width),
            )
        return coarse.float()

    def _guided_prompt(self, request: RefineRequest, prompt: str) -> GuidedPrompt:
        assert request.text is not None
        features, device = request.text.features, self.settings.device
        negative = features[request.negative_prompt].to(device) if request.negative_prompt else None
        return GuidedPrompt(text=features[prompt].to(device), negative=negative, guidance_scale=request.guidance_scale)

    def _precision(self) -> AbstractContextManager[Any]:
        return precision_context(self.settings)


def _carried_latent(request: RefineRequest) -> Tensor | None:
    """Latent frames carried over from the segment before, (1, C, overlap, H, W); None if there are none."""
    if not request.segment.overlap:
        return None
    if request.before is None:
        raise ValueError(f"segment {request.segment.index} needs the segment before it to go on from")
    return request.before.latent[:, :, -request.segment.overlap :].contiguous()


def load_vae(job: Job) -> VideoVAE:
    """The video VAE of a film, on its device, with as many frames at a time as its settings say."""
    frames = job.settings.vae_micro_batch
    overrides = {} if frames is None else {"micro_batch_size": frames}
    return VideoVAE.from_pretrained(job.component("vae"), **overrides).to(job.settings.device)


class DecodeWorker:
    """Decodes latents with the video VAE; segments start at chunk borders, so each decodes by itself.

    Where borders between chunks are blended, that of two segments changes frames of both. So a segment leaves its last
    ones to the segment after it, which decodes them together with its own from the latents of both.
    """

    def __init__(self, job: Job) -> None:
        self.settings = job.settings
        self.vae = load_vae(job)

    @torch.inference_mode()
    def run(self, request: DecodeRequest) -> DecodeResult:
        """Decode."""
        assert request.refined is not None
        started_s = time.perf_counter()
        latent, known = request.refined.latent, 0
        if request.lead:
            if request.before is None:
                raise ValueError("a segment that begins with frames of the one before it needs its latents")
            chunk, frames = self.vae.config.chunk_latents, self.vae.config.micro_frame_size
            assert chunk is not None  # the plan refuses a VAE without chunks
            assert frames is not None
            latent, known = torch.cat([request.before.latent[:, :, -chunk:], latent], dim=2), frames
        with precision_context(self.settings):
            video = self.vae.decode(
                latent.to(self.settings.device),
                known + request.num_frames,
                blend_frames=self.settings.vae_blend_frames,
                tile=self.settings.vae_tile,
                part=slice(known - request.lead, known + request.num_frames - request.held),
            )
        if request.size is not None:
            video = crop_centre(video, height=request.size[0], width=request.size[1])
        return DecodeResult(
            frames=video_to_frames(video[0]),
            elapsed_s=time.perf_counter() - started_s,
            memory_bytes=process_memory_bytes(),
            ended_s=time.time(),
        )


def precision_context(settings: Settings) -> AbstractContextManager[Any]:
    """Context that runs networks in the precision of the settings; a new one each time."""
    if settings.dtype == "float32":
        return nullcontext()
    return torch.autocast(torch.device(settings.device).type, dtype=torch.bfloat16)
