import math

import pytest
import torch

from arlon.evaluation import metrics


def make_video(num_frames: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.rand(3, num_frames, 13, 17, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def drift(video: torch.Tensor, **options: int) -> metrics.FilmDrift:
    """Drift of a whole video."""
    return metrics.film_drift(metrics.frame_statistics(video), **options)


def test_psnr_of_a_constant_offset_is_closed_form():
    video = make_video()
    assert metrics.psnr(video, video + 0.02) == pytest.approx(20 * math.log10(2 / 0.02), abs=1e-4)
    assert metrics.psnr(video, video) == math.inf


def test_ssim_equals_a_naive_loop_over_windows():
    x, y = make_video(1)[0, 0].double(), make_video(1, seed=1)[0, 0].double()
    offset = torch.arange(11, dtype=torch.double) - 5
    window = torch.exp(-(offset[:, None] ** 2 + offset[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for top in range(13 - 10):
        for left in range(17 - 10):
            a, b = x[top : top + 11, left : left + 11], y[top : top + 11, left : left + 11]
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            covariance = (window * (a - mean_a) * (b - mean_b)).sum()
            c1, c2 = 0.02**2, 0.06**2
            values.append(
                (2 * mean_a * mean_b + c1)
                * (2 * covariance + c2)
                / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
            )
    assert metrics.ssim(x, y) == pytest.approx(torch.stack(values).mean().item(), abs=1e-12)
    assert metrics.ssim(x, x) == pytest.approx(1)


def test_r_squared_is_zero_for_the_channel_mean_and_pools_by_variance():
    latent = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    latent[:, 1] = latent[:, 1] * 10 + 7
    mean = latent.mean((0, 2, 3, 4), keepdim=True)
    assert metrics.r_squared(latent, latent) == 1
    assert metrics.r_squared(latent, mean.expand_as(latent)) == pytest.approx(0, abs=1e-12)
    # Shrinking the deviation by a factor a leaves (1 - a)^2 of the variance unexplained.
    assert metrics.r_squared(latent, mean + 0.7 * (latent - mean)) == pytest.approx(1 - 0.3**2)
    one_bad = latent.clone()
    one_bad[:, 1] = mean[:, 1]
    assert metrics.r_squared(latent, one_bad) < 0.1


def test_flickering_of_a_constant_step_is_closed_form():
    levels = torch.tensor([0.0, 51.0, 0.0, 51.0]) / 127.5 - 1
    video = levels.view(1, 4, 1, 1).expand(3, 4, 5, 7)
    assert metrics.temporal_flickering(video) == pytest.approx((255 - 51) / 255)
    assert metrics.temporal_flickering(torch.zeros(2, 3, 4, 5, 7)) == 1


def test_seam_strength_is_the_ratio_of_steps():
    levels = torch.tensor([0.0, 0.1, 0.2, 0.6, 0.7, 0.8, 1.2])
    video = (levels - 1).view(1, 7, 1, 1).expand(3, 7, 4, 5)
    assert metrics.seam_strength(video, [3, 6]) == pytest.approx(4, abs=1e-5)
    assert metrics.seam_strength(video, [1]) < 1


def test_a_still_film_has_a_seam_too():
    steps = torch.zeros(5)
    assert metrics.seam_ratio(steps, [3]) == 1
    steps[2] = 1 / 255
    assert metrics.seam_ratio(steps, [3]) == pytest.approx(10), "a level at the join, none elsewhere"
    assert metrics.seam_ratio(steps, [1]) == pytest.approx(metrics.STILL / (0.25 / 255))


@pytest.mark.parametrize("joins", [[], [0], [7], [1, 2, 3, 4, 5, 6]])
def test_impossible_joins_are_refused(joins):
    with pytest.raises(ValueError, match="join"):
        metrics.seam_strength(torch.zeros(3, 7, 4, 5), joins)


def test_drift_measures_a_colour_step_and_a_loss_of_contrast():
    start = make_video(1).expand(3, 5, 13, 17)
    shift = torch.tensor([0.2, 0.0, -0.1]).view(3, 1, 1, 1)
    found = drift(torch.cat([start, start + shift], 1), window=5)
    assert found.colour == pytest.approx(math.hypot(0.1, 0.05), abs=1e-6)
    assert found.contrast == pytest.approx(0, abs=1e-6)
    washed = drift(torch.cat([start, start * 0.5], 1), window=5)
    full = drift(torch.cat([start, start * 0.0], 1), window=5)
    assert washed.contrast == pytest.approx(full.contrast / 2)
    assert washed.contrast < 0


def test_entropy_of_known_distributions():
    assert metrics.unigram_entropy(torch.arange(8).view(2, 4)) == pytest.approx(math.log(8))
    assert metrics.unigram_entropy(torch.tensor([5, 5, 5])) == 0
    expected = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert metrics.unigram_entropy(torch.tensor([0, 9, 9, 9])) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.psnr(torch.zeros(2), torch.zeros(3)), r"\(2,\) and \(3,\)"),
        (lambda: metrics.temporal_flickering(torch.zeros(3, 1, 4, 4)), "at least 2 frames"),
        (lambda: metrics.temporal_flickering(torch.zeros(5, 4, 4, 3)), "expected a video"),
        (lambda: drift(torch.zeros(3, 4, 4, 4), window=3), "drift window"),
        (lambda: metrics.unigram_entropy(torch.zeros(4)), "integers"),
        (lambda: metrics.ssim(torch.zeros(5, 5), torch.zeros(5, 5)), "at least 11"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_statistics_of_frames_are_closed_form():
    ramp = torch.linspace(-1, 1, 9).view(1, 1, 1, 9).expand(3, 1, 6, 9)  # luma rises by 1/8 of the range a pixel
    flat = torch.tensor([0.5, -0.5, 0.0]).view(3, 1, 1, 1).expand(3, 1, 6, 9)
    found = metrics.frame_statistics(torch.cat([ramp, flat], 1))
    assert found.sharpness.tolist() == pytest.approx([1 / 8, 0], abs=1e-6)
    assert found.contrast.tolist() == pytest.approx([torch.linspace(0, 1, 9).std(correction=0).item(), 0], abs=1e-6)
    assert found.colour[1].tolist() == pytest.approx([0.25, -0.25, 0])


def test_statistics_of_pieces_are_those_of_the_whole():
    video = make_video(7)
    whole = metrics.frame_statistics(video)
    joined = metrics.FrameStatistics.join(
        [metrics.frame_statistics(video[:, :3]), metrics.frame_statistics(video[:, 3:])]
    )
    for name in ("colour", "contrast", "sharpness"):
        torch.testing.assert_close(getattr(joined, name), getattr(whole, name), rtol=0, atol=0)


def test_a_blurred_end_has_negative_drift_of_sharpness():
    start = make_video(1).expand(3, 5, 13, 17)
    blurred = torch.nn.functional.avg_pool2d(start, 3, stride=1, padding=1, count_include_pad=False)
    found = drift(torch.cat([start, blurred], 1), window=5)
    assert found.sharpness < -0.05
    assert drift(torch.cat([start, start], 1)).sharpness == pytest.approx(0, abs=1e-12)


def test_left_out_frames_are_neither_seam_nor_inside():
    steps = torch.tensor([1.0, 1.0, 4.0, 1.0, 50.0, 1.0])
    assert metrics.seam_ratio(steps, [3], leave_out=[5]) == pytest.approx(4)
    assert metrics.seam_ratio(steps, [3]) == pytest.approx(4 / (54 / 5))
    with pytest.raises(ValueError, match="nothing to compare"):
        metrics.seam_ratio(steps, [1, 2, 3], leave_out=[4, 5, 6])
