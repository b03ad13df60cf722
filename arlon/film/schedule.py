"""The requests of a film: what each step is asked to do for each segment, known before anything is computed.

Nothing here reads a file. What a film is given (`arlon.film.take_media`) is passed in by the caller, who has it from
encoding or from the run folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from arlon.data.pictures import IMAGE_FPS
from arlon.files import hash_tensor
from arlon.film.media import named_files
from arlon.film.messages import (
    CodeRequest,
    Committed,
    DecodeRequest,
    Job,
    RefineRequest,
    SegmentInputs,
    SegmentRequests,
    TextRequest,
    WriteRequest,
)
from arlon.film.plan import Plan, Segment
from arlon.film.prompt_schedule import PromptSchedule, code_schedule, encoder_prompt, segment_blend
from arlon.film.take_media import NO_MEDIA, TakeMedia


def text_request(plan: Plan) -> TextRequest:
    """Request for all prompts of a film, each once, in order of appearance, the negative prompt last."""
    film = plan.storyboard
    prompts = dict.fromkeys(encoder_prompt(film, index) for index in range(len(film.shots)))
    if film.negative_prompt:
        prompts[film.negative_prompt] = None
    return TextRequest(prompts=tuple(prompts))


def prompts_to_encode(job: Job, committed: Committed) -> Iterator[str]:
    """Prompts that the segments still to be made need, in the order of need; many come more than once."""
    for request in film_requests(job, committed.media):
        if request.segment.index not in committed.segments:
            codes = committed.codes.get(request.code.take)
            if codes is None or codes.shape[1] < request.code.stop:
                yield from request.code.prompts
            yield from request.refine.prompts


def film_requests(job: Job, media: Mapping[int, TakeMedia] | None = None) -> Iterator[SegmentRequests]:
    """Requests of all segments of a film in order, one segment at a time: a long film has many.

    Args:
        job: The film.
        media: What its shots are given, by shot; needed for every shot that names a file.

    Raises:
        ValueError: If the media of a shot are missing, or do not fit their placements.
    """
    media = media or {}
    for shot, kind, _, path in named_files(job.plan.storyboard):
        if shot not in media:
            raise ValueError(f"shots[{shot}].{kind} '{path}' is not among the encoded media of the film")
    schedule = PromptSchedule(())
    for segment in job.plan.segments:
        if segment.starts_take:
            schedule = code_schedule(job.plan, job.plan.takes[segment.take])
            of_take = media.get(segment.shot, NO_MEDIA)
        yield _segment_requests(job, segment, schedule, of_take, media.get(segment.shot, NO_MEDIA))


def _segment_requests(
    job: Job, segment: Segment, schedule: PromptSchedule, of_take: TakeMedia, of_shot: TakeMedia
) -> SegmentRequests:
    """Requests of one segment.

    Args:
        job: The film.
        segment: The segment.
        schedule: Prompts of its take.
        of_take: What the first shot of its take is given.
        of_shot: What its own shot is given.
    """
    plan, film, take = job.plan, job.plan.storyboard, job.plan.takes[segment.take]
    fit = plan.frame_fit
    refine = RefineRequest(
        segment=segment,
        take=take,
        prompt=encoder_prompt(film, segment.shot),
        negative_prompt=film.negative_prompt,
        seed=film.seed_of(segment.shot),
        guidance_scale=film.guidance_scale_of(segment.shot),
        num_inference_steps=film.num_inference_steps,
        solver=film.solver,
        fps=IMAGE_FPS if segment.num_frames == 1 else film.fps,
        height=fit.made_height,
        width=fit.made_width,
        blend=segment_blend(plan, segment, take),
        head=of_take.head if segment.starts_take else None,
        tail=of_shot.tail if segment.ends_shot else None,
        placed=of_take.conditioning_for(segment, plan.geometry.grid),
    )
    # Segments that share no frames have no common border that could be blended.
    blended = job.settings.vae_blend_frames if plan.geometry.grid.overlap else 0
    decode = DecodeRequest(
        num_frames=segment.num_frames,
        lead=0 if segment.starts_take else blended,
        held=0 if segment.ends_take else blended,
        size=None if fit.is_exact else (fit.height, fit.width),
    )
    return SegmentRequests(
        segment=segment,
        code=CodeRequest(
            take=take.index,
            schedule=schedule,
            start=0 if segment.starts_take else plan.segments[segment.index - 1].num_code_frames,
            stop=segment.num_code_frames,
            given=of_take.codes,
        ),
        refine=refine,
        decode=decode,
        write=WriteRequest(segment=segment, inputs=segment_inputs(job, refine, decode)),
    )


def segment_inputs(job: Job, refine: RefineRequest, decode: DecodeRequest) -> SegmentInputs:
    """Provenance of a segment, from its requests and the settings of its film."""
    segment, settings = refine.segment, job.settings
    return SegmentInputs(
        model=job.model_hash,
        take=segment.take,
        index_in_take=segment.index_in_take,
        start_latent=segment.start_latent,
        num_latents=segment.num_latents,
        num_frames=segment.num_frames,
        prompt=refine.prompt,
        negative_prompt=refine.negative_prompt,
        seed=refine.seed,
        guidance_scale=refine.guidance_scale,
        num_inference_steps=refine.num_inference_steps,
        solver=refine.solver,
        fps=refine.fps,
        height=refine.height,
        width=refine.width,
        blend=refine.blend,
        head=None if refine.head is None else hash_tensor(refine.head),
        tail=None if refine.tail is None else hash_tensor(refine.tail),
        placed=None if refine.placed is None else (hash_tensor(refine.placed[0]), hash_tensor(refine.placed[1])),
        lead=decode.lead,
        held=decode.held,
        cut_to=decode.size,
        dtype=settings.dtype,
        num_threads=settings.num_threads,
        device=settings.device,
        crf=settings.crf,
        preset=settings.preset,
        vae_blend_frames=settings.vae_blend_frames,
        vae_tile=settings.vae_tile,
        vae_micro_batch=settings.vae_micro_batch,
        text_dtype=settings.text_dtype,
        x264_cpu_independent=settings.x264_cpu_independent,
    )
