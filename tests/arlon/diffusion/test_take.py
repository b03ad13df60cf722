"""Takes from the base model alone, against a literal restatement of the released loop."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from arlon.diffusion import flow, samplers
from arlon.diffusion.references import parse_mask_strategy
from arlon.diffusion.take import sample_take
from tests.closeness import assert_close_to_scale

SHAPE = (2, 4, 15, 2, 3)
STEPS = 6


def draw(segment: int, index: int) -> Tensor:
    return samplers.draw_noise(SHAPE, 0, segment, index)


def predict(z: Tensor, t: Tensor, active: Tensor, segment: int) -> Tensor:
    """A stand-in network in the released sign and scale: clean - noise at t in 0..1000; looks across frames."""
    u = (t / 1000).view(-1, 1, 1, 1, 1)
    across = z.mean(dim=2, keepdim=True)
    return torch.tanh(z) * (1 - u) - 0.5 * z * u + 0.3 * across + 0.1 * segment + 0.2 * flow.over_frames(active)


def velocity_for(segment: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda x, t, mask: -predict(x, 1000 * t, mask, segment)


def released_loop(
    num_loops: int, length: int, edit: float, refs: list[list[Tensor]], strategies: list[str], reencode: Callable
) -> Iterator[Tensor]:
    """Open-Sora's loop as its description reads: lists that grow, whole clips encoded anew, times in 0..1000."""
    previous = torch.empty(0)
    for k in range(num_loops):
        z = draw(k, 0).clone()
        if k > 0:
            for i, clip in enumerate(reencode(previous)):
                refs[i].append(clip)
                group = f"{k},{len(refs[i]) - 1},-{length},0,{length},{edit}"
                strategies[i] += ";" + group if strategies[i] else group
        m = torch.ones(z.shape[0], z.shape[2])
        for i, strategy in enumerate(strategies):
            for group in filter(None, strategy.split(";")):
                values = [float(v) for v in group.split(",")]
                values += [0, 0, 0, 0, 1, 0][len(values) :]
                loop, ref, start, target, count = map(int, values[:5])
                if loop != k:
                    continue
                clip = refs[i][ref]
                start, target = start + clip.shape[1] * (start < 0), target + z.shape[2] * (target < 0)
                for place in range(min(count, z.shape[2] - target, clip.shape[1] - start)):
                    z[i, :, target + place] = clip[:, start + place]
                    m[i, target + place] = values[5]
        clean, was_active = z.clone(), m == 1
        for step in range(STEPS):
            t, t_next = (1000 * (1 - s / STEPS) for s in (step, step + 1))
            active = 1000 * m >= t
            joins = flow.over_frames(active & ~was_active)
            z = torch.where(joins, (1 - t / 1000) * clean + t / 1000 * draw(k, step + 1), z)
            moved = z + predict(z, torch.full((2,), t), active, k) * (t - t_next) / 1000
            z = torch.where(flow.over_frames(active), moved, z)
            was_active = active
        previous = z
        yield z if k == 0 else z[:, :, length:]


def blurred(latent: Tensor) -> Tensor:
    """Stands for decoding and encoding: changes values, frame by frame."""
    return latent * 0.9 + 0.05


@pytest.mark.parametrize(("overlap", "edit"), [(5, 0.0), (10, 0.0), (5, 0.4)])
def test_takes_equal_the_released_loop(overlap: int, edit: float):
    clips = [torch.randn(4, 1, 2, 3), torch.randn(4, 15, 2, 3)]
    strategies = ["0;2,1,0,-5,5,0.7", "1,1,5,10,3"]
    expected = list(released_loop(4, overlap, edit, [list(clips), list(clips)], list(strategies), blurred))
    got = list(
        sample_take(
            velocity_for,
            draw,
            samplers.make_times(STEPS),
            num_segments=4,
            overlap=overlap,
            edit_ratio=edit,
            references=[clips, clips],
            placements=[parse_mask_strategy(text) for text in strategies],
            reencode=blurred,
        )
    )
    assert [part.shape[2] for part in got] == [15, *[15 - overlap] * 3]
    assert_close_to_scale(torch.cat(got, 2), torch.cat(expected, 2))
    assert len(clips) == 2


def test_segments_see_the_frames_before_them_exactly():
    seen: dict[int, list[Tensor]] = {}

    def watched(segment: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def velocity(x: Tensor, t: Tensor, mask: Tensor) -> Tensor:
            assert mask.tolist() == [[segment == 0] * 5 + [True] * 10] * 2
            seen.setdefault(segment, []).append(x[:, :, :5].clone())
            return velocity_for(segment)(x, t, mask)

        return velocity

    parts = list(sample_take(watched, draw, samplers.make_times(STEPS), num_segments=3))
    for segment in (1, 2):
        for given in seen[segment]:
            torch.testing.assert_close(given, parts[segment - 1][:, :, -5:], rtol=0, atol=0)


def test_a_shorter_take_is_the_start_of_a_longer_one():
    short, long = (list(sample_take(velocity_for, draw, samplers.make_times(3), num_segments=n)) for n in (2, 3))
    torch.testing.assert_close(torch.cat(short, 2), torch.cat(long[:2], 2), rtol=0, atol=0)


def test_segments_come_one_by_one():
    made = []

    def counted(segment: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        made.append(segment)
        return velocity_for(segment)

    take = sample_take(counted, draw, samplers.make_times(2), num_segments=1000)
    next(take)
    next(take)
    assert made == [0, 1]


def test_a_single_image_is_a_take():
    def draw_image(segment: int, index: int) -> Tensor:
        return samplers.draw_noise((1, 4, 1, 2, 3), 0, segment, index)

    (image,) = sample_take(velocity_for, draw_image, samplers.make_times(2), num_segments=1)
    assert image.shape == (1, 4, 1, 2, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_segments": 0}, "num_segments must be at least 1, got 0"),
        ({"num_segments": 2, "overlap": 4}, r"whole chunks: expected 5, 10, 15 ..., got 4"),
        ({"num_segments": 2, "overlap": 15}, r"overlap \(15\) must be less than the 15 latent frames"),
    ],
)
def test_bad_numbers_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        next(sample_take(velocity_for, draw, samplers.make_times(2), **options))
