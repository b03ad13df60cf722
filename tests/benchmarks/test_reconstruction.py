"""The figures of the parts against naive ones, and the windows of codes against those of generation."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from arlon.data.datasets import CaptionSpan, ShapesTakes, ShapesTakesConfig
from arlon.models.ar import CodeTransformer
from arlon.models.code_sampling import PromptSpan, SamplingConfig, generate_codes
from arlon.models.video_vae import VideoVAE
from arlon.models.vqvae import LatentVQVAE
from arlon.text.encoders import TextFeatures
from benchmarks import reconstruction as bench
from tests.pipelines import tiny_model as tiny

pytestmark = pytest.mark.slow

FRAMES = 34


class WordEncoder:
    """Features drawn from the length of a caption."""

    dim, max_length = tiny.TEXT_DIM, tiny.TEXT_LENGTH

    def encode(self, prompts: list[str], *, batch_size: int = 1) -> TextFeatures:
        generator = torch.Generator().manual_seed(len(prompts[0]))
        tokens = torch.randn(1, self.max_length, self.dim, generator=generator)
        mask = torch.arange(self.max_length)[None] < 3
        return TextFeatures(tokens * mask[..., None], mask, tokens.mean(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def spans(*starts: int) -> tuple[CaptionSpan, ...]:
    return tuple(CaptionSpan(start_frame=start, captions=("word " * i + "end",)) for i, start in enumerate(starts))


def shapes(num_takes: int = 2) -> ShapesTakes:
    config = ShapesTakesConfig(num_takes=num_takes, num_frames=FRAMES, height=tiny.HEIGHT, width=tiny.WIDTH)
    return ShapesTakes(config)


@pytest.mark.parametrize(("max_frames", "hop"), [(4, 1), (6, 2), (8, 3), (16, 4)])
@pytest.mark.parametrize("starts", [(0,), (0, 17), (0, 51), (0, 34, 68)])
def test_windows_are_those_of_generation(folder, starts, max_frames, hop):
    """Greedy codes are the most likely ones in every window: so the windows see what generation saw."""
    torch.manual_seed(3)
    config = CodeTransformer.from_pretrained(folder / "ar").config
    values = {**vars(config), "max_code_frames": max_frames, "window_hop": hop}
    model = CodeTransformer(type(config)(**values)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.5)
    captions, ratio, num_frames, texts = spans(*starts), 2, 14, bench.Texts(WordEncoder())
    edges = [math.ceil(start // 17 * 5 / ratio) for start in starts] + [num_frames]
    schedule = []
    for span, start, stop in zip(captions, edges[:-1], edges[1:], strict=True):
        text, mask = texts.features(span)
        schedule.append(PromptSpan(text=text, text_mask=mask, num_code_frames=stop - start))
    codes = generate_codes(
        model,
        schedule,
        generator_for_frame=lambda frame: torch.Generator().manual_seed(frame),
        sampling=SamplingConfig(temperature=0, guidance_scale=1),
    )[0]
    seen = []
    for window in bench.code_windows(captions, num_frames, ratio=ratio, max_frames=max_frames, hop=hop):
        text, mask = texts.features(window.span)
        logits = model(codes[window.start : window.stop].flatten()[None], text, mask)[0, :-1, :-1]
        per_frame = codes[0].numel()
        found = logits.argmax(-1)[(window.learned - window.start) * per_frame :]
        assert torch.equal(found, codes[window.learned : window.stop].flatten())
        seen += range(window.learned, window.stop)
    assert seen == list(range(num_frames))
    assert len(codes.unique()) > 4


def test_vae_figures_are_those_of_the_whole_set(folder):
    vae, source = VideoVAE.from_pretrained(folder / "vae").eval().requires_grad_(False), shapes(3)
    takes, figures = bench.measure_vae(vae, source, lambda *_: None)
    videos = torch.stack([source.take(i).video for i in range(3)])
    error = (vae.decode(vae.encode(videos), FRAMES).clamp(-1, 1) - videos).square().mean(dim=(1, 2, 3, 4)).double()
    psnr = 10 * torch.log10(4 / error)
    assert figures["psnr"] == pytest.approx(psnr.mean().item(), rel=1e-4)
    assert figures["psnr_min"] == pytest.approx(psnr.min().item(), rel=1e-4)
    assert figures["psnr_pooled"] == pytest.approx(10 * math.log10(4 / error.mean().item()), rel=1e-4)
    assert takes.latent.shape == (3, tiny.CHANNELS, 10, tiny.HEIGHT // 8, tiny.WIDTH // 8)


def test_vqvae_figures(folder):
    vqvae = LatentVQVAE.from_pretrained(folder / "vqvae").eval()
    latent = torch.randn(4, tiny.CHANNELS, 5, 4, 6)
    with torch.no_grad():
        codes, figures = bench.measure_vqvae(vqvae, latent)
        out = vqvae(latent)
    mean = latent.mean(dim=(0, 2, 3, 4), keepdim=True)
    expected = 1 - (latent - out.reconstruction).square().sum() / (latent - mean).square().sum()
    assert torch.equal(codes, out.codes)
    assert figures["r_squared"] == pytest.approx(float(expected), rel=1e-4)
    assert figures["used_share"] == len(codes.unique()) / tiny.CODEBOOK_SIZE


def test_ar_loss_of_a_uniform_model_is_the_logarithm_of_its_vocabulary(folder):
    model = CodeTransformer.from_pretrained(folder / "ar").eval().requires_grad_(False)
    model.head.weight.zero_()
    codes = torch.randint(0, tiny.CODEBOOK_SIZE, (2, 5, 2, 3))
    takes = bench.EncodedTakes(torch.zeros(2, 4, 9, 4, 6), (spans(0), spans(0, 17)), (32, 48), 8.0)
    figures = bench.measure_ar(model, codes, takes, bench.Texts(WordEncoder()), ratio=2)
    assert figures["loss"] == pytest.approx(math.log(tiny.CODEBOOK_SIZE + 1), rel=1e-5)
    assert figures["loss_without_text"] == pytest.approx(figures["loss"], rel=1e-5)
    assert figures["num_codes"] == 2 * 4 * 6  # the fifth code frame of a take is half padding
    share = torch.bincount(codes[:, :4].flatten()) / 48
    assert figures["unigram_entropy"] == pytest.approx(-torch.special.xlogy(share, share).sum().item(), rel=1e-5)


def test_flow_loss_of_a_model_that_says_nothing_is_the_variance_of_the_velocity():
    seen: list[tuple[int, bool]] = []

    def nothing(latent: Tensor, t: Tensor, text: Tensor, text_mask: Tensor, frame_mask: Tensor, **_: object) -> Tensor:
        seen.append((text.shape[1], bool(frame_mask.all())))
        return torch.zeros_like(latent)

    takes = bench.EncodedTakes(torch.randn(6, 8, 20, 8, 8), (spans(0), spans(0, 17)) * 3, (64, 64), 8.0)
    figures = bench.measure_flow(nothing, takes, bench.Texts(WordEncoder()))
    assert figures["loss"] == pytest.approx(2, rel=0.02)
    # Takes with and without a switch at latent 5 have segments at latents 0 and 5.
    assert figures["num_segments"] == len(seen) == 12
    assert [whole for _, whole in seen] == [True, False] * 6


def test_missing_parts_are_named_and_the_rest_is_measured(folder, tmp_path, capsys):
    part = tmp_path / "part"
    for name in ("vae", "vqvae", "dit"):
        shutil.copytree(folder / name, part / name)
    shutil.copytree(folder / "text_encoder", part / "text_encoder")
    size = ["--takes", "1", "--frames", "51", "--height", str(tiny.HEIGHT), "--width", str(tiny.WIDTH)]
    bench.main(["--model", str(part), *size, "--json", str(tmp_path / "figures.json")])
    lines = capsys.readouterr().out.splitlines()
    missing = [line.split("  ")[0] for line in lines if "missing" in line]
    assert missing == ["vqvae_coarser", "ar", "dit + injection"]
    assert set(json.loads((tmp_path / "figures.json").read_text())["figures"]) == {"vae", "vqvae", "dit"}


def test_a_whole_model_is_measured(folder):
    config = ShapesTakesConfig(num_takes=1, num_frames=51, height=tiny.HEIGHT, width=tiny.WIDTH)
    figures = bench.measure_model(folder, ShapesTakes(config))
    assert set(figures) == {"vae", "vqvae", "ar", "dit", "dit + injection"}
    assert figures["dit"]["loss"] != figures["dit + injection"]["loss"]


def test_a_model_without_a_vae_ends_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match="holds no vae"):
        bench.main(["--model", str(tmp_path), "--takes", "1"])
    with pytest.raises(SystemExit, match="no model folder"):
        bench.main(["--model", str(tmp_path / "nowhere")])
