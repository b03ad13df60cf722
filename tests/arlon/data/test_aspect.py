"""Sizes by name against the tables of the released code."""

import json
from pathlib import Path

import pytest

from arlon.data import aspect
from arlon.data.aspect import fit_frame, frame_size

DATA = Path(__file__).parents[2] / "data"
GOLDEN = json.loads((DATA / "buckets.json").read_text())


def test_tables_equal_the_released_code():
    for name, table in GOLDEN["tables"].items():
        assert aspect.PIXEL_BUDGETS[name] == table["pixels"]
        assert {ratio: list(size) for ratio, size in aspect.SIZE_TABLES[name].items()} == table["sizes"]
    assert aspect.SIZE_TABLES.keys() == GOLDEN["tables"].keys()
    assert GOLDEN["aspect_map"] == aspect.ASPECTS
    assert GOLDEN["num_frames_map"] == aspect.NUM_FRAMES


@pytest.mark.parametrize(("names", "size"), GOLDEN["get_image_size"].items())
def test_sizes_by_name_equal_the_released_code(names: str, size: list[int]):
    assert list(frame_size(*names.split(","))) == size


def test_nearest_ratio_equals_the_released_code():
    table = aspect.SIZE_TABLES["480p"]
    for height, width, ratio in GOLDEN["closest_ratio_480p"]:
        if not min(map(float, table)) <= height / width <= max(map(float, table)):  # there the released code stretches
            with pytest.raises(ValueError, match="480p"):
                frame_size("480p", f"{height}:{width}")
        else:
            assert frame_size("480p", f"{height}:{width}") == table[ratio]


def test_portrait_is_landscape_turned():
    assert frame_size("720p", "9:16") == frame_size("720p", "landscape") == (720, 1280)
    assert frame_size("720p", "16:9") == frame_size("720p", "portrait") == (1280, 720)
    assert frame_size("240p", "square") == (320, 320)


def test_other_aspects_get_the_nearest_size():
    assert frame_size("512", "9:16") == aspect.SIZE_TABLES["512"]["0.57"]  # the released code has no 9:16 there
    assert frame_size("480p", "25:12") == frame_size("480p", "50:27") == (924, 444)
    assert frame_size("1024", "1:4") == (512, 2048)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"'481p'.*'480p'"):
        frame_size("481p", "9:16")
    for bad in ("wide", "16:0", "16", "1:2:3"):
        with pytest.raises(ValueError, match=f"unknown aspect '{bad}': give height:width such as 9:16"):
            frame_size("480p", bad)
    with pytest.raises(ValueError, match=r"'1:4'.*0\.25.*480p.*0\.38.*2\.08"):
        frame_size("480p", "1:4")


@pytest.mark.parametrize(("width", "released", "made"), [(854, 848, 856), (426, 424, 432), (652, 648, 656)])
def test_widths_are_delivered_whole_where_the_released_code_shrinks_them(width: int, released: int, made: int):
    assert width // 8 * 8 == released
    fit = fit_frame(480, width, 8)
    assert (fit.height, fit.width, fit.made_height, fit.made_width) == (480, width, 480, made)
    assert fit.describe() == f"made at {made} x 480, cut to {width} x 480 (width x height)"


def test_latents_of_the_released_code_hold_less_than_the_frame():
    released = json.loads((DATA / "vae_latent_sizes.json").read_text())["mf=17,T=51"]  # of 240 x 426 pixels
    fit = fit_frame(240, 426, 8)
    assert 8 * released[2] == 424
    assert fit.made_width == 8 * (released[2] + 1) >= fit.width
    assert fit.made_height == 8 * released[1]


def test_sizes_that_fit_are_made_as_they_are():
    fit = fit_frame(720, 1280, 8)
    assert fit.is_exact
    assert fit.describe() == "1280 x 720"
    with pytest.raises(ValueError, match="must be positive, got 0, 8 and 8"):
        fit_frame(0, 8, 8)
