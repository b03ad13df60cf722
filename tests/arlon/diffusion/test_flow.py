"""The noise convention, the loss and the times, against closed forms and figures of the released code."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from arlon.diffusion import flow
from tests.closeness import assert_close_to_scale

DATA = Path(__file__).parents[2] / "data"


def analytic_velocity(x: Tensor, t: Tensor, text: Tensor, frame_mask: Tensor | None = None) -> Tensor:
    """The stand-in network of the golden files, in our sign: it predicts noise - clean."""
    t = flow.expand_time(t, x)
    mean = text.flatten(1).mean(dim=1).view(-1, 1, 1, 1, 1)
    ahead = torch.tanh(x) * (1 - t) - 0.5 * x * t + mean * torch.cos(3 * t)
    return -ahead if frame_mask is None else -torch.where(flow.over_frames(frame_mask), ahead, -0.25 * ahead)


def test_velocity_is_the_time_derivative():
    clean, noise = torch.randn(2, 2, 3, dtype=torch.double)
    t, h = torch.rand(2, dtype=torch.double), 1e-6
    slope = (flow.add_noise(clean, noise, t + h) - flow.add_noise(clean, noise, t - h)) / (2 * h)
    assert_close_to_scale(slope, flow.velocity_target(clean, noise), relative=1e-6)


def test_time_one_is_noise_and_time_zero_is_data():
    clean, noise = torch.randn(2, 3, 4, 2, 2, 2)
    torch.testing.assert_close(flow.add_noise(clean, noise, torch.ones(3)), noise, rtol=0, atol=0)
    torch.testing.assert_close(flow.add_noise(clean, noise, torch.zeros(3)), clean, rtol=0, atol=0)


def test_loss_equals_the_released_code():
    case = load_file(DATA / "flow_training_loss.safetensors")
    clean, noise, t, mask = case["in.x0"], case["in.noise"], case["in.t"] / 1000, case["in.mask"].bool()
    target = flow.velocity_target(clean, noise)
    noisy = flow.add_noise(clean, noise, t)
    assert_close_to_scale(noisy, case["add_noise"])
    loss = flow.flow_loss(analytic_velocity(noisy, t, case["in.y"]), target)
    torch.testing.assert_close(loss, case["loss_nomask"], rtol=1e-5, atol=0)

    partly = flow.add_noise(clean, noise, t, mask)
    assert_close_to_scale(partly, case["x_t_masked"])
    masked = flow.flow_loss(analytic_velocity(partly, t, case["in.y"], mask), target, mask)
    torch.testing.assert_close(masked, case["loss_mask"], rtol=1e-5, atol=0)


def test_masked_loss_is_the_mean_over_noisy_frames():
    velocity, target = torch.randn(2, 2, 3, 4, 2, 5)
    mask = torch.tensor([[True, False, True, False], [False] * 4])
    loss = flow.flow_loss(velocity, target, mask)
    expected = (velocity[0][:, [0, 2]] - target[0][:, [0, 2]]).square().mean()
    torch.testing.assert_close(loss, torch.stack((expected, torch.zeros(()))))


def test_shift_equals_the_released_code():
    table = json.loads((DATA / "flow_timestep_transform.json").read_text())
    t = torch.tensor(table["t"]) / 1000
    rows = [row for row in table["rows"] if not 2 <= row["num_frames"] <= 16]  # there the original is NaN
    assert {1, 17, 50, 51} <= {row["num_frames"] for row in rows}
    for row in rows:
        sizes = {name: row[name] for name in ("height", "width", "num_frames")}
        got = 1000 * flow.shift_times(t, **sizes)
        assert_close_to_scale(got, torch.tensor(row["out"]))
    doubled = 1000 * flow.shift_times(t, height=240, width=426, num_frames=51, scale=2)
    expected = torch.tensor(table["transform_scale_2_240x426x51"])
    assert_close_to_scale(doubled, expected)


def test_short_videos_are_shifted_where_the_released_code_gives_zeros_and_nan():
    table = json.loads((DATA / "flow_timestep_transform.json").read_text())
    rows = [row for row in table["rows"] if 2 <= row["num_frames"] <= 16]
    assert rows
    for row in rows:
        assert row["out"][:-1] == [0.0] * (len(table["t"]) - 1)
        assert math.isnan(row["out"][-1])
        sizes = {name: row[name] for name in ("height", "width", "num_frames")}
        got = flow.shift_times(torch.tensor(table["t"]) / 1000, **sizes)
        assert (got.diff() > 0).all()
        assert (got[0], got[-1]) == (0, 1)


def test_half_precision_sizes_do_not_overflow_where_the_released_code_gives_nan():
    t, height, width = (torch.tensor([value], dtype=torch.float16) for value in (0.5, 480, 854))
    released = (height * width / 512**2).sqrt() * 10**0.5
    assert torch.isinf(released)
    assert torch.isnan(released * t / (1 + (released - 1) * t))
    got = flow.shift_times(t, height=height, width=width, num_frames=torch.full((1,), 34, dtype=torch.float16))
    ratio = math.sqrt(480 * 854 / 512**2 * 10)
    torch.testing.assert_close(got, torch.tensor([ratio * 0.5 / (1 + (ratio - 1) * 0.5)]), rtol=1e-5, atol=0)


def test_schedules_equal_the_released_code():
    table = json.loads((DATA / "flow_timestep_transform.json").read_text())["schedules"]
    assert table
    for name, expected in table.items():
        size, steps = name.split("/")
        height, width, num_frames = map(int, size.split("x"))
        t = 1 - torch.arange(int(steps)) / int(steps)
        got = 1000 * flow.shift_times(t, height=height, width=width, num_frames=num_frames)
        assert_close_to_scale(got, torch.tensor(expected))


@pytest.mark.parametrize(
    ("num_frames", "latent_frames"),
    [(1, 1), (2, 1), (5, 2), (16, 4), (17, 5), (33, 5), (34, 10), (50, 10), (51, 15)],
)
def test_shift_of_any_length_is_finite_and_as_stated(num_frames: int, latent_frames: int):
    ratio = math.sqrt(64 * 96 / 512**2 * latent_frames)
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.double)
    got = flow.shift_times(t, height=64, width=96, num_frames=num_frames)
    torch.testing.assert_close(got, ratio * t / (1 + (ratio - 1) * t), rtol=1e-6, atol=0)
    assert got[0] == 0
    assert got[2] == 1


def test_shift_takes_a_size_a_sample():
    t, height = torch.tensor([0.4, 0.4]), torch.tensor([64.0, 512.0])
    got = flow.shift_times(t, height=height, width=512, num_frames=torch.tensor([51, 3]))
    alone = [flow.shift_times(t[:1], height=h, width=512, num_frames=f) for h, f in ((64, 51), (512, 3))]
    torch.testing.assert_close(got, torch.cat(alone))


def test_shift_refuses_sizes_that_are_not_positive():
    with pytest.raises(ValueError, match="num_frames must be positive, got 0"):
        flow.shift_times(torch.rand(2), height=64, width=64, num_frames=0)


def test_shift_takes_a_plain_number():
    size = {"height": 64, "width": 96, "num_frames": 51}
    got = flow.shift_times(0.3, **size)
    assert torch.equal(got, flow.shift_times(torch.tensor([0.3]), **size)[0])
    assert flow.shift_times(1, **size) == 1


def test_a_schedule_meets_samples_of_several_sizes_only_along_axes_of_its_own():
    t, height = torch.linspace(1, 0, 5), torch.tensor([64.0, 512.0])
    message = r"t \(5,\) and sizes .* height \(2,\), width \(\), num_frames \(2,\).*as \(B, 1\)"
    with pytest.raises(ValueError, match=message):
        flow.shift_times(t, height=height, width=512, num_frames=torch.tensor([51, 51]))
    got = flow.shift_times(t, height=height[:, None], width=512, num_frames=51)
    alone = [flow.shift_times(t, height=h, width=512, num_frames=51) for h in (64, 512)]
    torch.testing.assert_close(got, torch.stack(alone))


def test_logit_normal_times_equal_the_released_code():
    case = json.loads((DATA / "flow_logit_normal.json").read_text())
    times = flow.logit_normal_times(case["n"], generator=torch.Generator().manual_seed(case["seed"]))
    torch.testing.assert_close(times[:8], torch.tensor(case["first8"]), rtol=1e-5, atol=0)
    assert float(times.mean()) == pytest.approx(case["mean"], rel=1e-5)
    for level, value in case["quantiles"].items():
        assert float(times.quantile(float(level))) == pytest.approx(value, rel=1e-5)


def test_times_follow_their_generator():
    for draw in (flow.uniform_times, flow.logit_normal_times):
        one, two = (draw(5, generator=torch.Generator().manual_seed(7)) for _ in range(2))
        torch.testing.assert_close(one, two, rtol=0, atol=0)
        assert 0 <= one.min() < one.max() < 1


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="one flow time a sample"):
        flow.add_noise(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="must have one shape"):
        flow.flow_loss(torch.zeros(1, 4, 2, 2, 2), torch.zeros(1, 8, 2, 2, 2))
