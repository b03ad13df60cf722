"""Scaling and cropping against a picture library and by hand."""

import numpy as np
import pytest
import torch
from PIL import Image

from arlon.data.transforms import crop_centre, plan_cover, resize_and_crop


def make_frames(num_frames: int, height: int, width: int) -> np.ndarray:
    """Noise of middle levels: no filter overshoots the range, where the library would clip between its passes."""
    return np.random.default_rng(0).integers(90, 166, (num_frames, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("filter", "resample"), [("bilinear", Image.BILINEAR), ("bicubic", Image.BICUBIC)])
@pytest.mark.parametrize(("source", "target"), [((20, 36), (10, 12)), ((9, 8), (12, 18)), ((31, 17), (16, 16))])
def test_scaling_equals_a_picture_library(filter, resample, source, target):
    frames = make_frames(2, *source)
    video = resize_and_crop(frames, height=target[0], width=target[1], filter=filter)
    scaled = plan_cover(source, target).scaled
    top, left = (scaled[0] - target[0]) // 2, (scaled[1] - target[1]) // 2
    for frame, got in zip(frames, video.unbind(1), strict=True):
        picture = np.asarray(Image.fromarray(frame).resize(scaled[::-1], resample))
        expected = torch.from_numpy(picture[top : top + target[0], left : left + target[1]].copy()).permute(2, 0, 1)
        # The library rounds to whole levels after each of its two passes.
        torch.testing.assert_close((got + 1) * 127.5, expected.float(), rtol=0, atol=1.6)


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        (
            (720, 1280),
            (256, 256),
            "1280 x 720, scaled to 455 x 256, cut to the centre 256 x 256 (44% lost at left and right)",
        ),
        (
            (1280, 720),
            (240, 426),
            "720 x 1280, scaled to 426 x 757, cut to the centre 426 x 240 (68% lost at top and bottom)",
        ),
        ((256, 300), (256, 256), "300 x 256, cut to the centre 256 x 256 (15% lost at left and right)"),
        ((128, 64), (64, 32), "64 x 128, scaled to 32 x 64"),
        ((64, 32), (64, 32), "32 x 64, used as it is"),
    ],
)
def test_what_is_done_is_said_in_words(source, target, words):
    assert plan_cover(source, target).describe() == words


def test_a_circle_stays_a_circle():
    rows, columns = np.mgrid[:90, :160]
    disc = ((rows - 44.5) ** 2 + (columns - 79.5) ** 2 <= 40**2).astype(np.uint8) * 255
    video = resize_and_crop(np.repeat(disc[None, ..., None], 3, axis=3), height=45, width=45)
    weight = (video[0, 0] + 1).double()
    spread = [
        float((weight.sum(1 - axis) * (torch.arange(45) - 22) ** 2).sum() / weight.sum()) ** 0.5 for axis in (0, 1)
    ]
    assert spread[0] == pytest.approx(spread[1], rel=0.01)
    assert spread[0] == pytest.approx(10, rel=0.02)  # a disc of radius 20 has a spread of half of it on every axis


def test_centre_is_cut_by_hand():
    video = torch.arange(5 * 7).reshape(1, 5, 7)
    assert torch.equal(crop_centre(video, height=3, width=3), video[:, 1:4, 2:5])
    assert torch.equal(crop_centre(video, height=4, width=6), video[:, 0:4, 0:6])
    with pytest.raises(ValueError, match=r"\(6, 7\).*\(5, 7\)"):
        crop_centre(video, height=6, width=7)


def test_sizes_that_are_not_positive_are_refused():
    with pytest.raises(ValueError, match="height and width must be positive"):
        resize_and_crop(make_frames(1, 4, 4), height=0, width=4)
