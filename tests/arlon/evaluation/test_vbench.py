"""Backbones with random weights, against the same arithmetic written out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from arlon.evaluation import vbench
from arlon.evaluation.figures import FIGURES
from arlon.evaluation.film import FilmShot, Outline, measure_film

pytestmark = pytest.mark.slow  # importing transformers alone takes seconds

SIDE = 32


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    folder = tmp_path_factory.mktemp("dino")
    ViTModel(ViTConfig(**sizes, image_size=224, patch_size=32), add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    vision = sizes | {"image_size": SIDE, "patch_size": 16}
    config = CLIPConfig(text_config=sizes | {"vocab_size": 20}, vision_config=vision, projection_dim=12)
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    head = {"weight": torch.randn(1, 12), "bias": torch.randn(1)}
    safetensors.torch.save_file(head, folder / vbench.AESTHETIC_HEAD)
    return folder


def frames(count: int = 3, height: int = SIDE, width: int = 48) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def naive_consistency(features: torch.Tensor) -> float:
    total = 0.0
    for i in range(1, len(features)):
        cosines = [torch.cosine_similarity(features[i], features[j], dim=0).item() for j in (i - 1, 0)]
        total += sum(max(0.0, value) for value in cosines) / 2
    return total / (len(features) - 1)


def test_a_backbone_is_loaded_without_a_word(dino, capsys):
    vbench.load_backbone("subject_consistency", str(dino))
    assert capsys.readouterr() == ("", "")


def test_subject_consistency_is_that_of_class_tokens(dino):
    from transformers import ViTModel

    video = frames(3, 224, 224)  # the size of the network: nothing is scaled
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pictures = ((torch.from_numpy(video).float() / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.inference_mode():
        tokens = ViTModel.from_pretrained(dino, add_pooling_layer=False).eval()(pictures).last_hidden_state[:, 0]
    backbone = vbench.load_backbone("subject_consistency", str(dino))
    assert backbone.score(video, fps=8) == pytest.approx(naive_consistency(tokens), abs=1e-5)
    assert backbone.score(np.repeat(video[:1], 3, axis=0), fps=8) == pytest.approx(1)
    assert backbone.description.startswith("vit, 1 layers of 16, patch 32, weights ")
    assert str(dino) not in backbone.description


def test_background_and_aesthetics_follow_the_image_embedding(clip):
    from transformers import CLIPModel

    video = frames()
    middle = video[:, :, 8:40]
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pictures = ((torch.from_numpy(middle).float() / 255 - mean) / std).permute(0, 3, 1, 2)
    model = CLIPModel.from_pretrained(clip).eval()
    with torch.inference_mode():
        embedded = model.visual_projection(model.vision_model(pictures).pooler_output)
    background = vbench.load_backbone("background_consistency", str(clip))
    assert background.score(video, fps=8) == pytest.approx(naive_consistency(embedded), abs=1e-5)
    head = safetensors.torch.load_file(clip / vbench.AESTHETIC_HEAD)
    unit = embedded / embedded.norm(dim=-1, keepdim=True)
    expected = ((unit * head["weight"]).sum(-1) + head["bias"]).mean().item() / 10
    aesthetic = vbench.load_backbone("aesthetic_quality", str(clip))
    assert aesthetic.score(video, fps=8) == pytest.approx(expected, abs=1e-5)


def test_pictures_are_scaled_as_a_reference_scales_them():
    """Enlarging needs no anti-aliasing, so that PIL's bilinear filter is the truth, up to its rounding."""
    picture = frames(1, 20, 30)[0]
    expected = np.asarray(Image.fromarray(picture).resize((48, 32), Image.Resampling.BILINEAR)) / 255
    found = vbench._prepare(picture[None], "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), side=32)[0]
    np.testing.assert_allclose(found.permute(1, 2, 0).numpy(), expected, atol=1.5 / 255)


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(110, 110, (224, 224)), (20, 90, (224, 1008)), (90, 20, (1008, 224)), (100, 103, (224, 230))],
)
def test_pictures_have_the_size_and_the_middle_that_torchvision_gives_them(height, width, size):
    """int(224 * long / short), which 224 / short in floating point misses; round((long - side) / 2)."""
    found = vbench._prepare(frames(1, height, width), "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert found.shape[-2:] == size
    row = torch.arange(227.0).expand(1, 3, 224, 227)
    assert vbench._centre(row, 224)[0, 0, 0, 0] == 2


def test_what_bicubic_filtering_adds_at_edges_stays():
    step = np.zeros((1, 16, 16, 3), np.uint8)
    step[:, :, 8:] = 255
    found = vbench._prepare(step, "bicubic", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), side=32)
    expected = nn.functional.interpolate(
        torch.from_numpy(step).permute(0, 3, 1, 2) / 255, size=(32, 32), mode="bicubic"
    )
    torch.testing.assert_close(found, expected)
    assert found.min() < 0
    assert found.max() > 1


