"""Arithmetic of segments and chunks, for any grid: held against lists of frames that are cut by hand."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from arlon.grids import SegmentGrid, ceil_div, code_grid, num_latent_frames, num_pixel_frames
from tests.properties.films import grids


@given(grids(), st.integers(1, 30))
def test_segments_cover_a_take_and_overlap_by_what_is_carried_over(grid: SegmentGrid, num_segments: int) -> None:
    slices = [grid.segment_slice(index) for index in range(num_segments)]
    assert slices[0].start == 0
    assert slices[-1].stop == grid.take_latents(num_segments)
    assert all(piece.stop - piece.start == grid.segment for piece in slices)
    assert all(before.stop - after.start == grid.overlap for before, after in pairwise(slices))


@given(grids(), st.integers(1, 30))
def test_frames_and_latent_frames_of_a_take_agree(grid: SegmentGrid, num_segments: int) -> None:
    frames, latents = grid.take_frames(num_segments), grid.take_latents(num_segments)
    assert num_latent_frames(frames, grid.chunk_frames, grid.time_stride) == latents
    assert num_pixel_frames(latents, grid.chunk_frames, grid.time_stride) == frames


@given(st.integers(1, 2000), st.integers(1, 20), st.integers(1, 6))
def test_a_latent_frame_stands_for_at_most_its_stride(num_frames: int, chunk: int, stride: int) -> None:
    frames = list(range(num_frames))
    chunks = [frames[start : start + chunk] for start in range(0, num_frames, chunk)]
    latents = num_latent_frames(num_frames, chunk, stride)
    assert latents == sum(len(range(0, len(part), stride)) for part in chunks)
    assert num_frames <= num_pixel_frames(latents, chunk, stride) < num_frames + max(stride, chunk)


@given(grids(), st.integers(1, 5000), st.booleans())
def test_no_other_number_of_segments_comes_nearer(grid: SegmentGrid, asked: int, first: bool) -> None:
    def frames(num_segments: int) -> int:
        return grid.take_frames(num_segments) if first else num_segments * grid.stride_frames

    found = grid.num_segments_for(asked, first=first)
    others = [n for n in (found - 1, found + 1) if n >= 1]
    assert found >= 1
    assert all(abs(frames(found) - asked) <= abs(frames(n) - asked) for n in others)


sizes = st.tuples(*[st.integers(1, 99)] * 3)


@given(sizes, sizes)
def test_codes_cover_the_latent_grid_and_not_one_is_idle(
    grid: tuple[int, int, int], ratio: tuple[int, int, int]
) -> None:
    for codes, size, step in zip(code_grid(grid, ratio), grid, ratio, strict=True):
        assert (codes - 1) * step < size <= codes * step


@given(st.integers(-(10**30), 10**30), st.integers(1, 10**15))
def test_division_rounds_up_whatever_the_size(a: int, b: int) -> None:
    quotient = ceil_div(a, b)
    assert quotient * b >= a > (quotient - 1) * b
