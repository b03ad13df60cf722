"""Backbones with random weights, against the same arithmetic written out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from arlon.evaluation import vbench

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


def test_subject_consistency_is_that_of_class_tokens(dino):
    from transformers import ViTModel

    video = frames(3, 224, 224)  # the size of the network: nothing is scaled
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pictures = ((torch.from_numpy(video).float() / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.inference_mode():
        tokens = ViTModel.from_pretrained(dino, add_pooling_layer=False).eval()(pictures).last_hidden_state[:, 0]
    backbone = vbench.load_backbone("subject_consistency", str(dino))
    assert backbone.score(video) == pytest.approx(naive_consistency(tokens), abs=1e-5)
    assert backbone.score(np.repeat(video[:1], 3, axis=0)) == pytest.approx(1)
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
    assert background.score(video) == pytest.approx(naive_consistency(embedded), abs=1e-5)
    head = safetensors.torch.load_file(clip / vbench.AESTHETIC_HEAD)
    unit = embedded / embedded.norm(dim=-1, keepdim=True)
    expected = ((unit * head["weight"]).sum(-1) + head["bias"]).mean().item() / 10
    aesthetic = vbench.load_backbone("aesthetic_quality", str(clip))
    assert aesthetic.score(video) == pytest.approx(expected, abs=1e-5)


def test_pictures_are_scaled_as_a_reference_scales_them():
    """Enlarging needs no anti-aliasing, so that PIL's bilinear filter is the truth, up to its rounding."""
    picture = frames(1, 20, 30)[0]
    expected = np.asarray(Image.fromarray(picture).resize((48, 32), Image.Resampling.BILINEAR)) / 255
    found = vbench._prepare(picture[None], "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), side=32)[0]
    np.testing.assert_allclose(found.permute(1, 2, 0).numpy(), expected, atol=1.5 / 255)


def test_what_is_no_backbone_is_refused_by_name(dino, clip, tmp_path):
    def refused(dimension: str, source: object) -> str:
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (messages are compared below)
            vbench.load_backbone(dimension, str(source))
        return str(caught.value)

    assert "no config.json" in refused("subject_consistency", tmp_path)
    assert "'clip', expected 'vit'" in refused("subject_consistency", clip)
    assert "neither a folder" in refused("background_consistency", "nothing-here")
    assert "aesthetic_head.safetensors" in refused("aesthetic_quality", dino)
    assert "no backbone can be given for 'dynamic_degree'" in refused("dynamic_degree", dino)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    assert "no weights in safetensors" in refused("subject_consistency", tmp_path)


def test_missing_weights_are_not_made_up(dino, tmp_path):
    (tmp_path / "config.json").write_bytes((dino / "config.json").read_bytes())
    tensors = safetensors.torch.load_file(dino / "model.safetensors")
    tensors.pop(sorted(tensors)[-1])
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights"):
        vbench.load_backbone("subject_consistency", str(tmp_path))
