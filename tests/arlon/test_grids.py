import itertools
import json
import re
from pathlib import Path

import pytest

from arlon import grids

DATA = Path(__file__).parents[1] / "data"


def test_latent_sizes_equal_the_original() -> None:
    cases = json.loads((DATA / "vae_latent_sizes.json").read_text())
    assert len(cases) > 10
    for name, (expected, _, _) in cases.items():
        chunk, frames = re.fullmatch(r"mf=(\w+),T=(\d+)", name).groups()
        assert grids.num_latent_frames(int(frames), None if chunk == "None" else int(chunk)) == expected, name


@pytest.mark.parametrize(("frames", "latents"), [(17, 5), (34, 10), (1, 1), (32, 9), (18, 6), (51, 15)])
def test_pixel_frames_hold_at_least_what_was_encoded(frames: int, latents: int) -> None:
    assert grids.num_latent_frames(frames) == latents
    assert frames <= grids.num_pixel_frames(latents) < frames + 4


def test_eleven_segments_of_the_paper_give_578_frames() -> None:
    grid = grids.SegmentGrid(segment=20, overlap=5)
    assert (grid.segment_frames, grid.stride_frames) == (68, 51)
    assert grid.take_frames(11) == 578
    assert grids.num_latent_frames(578) == grid.take_latents(11)


def test_segments_tile_a_take_with_the_overlap_between_them() -> None:
    grid = grids.SegmentGrid(segment=15, overlap=5)
    slices = [grid.segment_slice(k) for k in range(4)]
    assert slices[-1].stop == grid.take_latents(4)
    for before, after in itertools.pairwise(slices):
        assert before.stop - after.start == grid.overlap


def test_durations_round_to_the_nearest_segment() -> None:
    grid = grids.SegmentGrid()
    assert [grid.num_segments_for(n, first=True) for n in (1, 51, 67, 69, 119)] == [1, 1, 1, 2, 3]
    assert [grid.num_segments_for(n, first=False) for n in (1, 34, 50, 52, 68)] == [1, 1, 1, 2, 2]


def test_overlap_off_the_chunk_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 5"):
        grids.SegmentGrid(segment=15, overlap=4)


@pytest.mark.parametrize("overlap", [0, 10, 15])
def test_overlap_that_the_segment_before_cannot_give_is_refused(overlap: int) -> None:
    with pytest.raises(ValueError, match="overlap <= segment / 2"):
        grids.SegmentGrid(segment=15, overlap=overlap)
    assert grids.SegmentGrid(segment=20, overlap=10).stride == 10


def test_code_grid_rounds_up() -> None:
    assert grids.code_grid((15, 8, 8), (2, 2, 2)) == (8, 4, 4)