def test_what_is_no_backbone_is_refused_by_name(dino, clip, tmp_path):
    def refused(dimension: str, source: object) -> str:
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (messages are compared below)
            vbench.load_backbone(dimension, str(source))
        return str(caught.value)

    assert "no config.json" in refused("subject_consistency", tmp_path)
    assert "'clip', expected 'vit'" in refused("subject_consistency", clip)
    assert "neither a folder" in refused("background_consistency", "nothing-here")
    assert "aesthetic_head.safetensors" in refused("aesthetic_quality", dino)
    assert "no backbone can be given for 'motion_smoothness'" in refused("motion_smoothness", dino)
    assert "must hold one file of weights" in refused("overall_consistency", tmp_path)
    assert "has no tokenizer" in refused("overall_consistency", clip)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    assert "no weights in safetensors" in refused("subject_consistency", tmp_path)


def test_missing_weights_are_not_made_up(dino, tmp_path):
    (tmp_path / "config.json").write_bytes((dino / "config.json").read_bytes())
    tensors = safetensors.torch.load_file(dino / "model.safetensors")
    tensors.pop(sorted(tensors)[-1])
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights"):
        vbench.load_backbone("subject_consistency", str(tmp_path))


# --- a prompt ------------------------------------------------------------------------------------------------

WORDS = ("a</w>", "red</w>", "cat</w>", "<|startoftext|>", "<|endoftext|>")


def add_tokenizer(folder: Path) -> None:
    letters = [char + end for char in "acdert" for end in ("", "</w>") if char + end != "a</w>"]
    pieces = ["re", "ca"]
    vocabulary = [*letters, *pieces, *WORDS]  # the end of a text must be the highest token
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\nc a\nca t</w>\n")


NUM_WORDS = 11 + 2 + len(WORDS)


@pytest.fixture(scope="module")
def viclip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under ViCLIP's names: 2 layers of 128 for 8 frames of 3 x 3 patches, 1 layer of 64 for text."""
    torch.manual_seed(2)
    width, text_width, embedding, patch, grid, num_tokens = 128, 64, 12, 4, 3, 5
    shapes = {
        "vision_encoder.conv1.weight": (width, 3, 1, patch, patch),
        "vision_encoder.class_embedding": (width,),
        "vision_encoder.positional_embedding": (grid**2 + 1, width),
        "vision_encoder.temporal_positional_embedding": (1, 8, width),
        "vision_encoder.proj": (width, embedding),
        "text_encoder.token_embedding.weight": (NUM_WORDS, text_width),
        "text_encoder.positional_embedding": (num_tokens, text_width),
        "text_encoder.text_projection": (text_width, embedding),
        "temp": (),
    }
    norms = {"vision_encoder": (width, 2, ("ln_pre", "ln_post")), "text_encoder": (text_width, 1, ("ln_final",))}
    for tower, (size, num_layers, names) in norms.items():
        layers = [f"transformer.resblocks.{layer}" for layer in range(num_layers)]
        for name in (*names, *(f"{layer}.ln_{number}" for layer in layers for number in (1, 2))):
            shapes |= {f"{tower}.{name}.weight": (size,), f"{tower}.{name}.bias": (size,)}
        for layer in layers:
            for name, rows, columns in (
                ("attn.in_proj_", 3 * size, size),
                ("attn.out_proj.", size, size),
                ("mlp.c_fc.", 4 * size, size),
                ("mlp.c_proj.", size, 4 * size),
            ):
                shapes |= {f"{tower}.{layer}.{name}weight": (rows, columns), f"{tower}.{layer}.{name}bias": (rows,)}
    folder = tmp_path_factory.mktemp("viclip")
    torch.save({"model": {name: torch.randn(shape) * 0.2 for name, shape in shapes.items()}}, folder / "viclip.pth")
    add_tokenizer(folder)
    return folder


