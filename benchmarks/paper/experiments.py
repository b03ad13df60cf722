"""The experiments: which films are made, under which conditions, and which figures are shown.

Sources: ARLON, arXiv:2410.20502, tables of short and long video, number of steps, noise-resilient training; what the
paper does not give (sampling of the AR model) is measured as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from arlon.evaluation import cases as suite
from arlon.evaluation.cases import Case
from arlon.film.geometry import ModelGeometry
from benchmarks.paper import variants
from benchmarks.paper.conditions import Condition
from benchmarks.prompt_accuracy import Mode

SUITE_SEED = 2026
"""Seed of all prompts and films; other seeds than those that models are tuned on."""
FEW_STEPS = 5
"""Solver steps where conditions differ in something else: the fewest that ARLON is claimed for."""
LONG_FILM = (1, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1)
"""Segments of each shot of a long film: a minute at the small model's segments."""
SCORES = suite.PROMPT_ATTRIBUTES
PROMPT_FIGURES = ("prompt_accuracy", *(f"prompt_{name}" for name in SCORES))
BOTH_FIGURES = ("prompt_both_colours", "prompt_both_objects")
PICTURE_FIGURES = ("dynamic_degree_lk", "flow_speed", "temporal_flickering")
QUARTER_FIGURES = tuple(f"prompt_{name}_{end}" for name in SCORES for end in ("first", "last", "change"))
LONG_FIGURES = (
    *("prompt_accuracy", "prompt_accuracy_first", "prompt_accuracy_last", "prompt_accuracy_change"),
    *("switch_appears", "kept_colour", "kept_shape", "kept_background", "kept_place"),
    *("seam_strength", "seam_strength_switch", "drift_colour", "drift_contrast", "drift_sharpness"),
    "dynamic_degree_lk",
    *QUARTER_FIGURES,
)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One table."""

    title: str
    claim: str
    """Claim of the paper."""
    conditions: tuple[Condition, ...]
    figures: tuple[str, ...]
    compared: tuple[tuple[str, str], ...] = ()
    """Names of two conditions whose difference is shown, film by film: the first less the second."""
    segments: tuple[int, ...] = (1,)
    """Segments of each shot of a film."""
    two_objects_prob: float = 0.0
    """Share of films with two objects; only for films of one shot."""
    default_cases: int = 64

    def cases(self, count: int, geometry: ModelGeometry) -> list[Case]:
        """The films: held-out attribute pairs and phrasings."""
        defaults, grid = geometry.defaults, geometry.grid
        first_s, later_s = grid.segment_frames / defaults.fps, grid.stride_frames / defaults.fps
        seconds = [number * later_s for number in self.segments]
        seconds[0] += first_s - later_s
        aspect = defaults.width / defaults.height
        return suite.sample_cases(
            count, seconds=seconds, seed=SUITE_SEED, two_objects_prob=self.two_objects_prob, aspect=aspect
        )


ARLON_AND_BASE = (
    (f"arlon {FEW_STEPS} steps", "base 30 steps"),
    (f"arlon {FEW_STEPS} steps", f"base {FEW_STEPS} steps"),
    (f"arlon {FEW_STEPS} steps", "codes alone"),
)


def _parts(steps: Sequence[int]) -> tuple[Condition, ...]:
    """The base alone and the whole model at each number of steps, and the codes alone."""
    base = tuple(Condition(name=f"base {n} steps", mode="base", steps=n) for n in steps)
    whole = tuple(Condition(name=f"arlon {n} steps", steps=n) for n in steps)
    return (*base, Condition(name="codes alone", mode="codes"), *whole)


def _sampled(label: str, setting: str, values: Sequence[float]) -> Iterator[Condition]:
    """A condition for each value of a setting of the AR model's sampling."""
    for value in values:
        yield Condition(name=f"{label} {value}", steps=FEW_STEPS, settings={setting: value})


def _blended(counts: Sequence[int]) -> Iterator[Condition]:
    """The base alone and the whole model, with numbers of frames that are blended at chunk borders."""
    modes: tuple[Mode, ...] = ("base", "arlon")
    for mode, count in itertools.product(modes, counts):
        name = f"{mode}, {count} frames blended"
        yield Condition(name=name, steps=FEW_STEPS, mode=mode, settings={"vae_blend_frames": count})


