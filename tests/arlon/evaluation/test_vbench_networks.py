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
from torch import Tensor, nn

from arlon.evaluation.film import FilmShot, Outline, measure_film
from arlon.evaluation.metric_table import FIGURES
from arlon.evaluation.vbench import networks as backbones
from tests.arlon.evaluation.conftest import frames

pytestmark = pytest.mark.slow  # importing transformers alone takes seconds


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    folder = tmp_path_factory.mktemp("dino")
    ViTModel(ViTConfig(**sizes, image_size=224, patch_size=32), add_pooling_layer=False).save_pretrained(folder)
    return folder


def naive_consistency(features: torch.Tensor) -> float:
    total = 0.0
    for i in range(1, len(features)):
        cosines = [torch.cosine_similarity(features[i], features[j], dim=0).item() for j in (i - 1, 0)]
        total += sum(max(0.0, value) for value in cosines) / 2
    return total / (len(features) - 1)


def test_a_backbone_is_loaded_without_a_word(dino, capsys):
    backbones.load_backbone("subject_consistency", str(dino))
    assert capsys.readouterr() == ("", "")


def test_subject_consistency_is_that_of_class_tokens(dino):
    from transformers import ViTModel

    video = frames(3, 224, 224)  # the size of the network: nothing is scaled
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pictures = ((torch.from_numpy(video).float() / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.inference_mode():
        tokens = ViTModel.from_pretrained(dino, add_pooling_layer=False).eval()(pictures).last_hidden_state[:, 0]
    backbone = backbones.load_backbone("subject_consistency", str(dino))
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
    background = backbones.load_backbone("background_consistency", str(clip))
    assert background.score(video, fps=8) == pytest.approx(naive_consistency(embedded), abs=1e-5)
    head = safetensors.torch.load_file(clip / backbones.AESTHETIC_HEAD)
    unit = embedded / embedded.norm(dim=-1, keepdim=True)
    expected = ((unit * head["weight"]).sum(-1) + head["bias"]).mean().item() / 10
    aesthetic = backbones.load_backbone("aesthetic_quality", str(clip))
    assert aesthetic.score(video, fps=8) == pytest.approx(expected, abs=1e-5)


def test_what_is_no_backbone_is_refused_by_name(dino, clip, tmp_path):
    def refused(dimension: str, source: object) -> str:
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (messages are compared below)
            backbones.load_backbone(dimension, str(source))
        return str(caught.value)

    assert "no config.json" in refused("subject_consistency", tmp_path)
    assert "'clip', expected 'vit'" in refused("subject_consistency", clip)
    assert "neither a folder" in refused("background_consistency", "nothing-here")
    assert "aesthetic_head.safetensors" in refused("aesthetic_quality", dino)
    assert "no backbone can be given for 'motion_smoothness'" in refused("motion_smoothness", dino)
    assert "no config.json" in refused("overall_consistency", tmp_path)
    assert "must hold one file of weights" in refused("dynamic_degree", tmp_path)
    assert "has no tokenizer" in refused("overall_consistency", clip)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    assert "no weights in safetensors" in refused("subject_consistency", tmp_path)


def test_missing_weights_are_not_made_up(dino, tmp_path):
    (tmp_path / "config.json").write_bytes((dino / "config.json").read_bytes())
    tensors = safetensors.torch.load_file(dino / "model.safetensors")
    tensors.pop(sorted(tensors)[-1])
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights"):
        backbones.load_backbone("subject_consistency", str(tmp_path))


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
        backbones.load_backbone("imaging_quality", str(tmp_path))
    modules = {name: ModuleType(name) for name in ("pyiqa", "pyiqa.archs", "pyiqa.archs.musiq_arch")}
    modules["pyiqa.archs.musiq_arch"].MUSIQ = FakeMusiq
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    backbone = backbones.load_backbone("imaging_quality", str(tmp_path / "musiq.pth"))
    video = frames(3, 30, 40)
    assert backbone.score(video, fps=8) == pytest.approx(video.mean() / 255 * 50 / 100, abs=1e-6)
    torch.testing.assert_close(backbone._model.seen[2][0].permute(1, 2, 0), torch.from_numpy(video[2]) / 255)
    backbone.score(frames(1, 200, 1030), fps=8)
    assert backbone._model.seen[-1].shape == (1, 3, 99, 512)
    torch.save({"other": torch.zeros(2)}, tmp_path / "musiq.pth")
    with pytest.raises(ValueError, match="does not hold the weights of pyiqa's MUSIQ"):
        backbones.load_backbone("imaging_quality", str(tmp_path))


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


def raft(folder: Path, shift: float) -> backbones.Backbone:
    file = folder / f"raft_{shift}.safetensors"
    safetensors.torch.save_file({"shift": torch.tensor(shift)}, file)
    return backbones.load_backbone("dynamic_degree", str(file))


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
            backbones.load_backbone("dynamic_degree", str(source))
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
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "raft.safetensors")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ValueError, match=r"comes from torchvision, which cannot be imported .* extra 'vbench'"):
        backbones.load_backbone("dynamic_degree", str(tmp_path))


def test_every_network_can_be_loaded_or_is_said_to_have_no_architecture():
    needed = {name for name, figure in FIGURES.items() if figure.group == "vbench" and figure.backbone}
    assert needed == backbones.BACKBONE_KINDS.keys() | backbones.NO_ARCHITECTURE.keys()
    assert not backbones.BACKBONE_KINDS.keys() & backbones.NO_ARCHITECTURE.keys()
