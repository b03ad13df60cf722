"""The latent VQ-VAE: windows, padding, look-up, codebook training."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from arlon.models.vqvae import LatentVQVAE, LatentVQVAEConfig, codebook_usage
from tests.closeness import assert_close_to_scale


def make_vqvae(*, is_random: bool = True, **changes) -> LatentVQVAE:
    """A tiny VQ-VAE on odd channel counts; `is_random` replaces the zeros of fresh blocks."""
    torch.manual_seed(0)
    settings = {
        "latent_channels": 3,
        "hidden_dim": 12,
        "num_res_blocks": 1,
        "codebook_size": 32,
        "code_dim": 4,
    }
    model = LatentVQVAE(LatentVQVAEConfig(**{**settings, "kmeans_init": False, **changes}))
    if is_random:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def make_codes(model: LatentVQVAE, *shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.codebook_size, shape, generator=generator)


@pytest.mark.parametrize("ratio", [(2, 2, 2), (2, 4, 2), (4, 2, 4), (1, 2, 1), (1, 1, 1)])
@pytest.mark.parametrize("window", [1, 3, 50])
def test_decoding_in_windows_equals_decoding_the_whole_film(ratio, window):
    model = make_vqvae(ratio=ratio)
    codes = make_codes(model, 2, 11, 2, 3)
    num_frames = 11 * ratio[0] - (ratio[0] > 1)
    whole = model.decode(codes, num_frames)
    step = window * ratio[0]
    pieces = [
        model.decode_frames(codes, start, min(start + step, num_frames), num_latent_frames=num_frames)
        for start in range(0, num_frames, step)
    ]
    assert_close_to_scale(torch.cat(pieces, dim=2), whole)


@pytest.mark.parametrize("ratio", [(2, 2, 2), (4, 4, 4), (1, 2, 2)])
def test_halo_is_all_that_a_code_frame_depends_on(ratio):
    model = make_vqvae(ratio=ratio, num_res_blocks=2)
    halo, frame, t = model.receptive_halo, 8, ratio[0]
    codes = make_codes(model, 1, 20, 2, 2)
    whole = model.decode(codes)[:, :, frame * t : (frame + 1) * t]
    for distance, is_seen in ((halo, True), (halo + 1, False)):
        changed = codes.clone()
        changed[:, frame + distance] = (changed[:, frame + distance] + 1) % model.config.codebook_size
        same = torch.equal(model.decode(changed)[:, :, frame * t : (frame + 1) * t], whole)
        assert same != is_seen, f"a code {distance} frames away: expected is_seen={is_seen}"


def test_decoded_frames_are_a_slice_of_the_film_at_uneven_starts():
    model = make_vqvae(ratio=(4, 2, 2))
    codes = make_codes(model, 1, 9, 2, 3)
    whole = model.decode(codes, 34, grid=(3, 5))
    for start, stop in ((0, 1), (5, 18), (15, 34), (33, 34)):
        piece = model.decode_frames(codes, start, stop, num_latent_frames=34, grid=(3, 5))
        assert_close_to_scale(piece, whole[:, :, start:stop])


def test_uneven_sizes_are_padded_by_repetition_and_cropped():
    model = make_vqvae(ratio=(2, 4, 2))
    latent = torch.randn(2, 3, 3, 6, 5)
    padded = latent[:, :, [0, 1, 2, 2]][:, :, :, [0, 1, 2, 3, 4, 5, 5, 5]][..., [0, 1, 2, 3, 4, 4]]
    codes = model.encode(latent)
    assert codes.shape == (2, 2, 2, 3)
    assert codes.dtype == torch.int64
    assert torch.equal(codes, model.encode(padded))
    decoded = model.decode(codes, 3, grid=(6, 5))
    assert torch.equal(decoded, model.decode(codes)[:, :, :3, :6, :5])
    torch.testing.assert_close(model(latent).reconstruction, decoded, rtol=0, atol=0)


@pytest.mark.parametrize("use_cosine_sim", [True, False])
def test_codes_are_nearest_in_the_codebook(use_cosine_sim):
    model = make_vqvae(use_cosine_sim=use_cosine_sim)
    vectors = F.normalize(torch.randn(32, 4), dim=-1) * (1 if use_cosine_sim else 0.5)
    model.quantizer.load_state_dict(model.quantizer.state_dict() | {"_codebook.embed": vectors[None]})
    latent = torch.randn(2, 3, 4, 6, 4)
    codes = model.encode(latent).flatten()
    z = model._encode(latent).flatten(0, 3).detach()
    compared = F.normalize(z, dim=-1) if use_cosine_sim else z
    distance = [[float((a - b).square().sum()) for b in vectors] for a in compared]
    assert codes.tolist() == [row.index(min(row)) for row in distance]
    assert torch.equal(codes, model.quantizer(z).codes)


def test_training_and_evaluation_have_the_same_loss():
    model = make_vqvae()
    latent = torch.randn(2, 3, 4, 4, 6)
    evaluated = model(latent)
    trained = model.train()(latent)
    for name in ("loss", "reconstruction_loss", "commitment_loss"):
        assert_close_to_scale(getattr(trained, name), getattr(evaluated, name))
    assert torch.equal(trained.codes, evaluated.codes)
    error = (trained.reconstruction - latent).square().mean()
    torch.testing.assert_close(trained.loss, error + 0.25 * trained.commitment_loss)


def test_codebook_follows_the_moving_average_and_only_in_training():
    model = make_vqvae(use_cosine_sim=False, dead_code_threshold=0.0, decay=0.9)
    latent = torch.randn(2, 3, 4, 4, 6)
    before = copy.deepcopy(model.quantizer.state_dict())
    model(latent), model.encode(latent), model.train().encode(latent)
    assert all(torch.equal(before[name], value) for name, value in model.quantizer.state_dict().items())
    z, codes = model._encode(latent).detach().flatten(0, 3), model(latent).codes.flatten()
    code = int(codes[0])
    uses = 0.9 * before["_codebook.cluster_size"][0, code] + 0.1 * (codes == code).sum()
    total = 0.9 * before["_codebook.embed_avg"][0, code] + 0.1 * z[codes == code].sum(0)
    assert_close_to_scale(model.quantizer.vectors[code], total / uses, relative=1e-4)


def test_dead_codes_restart_from_the_batch():
    model = make_vqvae(dead_code_threshold=0.999, decay=0.5).train()
    latent = torch.randn(4, 3, 8, 8, 8)
    model(latent)
    used = codebook_usage(model.encode(latent), 32).used_share
    assert used > 0.9, f"every unused code was moved onto a vector of this batch, yet only {used:.0%} are used"


def test_training_draws_come_from_the_generator_alone():
    latent = torch.randn(2, 3, 8, 8, 8)
    codebooks = []
    for global_seed in (1, 2):
        model = make_vqvae(kmeans_init=True, dead_code_threshold=2.0).train()
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        model(latent, generator=torch.Generator().manual_seed(7))
        assert torch.equal(state, torch.get_rng_state()), "the global generator moved"
        codebooks.append(model.quantizer.vectors.clone())
    assert torch.equal(*codebooks)


def test_validation_before_training_leaves_k_means_to_the_first_batch():
    model = make_vqvae(kmeans_init=True)
    model(torch.randn(1, 3, 2, 4, 4))
    assert not model.quantizer.is_initialised
    model.train()(torch.randn(2, 3, 8, 8, 8))
    assert model.quantizer.is_initialised


def test_optimizer_steps_lower_the_loss_of_one_batch():
    model = make_vqvae(is_random=False, kmeans_init=True, hidden_dim=32, codebook_size=64).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    latent = F.interpolate(torch.randn(4, 3, 2, 2, 2), size=(5, 6, 8), mode="trilinear")
    errors = []
    for _ in range(40):
        output = model(latent)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        errors.append(output.reconstruction_loss.item())
    assert errors[-1] < 0.3 * errors[0], errors[::8]
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("codes", "used_share", "perplexity"),
    [([[0, 1], [2, 3]], 0.5, 4.0), ([5, 5, 5], 0.125, 1.0), ([0, 0, 0, 1], 0.25, 4 / 3**0.75)],
)
def test_codebook_usage_closed_forms(codes, used_share, perplexity):
    usage = codebook_usage(torch.tensor(codes), 8)
    assert usage.used_share == pytest.approx(used_share)
    assert math.isclose(usage.perplexity, perplexity, rel_tol=1e-9)


def test_component_round_trip_is_exact(tmp_path):
    model = make_vqvae(ratio=(2, 4, 4))
    model.train()(torch.randn(2, 3, 4, 8, 8))
    model.eval().save_pretrained(tmp_path / "vqvae")
    loaded = LatentVQVAE.from_pretrained(tmp_path / "vqvae").eval()
    assert loaded.config == model.config
    latent = torch.randn(1, 3, 5, 8, 8)
    assert torch.equal(loaded(latent).reconstruction, model(latent).reconstruction)
    assert loaded.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(("ratio", "grid"), [((4, 8, 8), (5, 8, 8)), ((4, 16, 16), (5, 4, 4))])
def test_full_size_builds_and_runs_on_the_meta_device(ratio, grid):
    with torch.device("meta"):
        config = LatentVQVAEConfig(latent_channels=4, ratio=ratio, hidden_dim=256, codebook_size=8192)
        model = LatentVQVAE(config).eval()
        latent = torch.empty(1, 4, 20, 64, 64)
    codes = model.encode(latent)
    assert tuple(codes.shape[1:]) == grid
    assert model.decode(codes, 20).shape == latent.shape
    assert model(latent).reconstruction.is_meta


def test_bfloat16_autocast_keeps_the_look_up_in_float32():
    model = make_vqvae()
    z = F.normalize(torch.randn(1, 6, 5, 4, 4), dim=-1)
    expected = model.quantizer.nearest(z)
    model._encode = lambda latent: z
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.encode(torch.randn(1, 3, 12, 10, 8)), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.encode(torch.randn(1, 4, 2, 2, 2)), r"expected a latent \(B, 3, T, H, W\), got \(1, 4"),
        (lambda m: m.decode(make_codes(m, 1, 3, 2, 2), 7), r"code grid of \(4, 2, 2\) at ratio"),
        (lambda m: m.decode(make_codes(m, 1, 3, 2, 2), grid=(4, 2)), r"codes have \(3, 2, 2\)"),
        (lambda m: m.decode(make_codes(m, 3, 2, 2)), r"expected codes \(B, cT, cH, cW\)"),
        (lambda m: m.decode(torch.full((1, 1, 1, 1), 32)), r"codes must lie in \[0, 32\), got 32..32"),
        (lambda m: m.decode(torch.zeros(1, 1, 1, 1)), "codes must be int64, got torch.float32"),
        (lambda m: m.decode_frames(make_codes(m, 1, 3, 2, 2), 4, 7), r"\[4, 7\) are empty or outside"),
        (lambda m: codebook_usage(torch.zeros(0, dtype=torch.int64), 8), "at least one code"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(make_vqvae())


def test_one_error_lists_every_problem_of_a_config():
    with pytest.raises(ValueError, match=r"code_dim must be at least 1.*powers of two.*\(2, 3, 2\).*decay"):
        LatentVQVAEConfig(code_dim=0, ratio=(2, 3, 2), decay=1.0)
