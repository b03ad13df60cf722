import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from arlon.config import config_from_dict
from arlon.models.video_vae import (
    Posterior,
    SpatialVAEConfig,
    TemporalVAE,
    TemporalVAEConfig,
    VideoVAE,
    VideoVAEConfig,
    latent_statistics,
)

DATA = Path(__file__).parents[2] / "data"


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def tiny_vae(**overrides) -> VideoVAE:
    torch.manual_seed(0)
    config = VideoVAEConfig(
        spatial=SpatialVAEConfig(
            latent_channels=3, layers_per_block=1, block_out_channels=(8, 8, 8, 8), norm_num_groups=4
        ),
        temporal=TemporalVAEConfig(
            in_out_channels=3,
            latent_embed_dim=4,
            embed_dim=4,
            filters=8,
            num_res_blocks=1,
            channel_multipliers=(1, 1, 2, 2),
            num_groups=4,
        ),
        **overrides,
    )
    return VideoVAE(config).eval()


@pytest.fixture(scope="module")
def golden_temporal() -> TemporalVAE:
    values = json.loads((DATA / "vae_temporal_weights.json").read_text())["config"]
    vae = TemporalVAE(config_from_dict(TemporalVAEConfig, values))
    vae.load_state_dict(load_file(DATA / "vae_temporal_weights.safetensors"), strict=True)
    return vae.eval()


@pytest.mark.parametrize("num_frames", [5, 17, 20])
@torch.no_grad()
def test_temporal_vae_equals_the_original(golden_temporal: TemporalVAE, num_frames: int) -> None:
    golden = load_file(DATA / f"vae_temporal_T{num_frames}.safetensors")
    posterior = golden_temporal.encode(golden["in.x"])
    assert relative_error(posterior.mean, golden["mean"]) <= 1e-5
    assert relative_error(posterior.logvar, golden["logvar"]) <= 1e-5
    assert relative_error(posterior.kl(), golden["kl"]) <= 1e-5
    assert relative_error(golden_temporal.decode(golden["mean"], num_frames), golden["decode_of_mean"]) <= 1e-5


@torch.no_grad()
def test_chunks_are_coded_independently_and_in_order() -> None:
    vae, video = tiny_vae(), torch.rand(2, 3, 40, 16, 24) * 2 - 1
    latent = vae.encode(video)
    assert latent.shape == (2, 4, 12, 2, 3)
    for chunk, (start, stop) in enumerate([(0, 17), (17, 34), (34, 40)]):
        alone = vae.encode(video[:, :, start:stop])
        torch.testing.assert_close(latent[:, :, 5 * chunk : 5 * chunk + alone.shape[2]], alone, rtol=1e-4, atol=1e-5)
    decoded = vae.decode(latent, num_frames=40)
    assert decoded.shape == video.shape
    torch.testing.assert_close(
        decoded[:, :, 17:34], vae.decode(latent[:, :, 5:10], num_frames=17), rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_latent_is_normalised_by_shift_and_scale() -> None:
    plain = tiny_vae(shift=(0.0,) * 4, scale=(1.0,) * 4)
    shifted = tiny_vae(shift=(0.1, -0.2, 0.3, 0.4), scale=(2.0, 3.0, 4.0, 5.0))
    shifted.load_state_dict({k: v for k, v in plain.state_dict().items() if k not in ("shift", "scale")}, strict=False)
    video = torch.rand(1, 3, 17, 16, 16) * 2 - 1
    expected = (plain.encode(video) - shifted.shift) / shifted.scale
    torch.testing.assert_close(shifted.encode(video), expected)
    torch.testing.assert_close(
        shifted.decode(expected, num_frames=17), plain.decode(plain.encode(video), num_frames=17)
    )


@torch.no_grad()
def test_micro_batches_change_nothing() -> None:
    few, whole = tiny_vae(micro_batch_size=3), tiny_vae(micro_batch_size=None)
    video = torch.rand(1, 3, 7, 16, 16) * 2 - 1
    torch.testing.assert_close(few.encode(video), whole.encode(video), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_temporal_convolutions_are_causal(golden_temporal: TemporalVAE) -> None:
    conv = golden_temporal.encoder.conv_blocks[1]
    x = torch.randn(1, conv.conv.in_channels, 9, 4, 5)
    later = x.clone()
    later[:, :, 6:] += 1.0
    assert torch.equal(conv(x)[:, :, :3], conv(later)[:, :, :3])
    assert not torch.equal(conv(x)[:, :, 3:], conv(later)[:, :, 3:])


def test_sampling_is_addressed_by_the_generator() -> None:
    posterior = Posterior(torch.zeros(2, 4, 3, 2, 2), torch.full((2, 4, 3, 2, 2), 2.0))
    first, again, other = (posterior.sample(torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.std() == pytest.approx(2.718, rel=0.2)


def test_wrong_frame_count_is_refused() -> None:
    with pytest.raises(ValueError, match="makes 10 latent frames, but the latent has 5"):
        tiny_vae().decode(torch.zeros(1, 4, 5, 2, 2), num_frames=34)


def test_statistics_normalise_each_channel() -> None:
    latent = torch.randn(3, 2, 5, 4, 6) * torch.tensor([2.0, 5.0]).view(1, 2, 1, 1, 1) + 3.0
    shift, scale = latent_statistics([latent[:2], latent[2:]])
    normal = (latent - torch.tensor(shift).view(1, 2, 1, 1, 1)) / torch.tensor(scale).view(1, 2, 1, 1, 1)
    torch.testing.assert_close(normal.mean((0, 2, 3, 4)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(normal.std((0, 2, 3, 4)), torch.ones(2), atol=1e-4, rtol=0)


def test_full_size_has_the_released_number_of_parameters() -> None:
    with torch.device("meta"):
        vae = VideoVAE(VideoVAEConfig())
    assert sum(p.numel() for p in vae.parameters()) == 393_341_007
    released = VideoVAE.translate_config(
        {
            "vae_2d": {"type": "VideoAutoencoderKL", "micro_batch_size": 4},
            "micro_frame_size": 17,
            "shift": [0, 0, 0, 0],
        }
    )
    assert released == {"micro_frame_size": 17, "shift": [0, 0, 0, 0], "micro_batch_size": 4}
