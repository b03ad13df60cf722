"""Flow of pictures that were moved by a known amount."""

from __future__ import annotations

import pytest
import torch

from arlon.evaluation.optical_flow import estimate_flow
from arlon.evaluation.vbench import rules as vbench
from arlon.shapes import world


def waves(x_shift: float, y_shift: float, height: int = 56, width: int = 72) -> torch.Tensor:
    """A smooth texture (1, 1, pH, pW) moved right and down, exact at any fraction of a pixel."""
    y, x = torch.meshgrid(torch.arange(height) - float(y_shift), torch.arange(width) - float(x_shift), indexing="ij")
    picture = torch.sin(0.35 * x + 0.1 * y) + torch.sin(0.27 * y - 0.12 * x) + torch.sin(0.2 * (x + y))
    return (picture / 6 + 0.5)[None, None]


@pytest.mark.parametrize(("right", "down"), [(0.0, 0.0), (1.6, 0.0), (0.0, -2.3), (-3.4, 1.2)])
def test_a_moved_texture_flows_by_its_shift(right, down):
    flow = estimate_flow(waves(0, 0), waves(right, down))[0, :, 10:-10, 10:-10]
    torch.testing.assert_close(flow[0].mean().item(), right, rtol=0.03, atol=0.02)
    torch.testing.assert_close(flow[1].mean().item(), down, rtol=0.03, atol=0.02)
    assert flow.std(dim=(1, 2)).max() < 0.2


def test_noise_on_a_flat_ground_does_not_flow():
    frames = 0.5 + 0.01 * torch.randn(2, 3, 48, 64)
    assert estimate_flow(frames[:1], frames[1:]).norm(dim=1).max() < 0.3


def test_pairs_do_not_influence_each_other():
    pairs = [(waves(0, 0), waves(1, 0)), (waves(0, 0), waves(0, 2))]
    alone = [estimate_flow(a, b) for a, b in pairs]
    together = estimate_flow(*(torch.cat(side) for side in zip(*pairs, strict=True)))
    torch.testing.assert_close(together, torch.cat(alone))


@pytest.mark.parametrize("speed", ["slow", "fast"])
def test_the_fastest_pixels_of_a_rendered_object_have_its_speed(speed):
    look = world.ObjectLook(colour="red", shape="star", size="large", motion="right", speed=speed)
    shot = world.Shot(objects=(look,), background="sand", seconds=1.0)
    scene = world.Scene(shots=(shot,), start=((0.4, 0.5),), phase=(0.0,))
    frames = torch.from_numpy(world.render_scene(scene, height=64, width=64, fps=8.0, num_frames=5).frames)
    pictures = frames.permute(0, 3, 1, 2) / 255
    pixels = vbench.fastest_pixels(estimate_flow(pictures[:-1], pictures[1:]))
    expected = world.MOVE_SPEED[speed] * 64 / 8
    assert pixels.mean().item() == pytest.approx(expected, rel=0.3)


def test_colours_of_equal_luma_still_flow():
    tint = torch.tensor([1.0, -0.299 / 0.587, 0.0]).view(1, 3, 1, 1)
    before, after = (0.5 + (waves(shift, 0) - 0.5) * tint for shift in (0.0, 1.5))
    assert estimate_flow(before, after)[0, 0, 10:-10, 10:-10].mean().item() == pytest.approx(1.5, rel=0.05)


def test_frames_of_two_sizes_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        estimate_flow(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9))
