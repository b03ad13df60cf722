"""Strategies: grids, durations, shots and storyboards of any allowed form."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from arlon.film.storyboard import parse_storyboard
from arlon.film.storyboard_values import MAX_BLEND, MAX_DURATION_S, MAX_DURATION_SEGMENTS, MAX_FPS, MAX_SEED
from arlon.grids import SegmentGrid, ceil_div


@st.composite
def grids(draw: st.DrawFn) -> SegmentGrid:
    """Segments of up to 12 chunks, of which at most half are carried over; chunks of up to 20 frames."""
    chunk_frames, stride = draw(st.integers(1, 20)), draw(st.integers(1, 6))
    chunks = draw(st.integers(2, 12))
    carried = draw(st.integers(1, chunks // 2))
    latents = ceil_div(chunk_frames, stride)
    return SegmentGrid(
        segment=chunks * latents, overlap=carried * latents, chunk_frames=chunk_frames, time_stride=stride
    )


numbers = st.floats(0, 100, allow_subnormal=False)
texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=40)
names = st.from_regex(r"[a-z]{1,8}\.(png|mp4)", fullmatch=True)
prompts = st.lists(st.from_regex(r"[a-zA-Z0-9 ,.:'-]{1,12}", fullmatch=True), min_size=1, max_size=5).map(
    lambda words: "a " + " ".join(words)
)
durations = st.one_of(
    st.floats(1e-3, MAX_DURATION_S),
    st.integers(1, int(MAX_DURATION_S)),
    st.integers(1, int(MAX_DURATION_S * MAX_FPS)).map(lambda n: f"{n}f"),
    st.integers(1, MAX_DURATION_SEGMENTS).map(lambda n: f"{n} segments"),
)


def optional(**values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Any of the keys, each with a value of its strategy."""
    return st.fixed_dictionaries({}, optional=values)


@st.composite
def shots(draw: st.DrawFn) -> dict[str, Any]:
    """A shot in plain values."""
    plain = {"prompt": draw(prompts)} | draw(
        optional(
            duration=durations,
            transition=st.sampled_from(["continue", "cut"]),
            blend=st.integers(0, MAX_BLEND),
            seed=st.integers(0, MAX_SEED),
            guidance_scale=numbers,
            image=names,
            end_image=names,
            video=names,
            references=st.lists(names, min_size=1, max_size=3),
            camera_motion=st.sampled_from(["pan left", "zoom in"]),
            notes=texts,
        )
    )
    if plain.get("blend") and plain.get("transition") == "cut":
        del plain["blend"]  # behind a cut there is nothing to blend with
    if "references" in plain:
        plain |= draw(optional(mask_strategy=st.sampled_from(["0", "0;1,0,-5,0,5,0.5"])))
    return plain


films = st.fixed_dictionaries(
    {"shots": st.lists(shots(), min_size=1, max_size=4)},
    optional={
        "seed": st.integers(0, MAX_SEED),
        "fps": st.floats(1, MAX_FPS),
        "height": st.integers(2, 8192),
        "width": st.integers(2, 8192),
        "model": prompts,
        "negative_prompt": prompts,
        "guidance_scale": numbers,
        "num_inference_steps": st.integers(1, 1000),
        "aspect": st.sampled_from(["9:16", "square", "landscape"]),
        "resolution": st.sampled_from(["240p", "480p"]),
        "use_codes": st.booleans(),
        "segment": st.integers(1, 100),
        "overlap": st.integers(1, 100),
        "aesthetic_score": numbers,
        "motion_score": numbers,
        "camera_motion": st.sampled_from(["pan left", "zoom in"]),
    },
)
"""Storyboards in plain values, all of which can be read."""

storyboards = films.map(parse_storyboard)
