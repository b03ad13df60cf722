"""Definitions of the figures of a film: name, meaning, and the network that computes it.

Figures named as in VBench (arXiv:2311.17982) follow VBench's code. A dimension whose network is not given is left
out; a figure that does the same work by other means has a name of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

FORMAT = 4
"""Version of the definitions and of the stored results; films with results of another version are measured again."""
Better = Literal["higher", "lower", "zero", "one", ""]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Definition of a figure."""

    group: str
    meaning: str
    better: Better = "higher"
    backbone: str = ""
    """Network it is computed with; empty if it needs none."""


GROUPS: Mapping[str, str] = {
    "prompt": "Prompt accuracy (shapes world)",
    "quarters": "Prompt accuracy from the first to the last quarter (shapes world)",
    "switch": "Across a prompt switch (shapes world)",
    "long": "Long film",
    "motion": "Motion",
    "vbench": "VBench's dimensions",
}
"""Groups of figures, in the order of the report."""

_CONSISTENCY = "Mean over frames of (likeness to the frame before + likeness to the first frame) / 2, "
_QUARTERS = ("first", "second", "third", "last")
_ATTRIBUTES = ("colour", "shape", "size", "motion", "direction", "speed", "background", "count")


def _quarters_of(name: str) -> dict[str, Figure]:
    """Figures of an attribute at both ends of a film."""
    meanings = {
        "first": f"`prompt_{name}` in shots of the first quarter of the film.",
        "last": f"`prompt_{name}` in shots of the last quarter.",
        "change": "The last quarter minus the first.",
    }
    return {
        f"prompt_{name}_{end}": Figure(group="quarters", meaning=text, better="zero" if end == "change" else "higher")
        for end, text in meanings.items()
    }


FIGURES: Mapping[str, Figure] = {
    "temporal_flickering": Figure(
        group="vbench",
        meaning="1 - mean absolute difference of consecutive frames over 255, as in VBench, which asks it of films of "
        "still scenes only: in others, motion lowers it.",
    ),
    "subject_consistency": Figure(
        group="vbench",
        meaning=_CONSISTENCY + "cosine of features, negative ones as 0.",
        backbone="DINO ViT-B/16, class token",
    ),
    "background_consistency": Figure(
        group="vbench",
        meaning=_CONSISTENCY + "cosine of features, negative ones as 0.",
        backbone="CLIP ViT-B/32, image embedding",
    ),
    "aesthetic_quality": Figure(
        group="vbench",
        meaning="Mean over frames of a linear head on the normalised image embedding, over 10.",
        backbone="CLIP ViT-L/14 with LAION's aesthetic head",
    ),
    "imaging_quality": Figure(
        group="vbench",
        meaning="Mean quality of frames, of at most 512 pixels a side, over 100.",
        backbone="MUSIQ, SPAQ",
    ),
    "motion_smoothness": Figure(
        group="vbench", meaning="How well every second frame is interpolated from its neighbours.", backbone="AMT-S"
    ),
    "dynamic_degree": Figure(
        group="vbench",
        meaning="1 if in a quarter of the frames, eight a second, the fastest 5 % of pixels move more than 6 pixels of "
        "256, cuts included.",
        backbone="RAFT, C + T",
    ),
    "overall_consistency": Figure(
        group="vbench",
        meaning="Cosine of the embeddings of prompt and of eight frames; with several shots their mean.",
        backbone="CLIP",
    ),
    "dynamic_degree_lk": Figure(
        group="motion",
        meaning="VBench's rule for dynamic degree on Lucas-Kanade flow instead of RAFT's, within shots: 1 if in a "
        "quarter of the frames the fastest 5 % of pixels move more than 6 pixels of 256. Not to be compared with "
        "VBench's.",
        better="",
    ),
    "flow_speed": Figure(
        group="motion",
        meaning="Speed of the fastest 5 % of pixels by Lucas-Kanade flow, in frame heights a second: median over the "
        "frames of a shot, mean over shots by length.",
        better="",
    ),
    "drift_colour": Figure(
        group="long",
        meaning="Distance of the mean colours of the first and the last 15 % of the film, pixels in [0, 1]. What "
        "prompts change counts too.",
        better="lower",
    ),
    "drift_contrast": Figure(
        group="long", meaning="Standard deviation of luma, last 15 % minus first 15 %.", better="zero"
    ),
    "drift_sharpness": Figure(
        group="long", meaning="Mean luma gradient a pixel, last 15 % minus first 15 %.", better="zero"
    ),
    "seam_strength": Figure(
        group="long",
        meaning="Frame difference where segments of one shot join, over that of all other frames, each at least a "
        "tenth of a level of 256; 1: not to be seen. What the encoder does at a join counts too.",
        better="one",
    ),
    "seam_strength_switch": Figure(
        group="long", meaning="The same where segments join and the prompt changes.", better="one"
    ),
    "prompt_accuracy": Figure(
        group="prompt", meaning="Share of what the prompts state, all attributes alike, that the oracle sees."
    ),
    **{
        f"prompt_accuracy_{quarter}": Figure(
            group="prompt", meaning=f"The same in shots of the {quarter} quarter of the film."
        )
        for quarter in _QUARTERS
    },
    "prompt_accuracy_change": Figure(
        group="prompt", meaning="Prompt accuracy in the last quarter minus that in the first.", better="zero"
    ),
    "prompt_colour": Figure(group="prompt", meaning="Objects of the stated colour."),
    "prompt_shape": Figure(group="prompt", meaning="Objects of the stated shape."),
    "prompt_size": Figure(
        group="prompt",
        meaning="Objects of the stated size at the start of the shot, unless they grew or shrank before.",
    ),
    "prompt_motion": Figure(group="prompt", meaning="Objects that do what is stated, of ten motions."),
    "prompt_direction": Figure(group="prompt", meaning="The same of those asked to move left, right, up or down."),
    "prompt_speed": Figure(group="prompt", meaning="Moving objects of the stated speed."),
    "prompt_background": Figure(group="prompt", meaning="Shots on the stated background."),
    "prompt_count": Figure(group="prompt", meaning="Shots with as many objects as stated."),
    "prompt_both_colours": Figure(
        group="prompt", meaning="Shots that ask for two objects and show each in its colour."
    ),
    "prompt_both_objects": Figure(
        group="prompt", meaning="Shots that ask for two objects and show each in its colour and its shape."
    ),
    **{key: figure for name in _ATTRIBUTES for key, figure in _quarters_of(name).items()},
    "switch_appears": Figure(group="switch", meaning="Changed attributes whose new value the second shot shows."),
    "kept_colour": Figure(group="switch", meaning="Objects that keep their colour if no prompt changes it."),
    "kept_shape": Figure(group="switch", meaning="Objects that keep their shape if no prompt changes it."),
    "kept_motion": Figure(group="switch", meaning="Objects that keep their motion if no prompt changes it."),
    "kept_background": Figure(group="switch", meaning="Backgrounds that stay if no prompt changes them."),
    "kept_place": Figure(group="switch", meaning="Objects that are where they were, within 0.12 heights."),
    "kept_size": Figure(group="switch", meaning="Objects as large as they were, within a factor of 1.25."),
}
"""Every figure of a film, in the order of the report."""
