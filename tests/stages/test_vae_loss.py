import pytest
import torch

from stages.vae import pixel_errors


def test_chroma_ignores_grey_errors_and_counts_coloured_ones() -> None:
    video = torch.zeros(1, 3, 2, 4, 5)
    grey = pixel_errors(video + 0.5, video)
    assert {name: float(value) for name, value in grey.items()} == pytest.approx(
        {"l1": 0.5, "mse": 0.25, "chroma": 0.0}
    )
    red = video.clone()
    red[:, 0] = 0.3  # its mean over channels is 0.1: what is left is 0.2, -0.1, -0.1
    assert float(pixel_errors(red, video)["chroma"]) == pytest.approx((0.04 + 0.01 + 0.01) / 3)
    assert float(pixel_errors(red, video)["mse"]) == pytest.approx(0.03)
