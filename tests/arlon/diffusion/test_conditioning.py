"""Frame masks of training, and sampling around given frames, against figures of the released code."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from arlon.diffusion import conditioning, flow, samplers
from arlon.diffusion.conditioning import MASK_MODES, make_frame_mask, sample_frame_masks
from tests.closeness import assert_close_to_scale

DATA = Path(__file__).parents[2] / "data"


def spelled(mask: Tensor) -> str:
    return "".join(str(int(noisy)) for noisy in mask)


def drawn_masks(mode: str, num_frames: int, count: int = 400) -> set[str]:
    generator = torch.Generator().manual_seed(0)
    return {spelled(make_frame_mask(mode, num_frames, generator)) for _ in range(count)}


@pytest.mark.parametrize("mode", [mode for mode in MASK_MODES if mode != "random"])
@pytest.mark.parametrize("num_frames", [1, 5, 15])
def test_masks_of_the_released_code_are_among_ours(mode: str, num_frames: int):
    golden = set(json.loads((DATA / "mask_generator.json").read_text())["masks"][mode][str(num_frames)])
    ours = drawn_masks(mode, num_frames)
    assert golden <= ours
    if len(ours) == 1:
        assert golden == ours


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("quarter_head", {"01111111", "00111111"}),
        ("quarter_tail", {"11111110", "11111100"}),
        ("quarter_head_tail", {"01111110", "00111100"}),
        ("quarter_random", {"1" * i + "0" * n + "1" * (8 - i - n) for n in (1, 2) for i in range(9 - n)}),
        ("image_random", {"1" * i + "0" + "1" * (7 - i) for i in range(8)}),
        ("image_head", {"01111111"}),
        ("intepolate", {"01010101", "10101010"}),
    ],
)
def test_masks_are_all_of_their_kind(mode: str, expected: set[str]):
    assert drawn_masks(mode, 8) == expected


def test_random_masks_cover_the_whole_range_of_shares():
    generator = torch.Generator().manual_seed(0)
    masks = torch.stack([make_frame_mask("random", 200, generator) for _ in range(200)])
    shares = 1 - masks.float().mean(dim=1)
    assert shares.min() > 0.02
    assert shares.max() < 0.98
    assert float(shares.mean()) == pytest.approx(0.5, abs=0.05)
    assert float(shares.std()) == pytest.approx(0.8 / 12**0.5, rel=0.15)


@pytest.mark.parametrize("mode", MASK_MODES)
@pytest.mark.parametrize("num_frames", [1, 2, 3])
def test_short_videos_always_keep_something_to_make(mode: str, num_frames: int):
    masks = drawn_masks(mode, num_frames)
    assert all("1" in mask for mask in masks)
    if num_frames == 1:
        assert masks == {"1"}
    elif mode not in ("identity", "random"):
        assert all("0" in mask for mask in masks)


def test_quarters_of_short_videos_are_one_frame_where_the_released_code_raises():
    golden = json.loads((DATA / "mask_generator.json").read_text())["quarter_head_with_3_frames"]
    assert golden.startswith("ValueError('empty range")
    assert drawn_masks("quarter_head", 3) == {"011"}
    assert drawn_masks("quarter_tail", 2) == {"10"}
    assert drawn_masks("quarter_head_tail", 3) == {"010"}
    assert drawn_masks("quarter_random", 3) == {"011", "101", "110"}


def test_modes_come_with_their_ratios():
    ratios = {"image_head": 0.3, "image_tail": 0.2}
    masks = sample_frame_masks(2000, 4, ratios, torch.Generator().manual_seed(0))
    names = [spelled(mask) for mask in masks]
    for name, share in (("0111", 0.3), ("1110", 0.2), ("1111", 0.5)):
        assert names.count(name) / 2000 == pytest.approx(share, abs=0.04)
    again = sample_frame_masks(2000, 4, ratios, torch.Generator().manual_seed(0))
    assert torch.equal(masks, again)


def test_bad_ratios_are_refused():
    with pytest.raises(ValueError, match=r"'image_haed'.*'image_head'"):
        sample_frame_masks(1, 4, {"image_haed": 0.5})
    with pytest.raises(ValueError, match="sum to more than 1"):
        sample_frame_masks(1, 4, {"image_head": 0.7, "random": 0.4})
    with pytest.raises(ValueError, match="must not be negative"):
        sample_frame_masks(1, 4, {"image_head": -0.1})
    with pytest.raises(ValueError, match="num_frames must be at least 1"):
        make_frame_mask("random", 0)


@pytest.mark.parametrize(("name", "scale", "steps"), [("mask", 5, 9), ("transform_mask", 7, 12)])
def test_sampling_with_edit_ratios_equals_the_released_code(name: str, scale: float, steps: int):
    case, inputs, masks = load_file(DATA / f"flow_sample_{name}.safetensors"), [], []
    text, null = case["in.y"], case["in.y_null"]

    def network(x: Tensor, t: Tensor, text: Tensor, frame_mask: Tensor) -> Tensor:
        time = flow.expand_time(t, x)
        mean = text.flatten(1).mean(dim=1).view(-1, 1, 1, 1, 1)
        ahead = torch.tanh(x) * (1 - time) - 0.5 * x * time + mean * torch.cos(3 * time)
        return -torch.where(flow.over_frames(frame_mask), ahead, -0.25 * ahead)

    def velocity_fn(x: Tensor, t: Tensor, frame_mask: Tensor) -> Tensor:
        inputs.append(x)
        masks.append(frame_mask)
        conditional, unconditional = network(x, t, text, frame_mask), network(x, t, null, frame_mask)
        return unconditional + scale * (conditional - unconditional)

    shift = partial(flow.shift_times, height=240, width=426, num_frames=51) if "transform" in name else None
    out = conditioning.sample_with_edits(
        velocity_fn,
        case["in.z"],
        case["in.mask"],
        samplers.make_times(steps, shift),
        lambda i: case["noise_draws"][i],
    )
    assert torch.equal(torch.stack(masks), case["steps.x_mask"][:, :2].bool())
    assert_close_to_scale(torch.stack(inputs), case["steps.z_in"][:, :2])
    assert (out - case["out"]).norm() / case["out"].norm() <= 1e-5
    kept = case["in.mask"] == 0
    torch.testing.assert_close(out.movedim(2, 1)[kept], case["in.z"].movedim(2, 1)[kept], rtol=0, atol=0)


def test_noise_is_asked_for_only_when_a_frame_joins():
    asked = []
    latent, ratio = torch.randn(1, 2, 3, 2, 2), torch.tensor([[0.0, 0.5, 1.0]])

    def draw(i: int) -> Tensor:
        asked.append(i)
        return torch.zeros_like(latent)

    conditioning.sample_with_edits(lambda x, t, mask: x, latent, ratio, samplers.make_times(4), draw)
    assert asked == [2]


def test_edits_ask_for_no_velocity_in_a_step_of_length_zero():
    latent, ratio = torch.randn(1, 2, 3, 2, 2), torch.tensor([[0.0, 0.5, 1.0]])
    noise, asked = torch.randn_like(latent), []

    def velocity_fn(x: Tensor, t: Tensor, mask: Tensor) -> Tensor:
        asked.append(float(t[0]))
        return -x

    got = conditioning.sample_with_edits(velocity_fn, latent, ratio, [1.0, 0.5, 0.5, 0.0], lambda i: noise)
    assert asked == [1.0, 0.5]
    expected = conditioning.sample_with_edits(velocity_fn, latent, ratio, [1.0, 0.5, 0.0], lambda i: noise)
    assert torch.equal(got, expected)


def test_held_frames_stay_exactly_and_the_rest_moves():
    noise, clean = torch.randn(2, 2, 4, 3, 2, 5)
    mask = torch.tensor([[False, True, True], [True, True, False]])
    start = conditioning.place_clean(noise, clean, mask)
    velocity_fn = conditioning.hold_clean(lambda x, t: noise - clean, mask)
    out = samplers.sample(velocity_fn, start, samplers.make_times(7))
    frames, given = out.movedim(2, 1), clean.movedim(2, 1)
    torch.testing.assert_close(frames[~mask], given[~mask], rtol=0, atol=0)
    assert_close_to_scale(frames[mask], given[mask])
    torch.testing.assert_close(start.movedim(2, 1)[mask], noise.movedim(2, 1)[mask], rtol=0, atol=0)


def test_bad_edit_ratios_are_refused():
    latent, times = torch.zeros(1, 2, 3, 2, 2), samplers.make_times(2)
    for ratio in (torch.zeros(1, 2), torch.full((1, 3), 1.5)):
        with pytest.raises(ValueError, match=r"edit_ratio.*\(1, 3\)"):
            conditioning.sample_with_edits(lambda x, t, m: x, latent, ratio, times, lambda i: latent)