def naive_tower(weights: dict[str, Tensor], tower: str, tokens: Tensor, *, causal: bool) -> Tensor:
    """A CLIP transformer on tokens (L, D), head by head."""
    width = tokens.shape[1]
    mask = torch.full((len(tokens), len(tokens)), -torch.inf).triu(1) if causal else torch.zeros(())
    for layer in range(2 if tower == "vision_encoder" else 1):
        part = {
            k.split(f"resblocks.{layer}.")[1]: v
            for k, v in weights.items()
            if f"{tower}.transformer.resblocks.{layer}." in k
        }
        normed = nn.functional.layer_norm(tokens, (width,), part["ln_1.weight"], part["ln_1.bias"])
        query, key, value = (normed @ part["attn.in_proj_weight"].T + part["attn.in_proj_bias"]).split(width, dim=1)
        heads = [slice(start, start + 64) for start in range(0, width, 64)]
        seen = [((query[:, h] @ key[:, h].T) / 8 + mask).softmax(-1) @ value[:, h] for h in heads]
        tokens = tokens + torch.cat(seen, 1) @ part["attn.out_proj.weight"].T + part["attn.out_proj.bias"]
        normed = nn.functional.layer_norm(tokens, (width,), part["ln_2.weight"], part["ln_2.bias"])
        hidden = normed @ part["mlp.c_fc.weight"].T + part["mlp.c_fc.bias"]
        hidden = hidden * torch.sigmoid(1.702 * hidden)
        tokens = tokens + hidden @ part["mlp.c_proj.weight"].T + part["mlp.c_proj.bias"]
    return tokens


def naive_agreement(weights: dict[str, Tensor], pictures: Tensor, words: list[int]) -> float:
    """Cosine by ViCLIP, patch by patch, of normalised pictures (8, 3, 12, 12) and tokens."""
    of_video = {k.removeprefix("vision_encoder."): v for k, v in weights.items() if k.startswith("vision")}
    of_text = {k.removeprefix("text_encoder."): v for k, v in weights.items() if k.startswith("text")}
    tokens = [of_video["class_embedding"] + of_video["positional_embedding"][0]]
    for place in range(9):
        row, column = 4 * (place // 3), 4 * (place % 3)
        for time in range(8):
            patch = pictures[time, :, row : row + 4, column : column + 4]
            seen = (of_video["conv1.weight"][:, :, 0] * patch).sum((1, 2, 3))
            seen = seen + of_video["positional_embedding"][1 + place]
            tokens.append(seen + of_video["temporal_positional_embedding"][0, time])
    start = nn.functional.layer_norm(torch.stack(tokens), (128,), of_video["ln_pre.weight"], of_video["ln_pre.bias"])
    states = naive_tower(weights, "vision_encoder", start, causal=False)[0]
    video = (
        nn.functional.layer_norm(states, (128,), of_video["ln_post.weight"], of_video["ln_post.bias"])
        @ of_video["proj"]
    )
    start = of_text["token_embedding.weight"][words] + of_text["positional_embedding"][: len(words)]
    states = naive_tower(weights, "text_encoder", start, causal=True)[-1]
    text = nn.functional.layer_norm(states, (64,), of_text["ln_final.weight"], of_text["ln_final.bias"])
    return torch.cosine_similarity(video, text @ of_text["text_projection"], dim=0).item()


def normalised(video: np.ndarray) -> Tensor:
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    return ((torch.from_numpy(video).float() / 255 - mean) / std).permute(0, 3, 1, 2)


def test_overall_consistency_is_the_cosine_of_viclip(viclip):
    backbone = vbench.load_backbone("overall_consistency", str(viclip))
    assert isinstance(backbone, vbench.PromptBackbone)
    assert backbone.description.startswith("viclip, weights ")
    weights = torch.load(viclip / "viclip.pth")["model"]
    start, a, red, cat, end = (NUM_WORDS - 2, *range(NUM_WORDS - 5, NUM_WORDS - 2), NUM_WORDS - 1)
    video = frames(21, 12, 12)  # the size of the network: nothing is scaled
    pictures = normalised(video[[0, 3, 5, 8, 11, 13, 16, 19]])  # in the middle of [0, 2), [2, 5), [5, 7), ...
    found = backbone.agreement(video, "A red cat")
    assert found == pytest.approx(naive_agreement(weights, pictures, [start, a, red, cat, end]), abs=1e-4)
    long, short = (backbone.agreement(video, text) for text in ("a red cat a red cat", "a red cat"))
    assert long == pytest.approx(short, abs=1e-6), "what does not fit is left out, the end stays"
    few = normalised(video[[0, 1, 2, 2, 2, 2, 2, 2]])
    expected = naive_agreement(weights, few, [start, red, end])
    assert backbone.agreement(video[:3], "red") == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match="prompt of every shot"):
        backbone.score(video, fps=8)


