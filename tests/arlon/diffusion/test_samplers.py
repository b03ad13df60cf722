"""Sampling against closed forms and figures of the released code; noise by address."""

import hashlib
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from arlon.diffusion import flow, samplers
from arlon.diffusion.guidance import guide
from tests.closeness import assert_close_to_scale

DATA = Path(__file__).parents[2] / "data"


def released_network(seen: list[Tensor]):
    """The stand-in network of the golden files in our convention; records its input."""

    def model(x: Tensor, t: Tensor, text: Tensor, text_mask: Tensor | None = None) -> Tensor:
        seen.append(x)
        t = flow.expand_time(t, x)
        mean = text.flatten(1).mean(dim=1).view(-1, 1, 1, 1, 1)
        return -(torch.tanh(x) * (1 - t) - 0.5 * x * t + mean * torch.cos(3 * t))

    return model


SHIFTS = {
    "plain": None,
    "transform": partial(flow.shift_times, height=240, width=426, num_frames=51),
    "discrete": lambda t: torch.round(1000 * t) / 1000,
}


@pytest.mark.parametrize(("name", "scale", "steps"), [("plain", 4, 10), ("transform", 7, 12), ("discrete", 3, 7)])
def test_guided_sampling_equals_the_released_code(name: str, scale: float, steps: int):
    case, seen = load_file(DATA / f"flow_sample_{name}.safetensors"), []
    velocity_fn = guide(released_network(seen), case["in.y"][:, 0], case["in.y_null"][:, 0], guidance_scale=scale)
    times = samplers.make_times(steps, SHIFTS[name])
    assert_close_to_scale(1000 * times[:-1], case["steps.t"][:, 0])
    out = samplers.sample(velocity_fn, case["in.z"], times)
    assert_close_to_scale(torch.stack(seen), case["steps.z_in"])
    assert (out - case["out"]).norm() / case["out"].norm() <= 1e-5


def test_straight_flow_is_exact_in_any_number_of_steps():
    clean, noise = torch.randn(2, 3, 4, 2, 2, 2)
    for steps in (1, 3, 10):
        got = samplers.sample(lambda x, t: noise - clean, noise, samplers.make_times(steps))
        assert_close_to_scale(got, clean)


def test_euler_converges_to_the_exponential_at_first_order():
    x = torch.tensor([[2.0]])
    errors = [
        abs(float(samplers.sample(lambda x, t: x, x, samplers.make_times(n))) - 2 * math.exp(-1)) for n in (20, 40)
    ]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)


def test_time_reaches_the_model_once_a_sample_and_the_callback_sees_every_step():
    times, progress = [], []

    def velocity_fn(x: Tensor, t: Tensor) -> Tensor:
        times.append(t.clone())
        return torch.ones_like(x, dtype=torch.bfloat16)

    out = samplers.sample(
        velocity_fn,
        torch.zeros(3, 2),
        samplers.make_times(4),
        callback=lambda i, n, x: progress.append((i, n)),
    )
    torch.testing.assert_close(torch.stack(times), torch.tensor([1, 0.75, 0.5, 0.25])[:, None].expand(4, 3))
    assert progress == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert out.dtype == torch.float32


def test_times_fall_from_one_to_zero():
    times = samplers.make_times(30, partial(flow.shift_times, height=64, width=64, num_frames=8))
    assert times[0] == 1
    assert times[-1] == 0
    assert (times.diff() < 0).all()


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_times_of_any_kind_are_taken(kind: type):
    got = samplers.sample(lambda x, t: -x, torch.ones(1, 2), kind([1.0, 0.75, 0.0]))
    torch.testing.assert_close(got, torch.full((1, 2), 1.25 * 1.75))
    assert samplers.check_times([1, 0]).is_floating_point()


def test_a_step_of_length_zero_does_nothing():
    asked: list[float] = []
    steps: list[int] = []

    def velocity_fn(x: Tensor, t: Tensor) -> Tensor:
        asked.append(float(t[0]))
        return -x

    got = samplers.sample(
        velocity_fn, torch.ones(1, 2), [1.0, 0.5, 0.5, 0.0], callback=lambda done, total, x: steps.append(done)
    )
    assert torch.equal(got, samplers.sample(lambda x, t: -x, torch.ones(1, 2), [1.0, 0.5, 0.0]))
    assert asked == [1.0, 0.5]
    assert steps == [1, 2, 3]
    with pytest.raises(ValueError, match="must fall"):
        samplers.check_times([1.0, 0.5, 0.6, 0.0])
    with pytest.raises(ValueError, match="must fall"):
        samplers.check_times([1.0, float("nan"), 0.0])


def test_bad_times_and_solvers_are_refused():
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=r"unknown solver 'hun', did you mean 'heun'\?"):
        samplers.sample(lambda x, t: x, x, samplers.make_times(2), solver="hun")
    with pytest.raises(ValueError, match="must fall"):
        samplers.sample(lambda x, t: x, x, torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="at least one step"):
        samplers.sample(lambda x, t: x, x, torch.tensor([1.0]))
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        samplers.make_times(0)
    with pytest.raises(ValueError, match="must return the shape of x"):
        samplers.sample(lambda x, t: x[:, :1], x, samplers.make_times(2))


def test_noise_depends_on_its_address_alone():
    one = samplers.draw_noise((2, 3), 42, "refine", 7, 0)
    torch.manual_seed(1)
    torch.randn(5)
    torch.testing.assert_close(samplers.draw_noise((2, 3), 42, "refine", 7, 0), one, rtol=0, atol=0)
    others = [
        (42, "refine", 7, 1),
        (42, "refine", 70),
        (42, "refine", "7", 0),
        (43, "refine", 7, 0),
        (42, "coarse", 7, 0),
    ]
    seeds = {samplers.address_seed(*address) for address in [*others, (42, "refine", 7, 0)]}
    assert len(seeds) == 6


def test_address_seed_is_what_is_documented():
    digest = hashlib.sha256(b'[42,"refine",7]').hexdigest()
    assert samplers.address_seed(42, "refine", 7) == int(digest[:16], 16) >> 1


def test_noise_leaves_the_global_generator_alone_and_is_normal():
    state = torch.get_rng_state()
    noise = samplers.draw_noise((100, 100), 0, "noise")
    assert torch.equal(torch.get_rng_state(), state)
    assert abs(float(noise.mean())) < 0.03
    assert abs(float(noise.std()) - 1) < 0.03
    half = samplers.draw_noise((100, 100), 0, "noise", dtype=torch.bfloat16)
    torch.testing.assert_close(half, noise.to(torch.bfloat16), rtol=0, atol=0)


@pytest.mark.parametrize("part", [1.0, True, None, ("a",)])
def test_addresses_of_other_kinds_are_refused(part: object):
    with pytest.raises(TypeError, match="int and str only"):
        samplers.address_seed(1, part)
