"""Plans of any storyboard on any grid: frames, segments, shots and codes are accounted for one by one."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from arlon.film.geometry import GenerationDefaults, ModelGeometry
from arlon.film.plan import Plan, make_plan, resolve_storyboard
from arlon.film.prompt_schedule import code_schedule
from arlon.film.storyboard import parse_storyboard
from tests.properties.films import grids

DEFAULTS = GenerationDefaults(height=64, width=64, fps=8.0)
DURATIONS = st.one_of(
    st.floats(0.01, 60),
    st.integers(1, 500).map(lambda n: f"{n}f"),
    st.integers(1, 8).map(lambda n: f"{n} segments"),
)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """A plan of up to eight shots on any grid."""
    geometry = ModelGeometry(
        defaults=DEFAULTS,
        grid=draw(grids()),
        space_stride=8,
        patch_size=(1, 2, 2),
        code_ratio=(draw(st.integers(1, 5)), 2, 2),
        code_halo=draw(st.integers(0, 3)),
        has_codes=True,
    )
    shots: list[Any] = draw(
        st.lists(
            st.fixed_dictionaries(
                {
                    "prompt": st.sampled_from(["a", "b", "c"]),
                    "duration": DURATIONS,
                    "transition": st.sampled_from(["continue", "cut"]),
                }
            ),
            min_size=1,
            max_size=8,
        )
    )
    return make_plan(resolve_storyboard(parse_storyboard({"shots": shots}), DEFAULTS, 1), geometry)


@given(plans())
def test_every_frame_belongs_to_one_segment_and_one_shot(plan: Plan) -> None:
    by_segment = [segment.index for segment in plan.segments for _ in range(segment.num_frames)]
    by_shot = [span.shot for span in plan.shots for _ in range(span.num_frames)]
    assert len(by_segment) == len(by_shot) == plan.num_frames
    assert {segment.start_frame: segment.index for segment in plan.segments} == {
        by_segment.index(segment.index): segment.index for segment in plan.segments
    }
    assert all(span.start_frame == by_shot.index(span.shot) for span in plan.shots)
    owners = {segment.index: segment.shot for segment in plan.segments}
    assert [owners[index] for index in by_segment] == by_shot


@given(plans())
def test_takes_start_at_cuts_and_nowhere_else(plan: Plan) -> None:
    shots = plan.storyboard.shots
    takes = [span.take for span in plan.shots]
    expected = [0]
    for shot in shots[1:]:
        expected.append(expected[-1] + (shot.transition == "cut"))
    assert takes == expected
    assert [take.index for take in plan.takes] == list(range(expected[-1] + 1))
    for before, after in pairwise(plan.segments):
        same = before.take == after.take
        assert after.index_in_take == (before.index_in_take + 1 if same else 0)
        assert after.overlap == (plan.geometry.grid.overlap if same else 0)
        assert (before.ends_take, after.starts_take) == (not same, not same)
        assert before.ends_shot == (before.shot != after.shot)
    assert plan.segments[0].starts_take
    assert plan.segments[-1].ends_take
    assert plan.segments[-1].ends_shot
    assert plan.segments[0].overlap == 0


@given(plans())
def test_code_frames_add_up_and_are_there_when_a_segment_needs_them(plan: Plan) -> None:
    ratio, halo = plan.geometry.code_ratio[0], plan.geometry.code_halo
    for take in plan.takes:
        owned = {span.shot: span.num_code_frames for span in plan.shots if span.take == take.index}
        assert sum(owned.values()) == take.num_code_frames == sum(count for _, count in take.spans)
        assert dict(take.spans) == {shot: count for shot, count in owned.items() if count}
        assert sum(span.num_code_frames for span in code_schedule(plan, take).spans) == take.num_code_frames
        # A code frame covers `ratio` latent frames, and its shot is that of the segment that makes the first of them.
        maker = {}
        for segment in (segment for segment in plan.segments if segment.take == take.index):
            new = range(segment.start_latent + segment.overlap, segment.start_latent + segment.num_latents)
            maker |= dict.fromkeys(new, segment.shot)
            needed = {latent // ratio for latent in range(segment.start_latent, segment.start_latent + len(new))}
            assert segment.start_code_frame <= max(0, min(needed) - halo)
            assert max(needed) < segment.num_code_frames <= take.num_code_frames
        assert sorted(maker) == list(range(take.num_latents))
        shots = [shot for shot, count in take.spans for _ in range(count)]
        assert shots == [maker[code * ratio] for code in range(take.num_code_frames)]


@given(plans())
def test_lengths_are_rounded_to_the_nearest_segments(plan: Plan) -> None:
    grid, first_of_take = plan.geometry.grid, set[int]()
    for span, shot in zip(plan.shots, plan.storyboard.shots, strict=True):
        first = span.take not in first_of_take
        first_of_take.add(span.take)
        assert span.num_segments == sum(segment.shot == span.shot for segment in plan.segments)
        shortest = grid.segment_frames if first else grid.stride_frames
        if shot.duration.segments is not None:
            assert span.num_segments == shot.duration.segments
            assert span.num_frames == span.asked_frames
        else:
            assert span.num_frames >= shortest
            assert span.num_frames == shortest or 2 * abs(span.num_frames - span.asked_frames) <= grid.stride_frames


@given(plans(), st.integers(0, 2**31 - 1))
def test_another_seed_changes_the_seed_alone(plan: Plan, seed: int) -> None:
    other = make_plan(replace(plan.storyboard, seed=seed), plan.geometry)
    assert other.to_plain() == plan.to_plain() | {"seed": seed}