def test_a_clip_can_stand_in_for_viclip_where_it_is_named(clip, tmp_path):
    from transformers import CLIPModel

    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((clip / file).read_bytes())
    add_tokenizer(tmp_path)
    backbone = vbench.load_backbone("overall_consistency", str(tmp_path))
    assert isinstance(backbone, vbench.PromptBackbone)
    assert backbone.description.startswith("clip, ")
    assert backbone.description.endswith("mean of 8 single frames")
    video = frames(8, SIDE, SIDE)
    model = CLIPModel.from_pretrained(clip).eval()
    words = torch.tensor([[NUM_WORDS - 2, NUM_WORDS - 4, NUM_WORDS - 1]])
    with torch.inference_mode():
        seen = model.visual_projection(model.vision_model(normalised(video)).pooler_output)
        text = model.text_projection(model.text_model(input_ids=words).pooler_output)[0]
    expected = torch.cosine_similarity((seen / seen.norm(dim=-1, keepdim=True)).mean(0), text, dim=0).item()
    assert backbone.agreement(video, "red") == pytest.approx(expected, abs=1e-5)


class FakePromptBackbone(vbench.PromptBackbone):
    description = "fake"

    def agreement(self, frames: np.ndarray, prompt: str) -> float:
        return len(frames) / len(prompt)


def test_every_shot_is_held_against_its_own_prompt():
    def measured(*prompts: str) -> dict[str, object]:
        shots = (FilmShot(prompt=p, start_frame=5 * i, num_frames=5) for i, p in enumerate(prompts))
        found = measure_film(
            frames(10), Outline(shots=tuple(shots)), fps=8, backbones={"overall_consistency": FakePromptBackbone()}
        )
        return {key: found[key].get("overall_consistency") for key in ("figures", "skipped")}

    assert measured("12345", "12") == {"figures": (1 + 2.5) / 2, "skipped": None}
    assert measured("", "12") == {"figures": 2.5, "skipped": None}
    assert measured("", "") == {"figures": None, "skipped": "its prompts are not known"}


# --- MUSIQ ---------------------------------------------------------------------------------------------------


class FakeMusiq(nn.Module):
    """Stands for pyiqa's network: the brightness of a picture, by a weight."""

    def __init__(self, pretrained: bool = True) -> None:
        super().__init__()
        assert not pretrained, "weights are not to be fetched"
        self.scale = nn.Parameter(torch.zeros(()))
        self.seen: list[Tensor] = []

    def forward(self, picture: Tensor) -> Tensor:
        self.seen.append(picture)
        return picture.mean().view(1, 1) * self.scale


def test_imaging_quality_follows_vbench_on_the_frames_of_musiq(tmp_path, monkeypatch):
    torch.save({"scale": torch.tensor(50.0)}, tmp_path / "musiq.pth")
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    with pytest.raises(ValueError, match="comes from pyiqa, which cannot be imported"):
        vbench.load_backbone("imaging_quality", str(tmp_path))
    modules = {name: ModuleType(name) for name in ("pyiqa", "pyiqa.archs", "pyiqa.archs.musiq_arch")}
    modules["pyiqa.archs.musiq_arch"].MUSIQ = FakeMusiq
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    backbone = vbench.load_backbone("imaging_quality", str(tmp_path / "musiq.pth"))
    video = frames(3, 30, 40)
    assert backbone.score(video, fps=8) == pytest.approx(video.mean() / 255 * 50 / 100, abs=1e-6)
    torch.testing.assert_close(backbone._model.seen[2][0].permute(1, 2, 0), torch.from_numpy(video[2]) / 255)
    backbone.score(frames(1, 200, 1030), fps=8)
    assert backbone._model.seen[-1].shape == (1, 3, 99, 512)
    torch.save({"other": torch.zeros(2)}, tmp_path / "musiq.pth")
    with pytest.raises(ValueError, match="does not hold the weights of pyiqa's MUSIQ"):
        vbench.load_backbone("imaging_quality", str(tmp_path))


