"""Memory and floating-point operations of a film, part by part, computed before anything is loaded.

The parts of a model stay loaded side by side. Only a large text encoder is unloaded before the others are loaded, if
the film has few prompts. Parts work in turn, so their working memory does not add up, with two exceptions: the cache of
the code model lasts as long as its take, and the injected features last as long as their segment.

What is counted are the requests of the film (`arlon.film.schedule`), the same that the workers get. Figures are those
of one process; `arlon.cost` says what they leave out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from arlon import cost
from arlon.cost import Cost
from arlon.diffusion.solvers import SOLVERS
from arlon.film.geometry import ModelConfigs
from arlon.film.messages import Job, SegmentRequests
from arlon.film.plan import Plan
from arlon.film.schedule import film_requests, text_request
from arlon.film.settings import Settings
from arlon.film.take_media import NO_MEDIA
from arlon.film.workers import should_unload_text_encoder
from arlon.grids import ceil_div
from arlon.models.ar import CodeTransformerConfig

HEADROOM = 1.75
"""Factor from computed working memory to what a process takes, for kernels and the allocator: measured between 1.3 and
1.75 at the larger sizes of benchmarks/working_memory.py, on a CPU."""
WEIGHT_BYTES = 4
"""Bytes of a weight: all parts hold float32, but the text encoder holds the precision that is set."""
UNDER_AUTOCAST = ("dit", "injection", "vqvae", "vae")
"""Parts that `dtype: bfloat16` concerns; the others compute in the precision of their weights."""
GIGABYTE = 1e9


@dataclass(frozen=True, kw_only=True)
class PartCost:
    """Cost of one component of the model in a whole film."""

    part: str
    """Name of the component."""
    weight_bytes: int
    working_bytes: int
    """Most memory that it takes besides its weights, without the headroom."""
    flops: int


@dataclass(frozen=True, kw_only=True)
class FilmCost:
    """Cost of a film that is made in one process."""

    parts: tuple[PartCost, ...]
    unloads_text_encoder: bool = False
    """Whether the text encoder is unloaded before the other parts are loaded."""

    @property
    def largest_together(self) -> tuple[PartCost, ...]:
        """The parts that are loaded when most memory is taken."""
        if not self.unloads_text_encoder:
            return self.parts
        text = tuple(part for part in self.parts if part.part == "text_encoder")
        others = tuple(part for part in self.parts if part.part != "text_encoder")
        return max(text, others, key=lambda parts: FilmCost(parts=parts).bytes)

    @property
    def weight_bytes(self) -> int:
        """Memory of weights when most memory is taken."""
        return sum(part.weight_bytes for part in self.largest_together)

    @property
    def working_bytes(self) -> int:
        """Memory of everything else at that time, without the headroom."""
        working = {part.part: part.working_bytes for part in self.largest_together}
        lasting, injected = working.pop("ar", 0), working.pop("injection", 0)
        if "dit" in working:
            working["dit"] += injected
        return lasting + max(working.values())

    @property
    def bytes(self) -> int:
        """Most memory that is taken at a time: weights, and working memory with headroom."""
        return self.weight_bytes + round(HEADROOM * self.working_bytes)

    @property
    def flops(self) -> int:
        """Floating-point operations of the film."""
        return sum(part.flops for part in self.parts)

    def to_plain(self) -> dict[str, Any]:
        """Convert to plain values for JSON."""
        names = ("weight_bytes", "working_bytes", "flops")
        totals = {name: getattr(self, name) for name in ("bytes", *names, "unloads_text_encoder")}
        return totals | {"parts": {part.part: {name: getattr(part, name) for name in names} for part in self.parts}}


def plan_cost(plan: Plan, configs: ModelConfigs, settings: Settings) -> FilmCost:
    """Compute the memory and the operations of a film.

    Args:
        plan: Plan of the film.
        configs: Configs of its model.
        settings: How the film is computed.
    """
    if not plan.geometry.has_codes:
        configs = configs.without_codes()
    vae = configs.vae
    if settings.vae_micro_batch is not None:
        vae = replace(vae, micro_batch_size=settings.vae_micro_batch)
    # Given pictures and videos change no cost, and the model's folder and hash change no request.
    job = Job(plan=plan, settings=settings, model_path="", model_hash="")
    requests = list(film_requests(job, dict.fromkeys(range(len(plan.shots)), NO_MEDIA)))
    text_dtype = getattr(torch, settings.text_dtype)
    text_length, fit = configs.text_encoder.max_length, plan.frame_fit
    size = (plan.geometry.grid.segment, *plan.geometry.latent_size(fit.made_height, fit.made_width))
    parts = []

    def add(name: str, once: Cost, calls: float) -> None:
        # Autocast keeps a rounded copy of the weights at work, 2 bytes each.
        copy_bytes = 2 if settings.dtype == "bfloat16" and name in UNDER_AUTOCAST else 0
        weight_bytes = text_dtype.itemsize if name == "text_encoder" else WEIGHT_BYTES
        parts.append(
            PartCost(
                part=name,
                weight_bytes=once.num_parameters * weight_bytes,
                working_bytes=once.working_bytes + once.num_parameters * copy_bytes,
                flops=round(once.flops * calls),
            )
        )

    num_prompts = len(text_request(plan).prompts)
    add("text_encoder", cost.text_cost(configs.text_encoder, dtype=text_dtype), num_prompts)

    # A pass with guidance runs the network on a batch of two. Where some segments have it, the others cost half.
    is_guided = any(request.refine.guidance_scale != 1 for request in requests)
    passes = sum(_num_passes(request) * (1 if _is_guided(request) or not is_guided else 0.5) for request in requests)
    batch = 2 if is_guided else 1
    dit = configs.backbone.cost(size, text_length=text_length, batch=batch, injection=configs.injection)
    add("dit", dit, passes)

    # The first segment of a take has more new frames; the others have a border to blend.
    kinds = Counter((request.decode.num_frames, request.segment.overlap > 0) for request in requests)
    decodes = {
        (num_frames, is_joined): cost.vae_decode_cost(
            vae,
            num_frames,
            size[1:],
            is_joined=is_joined,
            blend_frames=settings.vae_blend_frames,
            tile=settings.vae_tile,
        )
        for num_frames, is_joined in kinds
    }
    largest = max(decodes.values(), key=lambda once: once.working_bytes)
    add("vae", replace(largest, flops=sum(count * decodes[kind].flops for kind, count in kinds.items())), 1)

    if configs.ar is not None and configs.vqvae is not None and configs.injection is not None:
        code_cost = _code_cost(requests, configs.ar, text_length, is_guided=settings.ar_guidance_scale != 1)
        add("ar", code_cost, 1)
        # Every segment decodes the codes it covers with the halo on both sides.
        longest = max(request.segment.num_code_frames - request.segment.start_code_frame for request in requests)
        add("vqvae", cost.vqvae_cost(configs.vqvae, (longest, *configs.ar.grid)), len(requests))
        add("injection", cost.injection_cost(configs.injection, size), len(requests))
    unloads = should_unload_text_encoder(parts[0].weight_bytes, num_prompts)
    return FilmCost(parts=tuple(parts), unloads_text_encoder=unloads)


def _is_guided(request: SegmentRequests) -> bool:
    return request.refine.guidance_scale != 1


def _num_passes(request: SegmentRequests) -> int:
    """Passes through the diffusion transformer for a segment; one between two prompts takes those of both."""
    prompts = 1 if request.refine.blend is None else 2
    return prompts * SOLVERS[request.refine.solver].evaluations(request.refine.num_inference_steps)


def _code_cost(
    requests: Sequence[SegmentRequests], config: CodeTransformerConfig, text_length: int, *, is_guided: bool
) -> Cost:
    """Cost of all codes of a film.

    Every frame counts as one at the end of a full window. The window is read again at every prompt switch and whenever
    it slides. During a blend the model also writes under the prompt before, in a cache for a batch of one.
    """
    batch = 2 if is_guided else 1
    frame = cost.ar_frame_cost(config, text_length=text_length, batch=batch)
    read = cost.ar_read_cost(config, text_length=text_length, batch=batch)
    flops = 0
    blends: list[int] = []
    """Code frames of each blended switch."""
    for request in requests:
        if request.segment.starts_take:
            spans = request.code.schedule.spans
            num_frames = sum(span.num_code_frames for span in spans)
            slides = ceil_div(max(0, num_frames - config.max_code_frames), config.hop)
            flops += num_frames * frame.flops + (slides + len(spans)) * read.flops
            blends += [min(span.blend, span.num_code_frames) for span in spans if span.blend]
    if not blends:
        return replace(frame, flops=flops)
    old_frame = cost.ar_frame_cost(config, text_length=text_length, batch=1)
    old_read = cost.ar_read_cost(config, text_length=text_length, batch=1)
    flops += sum(blends) * old_frame.flops + len(blends) * old_read.flops
    return replace(frame, flops=flops, working_bytes=frame.working_bytes + old_frame.working_bytes)


def cost_lines(film: FilmCost) -> list[str]:
    """Two lines for people, memory and operations, with the largest parts first."""
    together = film.largest_together
    by_weight = sorted(film.parts, key=lambda part: -part.weight_bytes)
    by_flops = sorted(film.parts, key=lambda part: -part.flops)
    total = max(1, film.flops)
    shares = [f"{part.part} {part.flops / total:.0%}" for part in by_flops if part.flops >= 0.005 * total]
    loaded = ", ".join(f"{part.part} {gigabytes(part.weight_bytes)}" for part in by_weight if part in together)
    apart = ", ".join(f"{part.part} {gigabytes(part.weight_bytes)}" for part in by_weight if part not in together)
    weights = loaded + (f"; at another time {apart}" if apart else "")
    return [
        f"memory about {gigabytes(film.bytes)} besides the program: "
        f"weights {gigabytes(film.weight_bytes)} ({weights}), "
        f"working {gigabytes(film.working_bytes)} with {HEADROOM - 1:.0%} headroom",
        f"work about {operations(film.flops)}: {', '.join(shares)}",
    ]


def gigabytes(count: float) -> str:
    """Bytes for people: `4.83 GB`, `120 MB`."""
    return f"{count / GIGABYTE:.3g} GB" if count >= 0.9995 * GIGABYTE else f"{count / 1e6:.0f} MB"


def operations(flops: float) -> str:
    """Floating-point operations for people: `3.14 PFLOP`."""
    for unit, size in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12)):
        if flops >= size:
            return f"{flops / size:.3g} {unit}"
    return f"{flops / 1e9:.3g} GFLOP"
