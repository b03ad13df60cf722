"""The flow-matching step against a loop over samples and frames."""

import torch
from torch import Tensor

from arlon.models.video_vae import VideoVAE
from arlon.models.vqvae import LatentVQVAE, LatentVQVAEConfig
from stages.config import FlowConfig
from stages.flow_matching import draw_times, flow_losses, grid_times, shift_for
from stages.inject import InjectStage
from stages.pictures import picture_of_pairs


class Recorder:
    """A model whose velocity is twice what it is given; keeps its arguments."""

    def __call__(self, noisy: Tensor, t: Tensor, text: Tensor, text_mask: Tensor, frame_mask: Tensor, **rest) -> Tensor:
        self.noisy, self.t, self.rest = noisy, t, rest
        return 2 * noisy


def make_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1, :2] = False
    mask[2, 3] = False
    return {
        "latent": torch.randn(3, 2, 5, 3, 4, generator=generator),
        "text": torch.randn(3, 6, 7, generator=generator),
        "text_mask": torch.ones(3, 6, dtype=torch.bool),
        "frame_mask": mask,
        "fps": torch.tensor([8.0, 8.0, 8.0]),
        "height": torch.full((3,), 48.0),
        "width": torch.full((3,), 80.0),
        "start": torch.tensor([0, 5, 10]),
    }


def test_loss_equals_a_loop_over_frames() -> None:
    model, batch, t = Recorder(), make_batch(), torch.tensor([0.2, 0.5, 0.9])
    losses = flow_losses(model, batch, t, generators=[torch.Generator().manual_seed(row) for row in range(3)])
    noise = [torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(row)) for row in range(3)]
    for row in range(3):
        errors = []
        for frame in range(5):
            clean, eps = batch["latent"][row, :, frame], noise[row][:, frame]
            if not batch["frame_mask"][row, frame]:
                assert torch.equal(model.noisy[row, :, frame], clean), "given frames are clean"
                continue
            noisy = (1 - t[row]) * clean + t[row] * eps
            errors.append((2 * noisy - (eps - clean)).square())
        torch.testing.assert_close(losses[row], torch.stack(errors).mean())
    assert torch.equal(model.t, t)
    assert (model.rest["height"].tolist(), model.rest["width"].tolist()) == ([48.0] * 3, [80.0] * 3)


def test_times_are_shifted_for_size_and_length() -> None:
    t = torch.tensor([0.25, 0.5])
    config = FlowConfig(base_size=64, shift_scale=0.5)
    ratio = (48 * 80 / 64**2) ** 0.5 * 10**0.5 * 0.5  # 34 frames are ten latent frames
    expected = ratio * t / (1 + (ratio - 1) * t)
    batch = make_batch() | {"latent": torch.zeros(3, 2, 10, 3, 4)}
    torch.testing.assert_close(shift_for(config, batch)(t), expected)


def test_times_of_a_row_do_not_depend_on_the_other_rows() -> None:
    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(row) for row in range(6)]

    for times in ("logit-normal", "uniform"):
        config = FlowConfig(times=times, time_loc=0.5, time_scale=2.0)
        whole = draw_times(config, generators())
        parts = [draw_times(config, generators()[:4]), draw_times(config, generators()[4:])]
        assert torch.equal(torch.cat(parts), whole)
        for row, generator in enumerate(generators()):
            if times == "uniform":
                assert torch.equal(whole[row], torch.rand((1,), generator=generator)[0])
            else:
                normal = torch.randn((1,), generator=generator)[0]
                torch.testing.assert_close(torch.logit(whole[row]), 0.5 + 2 * normal, rtol=1e-4, atol=1e-4)


def test_validation_times_are_the_ten_inner_ones_of_eleven_equal_parts() -> None:
    torch.testing.assert_close(grid_times(), torch.tensor([k / 11 for k in range(1, 11)]))


def test_coarse_latents_are_cut_at_the_start_of_the_window() -> None:
    torch.manual_seed(0)
    vqvae = LatentVQVAE(
        LatentVQVAEConfig(latent_channels=2, ratio=(2, 2, 2), hidden_dim=8, codebook_size=16, code_dim=4)
    ).eval()
    batch = make_batch() | {"codes_fine": torch.randint(16, (3, 8, 2, 2))}
    stage = InjectStage.__new__(InjectStage)
    torch.nn.Module.__init__(stage)
    stage.frozen, stage._take_latents = {"fine": vqvae}, 15
    cut = stage._decode("fine", batch)
    for row, start in enumerate((0, 5, 10)):
        whole = vqvae.decode(batch["codes_fine"][row : row + 1], num_latent_frames=15, grid=(3, 4))
        torch.testing.assert_close(cut[row], whole[0, :, start : start + 5])


def test_pictures_are_made_by_a_vae_of_whole_videos_too(frozen_parts: dict[str, str]) -> None:
    for chunk in (17, None):
        vae = VideoVAE.from_pretrained(frozen_parts["vae"], micro_frame_size=chunk)
        latents = torch.randn(2, vae.config.latent_channels, 10, 2, 2)
        picture = picture_of_pairs(vae, latents, latents.clone())
        side = 2 * vae.config.space_stride
        assert picture.shape == (4 * (side + 2) - 2, 8 * (side + 2) - 2, 3)
        assert (picture[:side] == picture[side + 2 : 2 * side + 2]).all(), "a row, and below it the same as made"
