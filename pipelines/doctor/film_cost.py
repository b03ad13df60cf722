"""What a film takes: memory and floating-point operations of every part of a model, computed before anything is loaded.

The parts of a film stay loaded side by side, but for a large text encoder, which is gone before the others come if the
film has few prompts. Their working memory does not add up, as they work in turn, with two exceptions: the cache of the
code model lasts as long as its take, and the injected features as long as their segment. Figures are those of one
process; see `arlon.cost` for what they leave out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress
from typing import TYPE_CHECKING, Any

import torch

from arlon import cost
from arlon.cost import Cost
from arlon.diffusion.solvers import SOLVERS
from arlon.film.geometry import GenerationDefaults, ModelConfigs, read_configs
from arlon.film.plan import Plan
from arlon.film.prompt_schedule import code_schedule, segment_blend
from arlon.film.schedule import text_request
from arlon.film.settings import Settings
from arlon.film.workers import lets_encoder_go
from arlon.grids import ceil_div

if TYPE_CHECKING:
    from arlon.checkpoint import ModelFolder

HEADROOM = 1.75
"""What a process takes over computed working memory, for kernels and allocator: 1.3 to 1.75 times at the larger sizes
of benchmarks/working_memory.py, on a CPU."""
WEIGHT_BYTES = 4
"""Weights are held in float32, but those of the text encoder in the precision that is set."""
UNDER_AUTOCAST = ("dit", "injection", "vqvae", "vae")
"""Parts that `dtype: bfloat16` concerns; the others write codes and features in the precision of their weights."""
GIGABYTE = 1e9


@dataclass(frozen=True, kw_only=True)
class PartCost:
    """One component of the model in a whole film."""

    part: str
    weight_bytes: int
    working_bytes: int
    flops: int


@dataclass(frozen=True, kw_only=True)
class FilmCost:
    """What a film takes in one process."""

    parts: tuple[PartCost, ...]
    lets_text_go: bool = False
    """Whether the text encoder is gone before the other parts are loaded."""

    @property
    def largest_together(self) -> tuple[PartCost, ...]:
        """The parts that are loaded when most memory is taken."""
        return max(self._together, key=_bytes_of)

    @property
    def weight_bytes(self) -> int:
        """Memory of weights when most memory is taken."""
        return _weight_bytes(self.largest_together)

    @property
    def working_bytes(self) -> int:
        """Memory of everything else at that time, without the headroom."""
        return _working_bytes(self.largest_together)

    @property
    def bytes(self) -> int:
        """Most memory taken: weights, and working memory with headroom."""
        return _bytes_of(self.largest_together)

    @property
    def _together(self) -> list[tuple[PartCost, ...]]:
        """Parts that are loaded side by side, one group after the other."""
        if not self.lets_text_go:
            return [self.parts]
        is_text = [part.part == "text_encoder" for part in self.parts]
        return [tuple(compress(self.parts, group)) for group in (is_text, [not text for text in is_text])]

    @property
    def flops(self) -> int:
        """Floating-point operations of the film."""
        return sum(part.flops for part in self.parts)

    def to_plain(self) -> dict[str, Any]:
        """Plain values for JSON."""
        parts = {
            part.part: {
                "weight_bytes": part.weight_bytes,
                "working_bytes": part.working_bytes,
                "flops": part.flops,
            }
            for part in self.parts
        }
        totals = {"bytes": self.bytes, "weight_bytes": self.weight_bytes, "working_bytes": self.working_bytes}
        return totals | {"flops": self.flops, "lets_text_go": self.lets_text_go, "parts": parts}


def _weight_bytes(parts: Sequence[PartCost]) -> int:
    return sum(part.weight_bytes for part in parts)


def _working_bytes(parts: Sequence[PartCost]) -> int:
    """Most memory besides weights of parts that are loaded side by side, without the headroom."""
    working = {part.part: part.working_bytes for part in parts}
    lasting, injected = working.pop("ar", 0), working.pop("injection", 0)
    if "dit" in working:
        working["dit"] += injected
    return lasting + max(working.values())


def _bytes_of(parts: Sequence[PartCost]) -> int:
    return _weight_bytes(parts) + round(HEADROOM * _working_bytes(parts))


def plan_cost(
    plan: Plan, model: ModelFolder | ModelConfigs, *, dtype: str = "float32", settings: Settings | None = None
) -> FilmCost:
    """Memory and operations of a film.

    Args:
        plan: The film.
        model: Its model, or the configs of one.
        dtype: `bfloat16` runs under autocast, which keeps a rounded copy of the weights at work.
        settings: How it is made; None: by the defaults of the model.
    """
    configs = model if isinstance(model, ModelConfigs) else read_configs(model)
    configs = configs if plan.geometry.has_codes else configs.without_codes()
    defaults, tile, text_dtype = plan.geometry.defaults, None, torch.float32
    if settings is not None:
        text_dtype = getattr(torch, settings.text_dtype)
        chosen = {name: getattr(settings, name) for name in ("vae_blend_frames", "ar_guidance_scale")}
        defaults, tile = replace(defaults, **chosen), settings.vae_tile
        if settings.vae_micro_batch is not None:
            configs = replace(configs, vae=replace(configs.vae, micro_batch_size=settings.vae_micro_batch))
    return _Estimate(plan, configs, defaults, tile, 2 if dtype == "bfloat16" else 0, text_dtype).film()


@dataclass(frozen=True)
class _Estimate:
    """The parts of one film, one method each."""

    plan: Plan
    configs: ModelConfigs
    defaults: GenerationDefaults
    tile: int | None
    copy_bytes: int
    """Bytes a weight that the part at work takes besides, if it is one that runs under autocast."""
    text_dtype: torch.dtype

    def film(self) -> FilmCost:
        parts = {"text_encoder": self.text_encoder(), "dit": self.dit(), "vae": self.vae()}
        if self.configs.has_codes:
            parts |= {"ar": self.ar(), "vqvae": self.vqvae(), "injection": self.injection()}
        costs = tuple(self._part(name, *part) for name, part in parts.items())
        lets_text_go = lets_encoder_go(costs[0].weight_bytes, len(text_request(self.plan).prompts))
        return FilmCost(parts=costs, lets_text_go=lets_text_go)

    def text_encoder(self) -> tuple[Cost, float]:
        once = cost.text_cost(self.configs.text_encoder, dtype=self.text_dtype)
        return once, len(text_request(self.plan).prompts)

    def dit(self) -> tuple[Cost, float]:
        """Guided passes count one, the others half; a segment between two prompts takes those of both."""
        film = self.plan.storyboard
        scales = Counter[float]()
        for segment in self.plan.segments:
            is_blended = segment_blend(self.plan, segment, self.plan.takes[segment.take]) is not None
            scales[film.guidance_scale_of(segment.shot)] += 2 if is_blended else 1
        is_guided = set(scales) != {1}
        passes = sum(count * (1.0 if scale != 1 or not is_guided else 0.5) for scale, count in scales.items())
        evaluations = SOLVERS[film.solver].evaluations(film.num_inference_steps)
        once = cost.dit_cost(
            self.configs.dit,
            self._segment_size,
            text_length=self.configs.text_encoder.max_length,
            batch=2 if is_guided else 1,
            injection=self.configs.injection,
        )
        return once, passes * evaluations

    def vae(self) -> tuple[Cost, float]:
        """All segments together: those that start a take have more new frames, the others a border to blend."""
        kinds = Counter((segment.num_frames, segment.overlap > 0) for segment in self.plan.segments)
        options = {"blend_frames": self.defaults.vae_blend_frames, "tile": self.tile}
        costs = {
            (frames, is_joined): cost.vae_decode_cost(
                self.configs.vae, frames, self._segment_size[1:], is_joined=is_joined, **options
            )
            for frames, is_joined in kinds
        }
        largest = max(costs.values(), key=lambda once: once.working_bytes)
        return replace(largest, flops=sum(count * costs[kind].flops for kind, count in kinds.items())), 1

    def vqvae(self) -> tuple[Cost, float]:
        """Codes of a segment with the halo on both sides."""
        geometry = self.plan.geometry
        frames = ceil_div(self._segment_size[0], geometry.code_ratio[0]) + 1 + 2 * geometry.code_halo
        longest = max(take.num_code_frames for take in self.plan.takes)
        once = cost.vqvae_cost(self.configs.vqvae, (min(frames, longest), *self.configs.ar.grid))
        return once, len(self.plan.segments)

    def injection(self) -> tuple[Cost, float]:
        return cost.injection_cost(self.configs.injection, self._segment_size), len(self.plan.segments)

    def ar(self) -> tuple[Cost, float]:
        """Every frame as at the end of a full window; the window is read at every switch and every slide.

        While a switch is blended, the model also writes under the prompt before, in a cache of one row.
        """
        config = self.configs.ar
        batch = 1 if self.defaults.ar_guidance_scale == 1 else 2
        sizes = {"text_length": self.configs.text_encoder.max_length, "batch": batch}
        frame, read = cost.ar_frame_cost(config, **sizes), cost.ar_read_cost(config, **sizes)
        takes = self.plan.takes
        slides = sum(ceil_div(max(0, take.num_code_frames - config.max_code_frames), config.hop) for take in takes)
        reads = slides + sum(len(take.spans) for take in takes)
        flops = sum(take.num_code_frames for take in takes) * frame.flops + reads * read.flops
        if blends := list(self._blended_code_frames()):
            sizes["batch"] = 1
            old_frame, old_read = cost.ar_frame_cost(config, **sizes), cost.ar_read_cost(config, **sizes)
            flops += sum(blends) * old_frame.flops + len(blends) * old_read.flops
            frame = replace(frame, working_bytes=frame.working_bytes + old_frame.working_bytes)
        return frame, flops / frame.flops

    def _blended_code_frames(self) -> Iterator[int]:
        """Number of code frames that are blended, at each prompt switch that is."""
        for take in self.plan.takes:
            for span in code_schedule(self.plan, take).spans:
                if span.blend:
                    yield min(span.blend, span.num_code_frames)

    @cached_property
    def _segment_size(self) -> tuple[int, int, int]:
        fit, geometry = self.plan.frame_fit, self.plan.geometry
        return geometry.grid.segment, *geometry.latent_size(fit.made_height, fit.made_width)

    def _part(self, name: str, once: Cost, calls: float) -> PartCost:
        copy_bytes = self.copy_bytes if name in UNDER_AUTOCAST else 0
        return PartCost(
            part=name,
            weight_bytes=once.num_parameters * (self.text_dtype.itemsize if name == "text_encoder" else WEIGHT_BYTES),
            working_bytes=once.working_bytes + once.num_parameters * copy_bytes,
            flops=round(once.flops * calls),
        )


def cost_lines(film: FilmCost) -> list[str]:
    """Two lines for people: memory and operations, the largest parts first."""
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
