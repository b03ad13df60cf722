"""Rules against the same arithmetic written out, and against PIL."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from arlon.evaluation.vbench import rules as vbench
from tests.arlon.evaluation.conftest import frames


def test_the_fastest_pixels_are_the_top_twentieth():
    flow = torch.zeros(1, 2, 10, 10)
    flow[0, :, 0, 0] = torch.tensor([3.0, 4.0])
    flow[0, 1, 0, 1:5] = 2.0
    flow[0, 0, 1] = 1.0
    assert vbench.fastest_pixels(flow).item() == pytest.approx((5 + 4 * 2) / 5)


@pytest.mark.parametrize(
    ("moving", "fps", "expected"),
    [(4, 8.0, True), (3, 8.0, False), (16, 4.0, False), (4, 24.0, True)],
)
def test_a_film_is_dynamic_if_a_quarter_of_its_frames_move(moving, fps, expected):
    pixels = torch.cat([torch.full((moving,), 6.1), torch.zeros(15)])[:15]
    assert vbench.is_dynamic(pixels, (256, 300), fps=fps, num_frames=16) is expected


def test_motion_is_looked_at_eight_times_a_second():
    assert [vbench.flow_stride(fps) for fps in (4, 8, 12, 24, 30)] == [1, 1, 2, 3, 4]


def test_consistency_is_that_of_a_naive_loop():
    features = torch.randn(6, 5, dtype=torch.double)
    total = 0.0
    for i in range(1, 6):
        cosines = [float(features[i] @ features[j] / (features[i].norm() * features[j].norm())) for j in (i - 1, 0)]
        total += sum(max(0.0, cosine) for cosine in cosines) / 2
    assert vbench.consistency(features) == pytest.approx(total / 5)
    assert vbench.consistency(torch.ones(4, 3)) == pytest.approx(1)
    assert not math.isnan(vbench.consistency(torch.ones(1, 3)))


def test_pictures_are_scaled_as_a_reference_scales_them():
    """Enlarging needs no anti-aliasing, so that PIL's bilinear filter is the truth, up to its rounding."""
    picture = frames(1, 20, 30)[0]
    expected = np.asarray(Image.fromarray(picture).resize((48, 32), Image.Resampling.BILINEAR)) / 255
    found = vbench.prepare_pictures(picture[None], "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), side=32)[0]
    np.testing.assert_allclose(found.permute(1, 2, 0).numpy(), expected, atol=1.5 / 255)


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(110, 110, (224, 224)), (20, 90, (224, 1008)), (90, 20, (1008, 224)), (100, 103, (224, 230))],
)
def test_pictures_have_the_size_and_the_middle_that_torchvision_gives_them(height, width, size):
    """int(224 * long / short), which 224 / short in floating point misses; round((long - side) / 2)."""
    found = vbench.prepare_pictures(frames(1, height, width), "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert found.shape[-2:] == size
    row = torch.arange(227.0).expand(1, 3, 224, 227)
    assert vbench.centre(row, 224)[0, 0, 0, 0] == 2


def test_what_bicubic_filtering_adds_at_edges_stays():
    step = np.zeros((1, 16, 16, 3), np.uint8)
    step[:, :, 8:] = 255
    found = vbench.prepare_pictures(step, "bicubic", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), side=32)
    expected = nn.functional.interpolate(
        torch.from_numpy(step).permute(0, 3, 1, 2) / 255, size=(32, 32), mode="bicubic"
    )
    torch.testing.assert_close(found, expected)
    assert found.min() < 0
    assert found.max() > 1