# --- RAFT ----------------------------------------------------------------------------------------------------


class FakeRaft(nn.Module):
    """Stands for torchvision's network: every pixel moves to the right, by what its only weight says."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, image1: Tensor, image2: Tensor, num_flow_updates: int = 12) -> list[Tensor]:
        self.seen.append((image1, image2))
        flow = torch.stack([self.shift.expand(image1[:, 0].shape), torch.zeros_like(image1[:, 0])], 1)
        return [flow * 99] * (num_flow_updates - 1) + [flow] * (num_flow_updates == 20)


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["torchvision", "torchvision.models", "torchvision.models.optical_flow"]
    modules = {name: ModuleType(name) for name in names}
    modules[names[-1]].raft_large = lambda weights, progress: FakeRaft()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def raft(folder: Path, shift: float) -> vbench.Backbone:
    file = folder / f"raft_{shift}.safetensors"
    safetensors.torch.save_file({"shift": torch.tensor(shift)}, file)
    return vbench.load_backbone("dynamic_degree", str(file))


@pytest.mark.usefixtures("torchvision")
def test_dynamic_degree_follows_vbench_on_the_flow_of_raft(tmp_path):
    video = frames(6, 132, 150)
    limit = 6 * 132 / 256
    assert [raft(tmp_path, limit * factor).score(video, fps=8) for factor in (0.99, 1.01)] == [0, 1]
    assert [raft(tmp_path, 2 * limit * factor).score(video, fps=4) for factor in (0.99, 1.01)] == [0, 1]
    backbone = raft(tmp_path, 5.0)
    assert backbone.score(video[:1], fps=8) == 0
    backbone.score(video, fps=16)
    [(first, second)] = backbone._model.seen
    assert first.shape == (2, 3, 136, 152), "every second frame, padded to multiples of 8"
    inner = first[:, :, 2:-2, 1:-1].permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(inner, video[[0, 2]] / 127.5 - 1, atol=1e-6)
    assert torch.equal(first[:, :, 0], first[:, :, 2])
    assert torch.equal(first[1], second[0])
    assert backbone.description.startswith("raft, weights ")
    backbone._model.seen.clear()
    backbone.score(video, fps=8)
    assert [len(first) for first, _ in backbone._model.seen] == [4, 1], "every pair, a few at a time"


@pytest.mark.usefixtures("torchvision")
def test_films_too_small_for_raft_are_left_out_and_the_rest_is_measured(tmp_path):
    video = frames(4, 120, 150)
    shots = Outline(shots=(FilmShot(prompt="", start_frame=0, num_frames=4),))
    found = measure_film(video, shots, fps=8, backbones={"dynamic_degree": raft(tmp_path, 9.0)})
    assert found["skipped"]["dynamic_degree"] == "RAFT needs frames of more than 120 pixels a side, got 150 x 120"
    assert found["figures"]["temporal_flickering"] is not None


@pytest.mark.usefixtures("torchvision")
def test_files_that_are_no_weights_of_raft_are_refused(tmp_path):
    def refused(source: Path) -> str:
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (messages are compared below)
            vbench.load_backbone("dynamic_degree", str(source))
        return str(caught.value)

    torch.save({"fnet.weight": torch.zeros(2)}, tmp_path / "raft-things.pth")
    assert "raft_large_C_T_V1" in refused(tmp_path / "raft-things.pth")
    torch.save(FakeRaft(), tmp_path / "module.pth")
    assert "holds more than weights" in refused(tmp_path / "module.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    assert "tensors by name" in refused(tmp_path / "list.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"12")
    assert "is damaged" in refused(tmp_path / "cut.safetensors")
    assert "found cut.safetensors, list.pth" in refused(tmp_path)
    assert "neither a folder" in refused(tmp_path / "nothing")


def test_raft_without_torchvision_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ValueError, match=r"comes from torchvision, which cannot be imported .* extra 'vbench'"):
        vbench.load_backbone("dynamic_degree", str(tmp_path))


def test_every_network_can_be_loaded_or_is_said_to_have_no_architecture():
    needed = {name for name, figure in FIGURES.items() if figure.group == "vbench" and figure.backbone}
    assert needed == vbench.BACKBONE_KINDS.keys() | vbench.NO_ARCHITECTURE.keys()
    assert not vbench.BACKBONE_KINDS.keys() & vbench.NO_ARCHITECTURE.keys()
