"""The mask-strategy grammar: what is written is read, and starts snap to chunks as stated."""

from __future__ import annotations

from dataclasses import astuple

from hypothesis import given
from hypothesis import strategies as st

from arlon.diffusion.references import Placement, parse_mask_strategy, snap

placements = st.builds(
    Placement,
    segment=st.integers(0, 99),
    reference=st.integers(0, 9),
    reference_start=st.integers(-99, 99),
    target_start=st.integers(-99, 99),
    length=st.integers(1, 99),
    edit_ratio=st.floats(0, 1),
)


@given(st.lists(placements, max_size=5), st.sampled_from(["", ";", " ; "]))
def test_what_is_written_is_read_again(groups: list[Placement], end: str) -> None:
    text = ";".join(",".join(str(value) for value in astuple(group)) for group in groups) + end
    assert parse_mask_strategy(text) == tuple(groups)


@given(placements, st.integers(1, 6))
def test_fields_that_are_left_out_have_their_defaults(group: Placement, kept: int) -> None:
    text = ",".join(str(value) for value in astuple(group)[:kept])
    assert parse_mask_strategy(text) == (Placement(**dict(list(vars(group).items())[:kept])),)


@given(st.integers(0, 300), st.integers(1, 20), st.integers(1, 300))
def test_a_start_snaps_to_the_nearest_chunk_but_not_past_the_last_whole_one(value: int, step: int, limit: int) -> None:
    value = min(value, limit - 1)
    allowed = [start for start in range(0, limit, step) if start <= value or start + step <= limit]
    nearest = min(allowed, key=lambda start: (abs(start - value), start))  # a half goes down
    assert snap(value, step, limit) == nearest
    assert snap(nearest, step, limit) == nearest