EXPERIMENTS: dict[str, Experiment] = {
    "short": Experiment(
        title="Short films: base, codes alone, ARLON",
        claim="ARLON at 5 to 10 steps is as good as the base at 30, more dynamic, and takes 47 to 64 % less time.",
        conditions=_parts((5, 10, 30)),
        compared=ARLON_AND_BASE,
        figures=PROMPT_FIGURES + PICTURE_FIGURES,
    ),
    "long": Experiment(
        title=f"Long films of {len(LONG_FILM)} shots: base, codes alone, ARLON",
        claim="Long films are more consistent and more dynamic than those of the base continued segment by segment.",
        conditions=_parts((5, 10, 30)),
        compared=ARLON_AND_BASE,
        figures=LONG_FIGURES,
        segments=LONG_FILM,
        default_cases=8,
    ),
    "two_objects": Experiment(
        title="Two objects in one picture",
        claim="(Not in the paper.)",
        conditions=(
            Condition(name="base 30 steps", mode="base", steps=30),
            Condition(name="arlon 5 steps", steps=FEW_STEPS),
            Condition(name="true codes 5 steps", steps=FEW_STEPS, mode="true_codes", video="as asked"),
        ),
        figures=PROMPT_FIGURES + BOTH_FIGURES,
        two_objects_prob=1.0,
    ),
    "flips": Experiment(
        title="Codes flipped at random",
        claim="Training on coarser codes with uncertainty sampling tolerates the mistakes of the AR model.",
        conditions=tuple(
            Condition(name=f"{round(100 * share)} % flipped", steps=FEW_STEPS, flipped=share)
            for share in (0.0, 0.05, 0.1, 0.2, 0.3)
        ),
        compared=(("10 % flipped", "0 % flipped"), ("30 % flipped", "0 % flipped")),
        figures=PROMPT_FIGURES + PICTURE_FIGURES,
    ),
    "injection": Experiment(
        title="Designs and places of the injection",
        claim="Adaptive norm in the first half is the best choice; a ControlNet moves more and is less consistent.",
        conditions=(
            Condition(name="none", steps=FEW_STEPS, mode="base"),
            *(Condition(name=variant.name, steps=FEW_STEPS, variant=variant.name) for variant in variants.DESIGNS),
        ),
        compared=tuple((other.name, variants.DESIGNS[0].name) for other in variants.DESIGNS[1:]),
        figures=PROMPT_FIGURES + PICTURE_FIGURES,
    ),
    "resilience": Experiment(
        title="Training on fine or coarser codes, with and without uncertainty sampling",
        claim="Coarser codes and uncertainty sampling in training make the model tolerate wrong codes.",
        conditions=tuple(
            Condition(
                name=f"{variant.name}, {round(100 * share)} % flipped",
                steps=FEW_STEPS,
                variant=variant.name,
                flipped=share,
            )
            for variant in variants.RESILIENCE
            for share in (0.0, 0.1, 0.3)
        ),
        compared=tuple(
            (f"{variant.name}, {share} % flipped", f"{variant.name}, 0 % flipped")
            for variant in variants.RESILIENCE
            for share in (10, 30)
        ),
        figures=PROMPT_FIGURES + PICTURE_FIGURES,
    ),
    "video": Experiment(
        title="Codes of a given video",
        claim="With the codes of a video and a new prompt, the layout follows the video and the appearance the prompt.",
        conditions=tuple(
            replace(condition, measures_path=True)
            for condition in (
                Condition(name="codes of the AR model", steps=FEW_STEPS),
                Condition(name="video as asked", steps=FEW_STEPS, mode="true_codes", video="as asked"),
                Condition(name="video in other colours", steps=FEW_STEPS, mode="true_codes", video="other colours"),
                Condition(name="other colours, codes alone", mode="codes", video="other colours"),
            )
        ),
        figures=("path_followed", *PROMPT_FIGURES, *PICTURE_FIGURES),
    ),
    "seams": Experiment(
        title="Seams where segments of one shot join",
        claim="(Not in the paper.)",
        conditions=tuple(_blended((0, 2, 3))),
        figures=("seam_strength", "temporal_flickering", "drift_colour", "drift_contrast", "drift_sharpness"),
        segments=(5,),
        default_cases=8,
    ),
    "context": Experiment(
        title=f"Context of the AR model in films of {len(LONG_FILM)} shots",
        claim="(Not in the paper.)",
        conditions=tuple(
            Condition(name=f"window moves by {hop}", steps=FEW_STEPS, window_hop=hop) for hop in (1, 2, 4, 6)
        ),
        figures=LONG_FIGURES,
        segments=LONG_FILM,
        default_cases=8,
    ),
    "sampling": Experiment(
        title="Sampling of the AR model",
        claim="(Not in the paper.)",
        conditions=(
            *_sampled("temperature", "ar_temperature", (0.5, 0.7, 1.0)),
            *_sampled("top-p", "ar_top_p", (0.8, 1.0)),
            *_sampled("guidance", "ar_guidance_scale", (1.0, 3.0, 4.0)),
        ),
        figures=PROMPT_FIGURES + PICTURE_FIGURES,
    ),
}
