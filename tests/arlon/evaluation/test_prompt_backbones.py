"""Backbones that hold a shot against its prompt, against the same arithmetic written out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from arlon.evaluation.film import FilmShot, Outline, measure_film
from arlon.evaluation.vbench import networks as backbones
from tests.arlon.evaluation.conftest import SIDE, frames

pytestmark = pytest.mark.slow  # importing transformers alone takes seconds


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
    backbone = backbones.load_backbone("overall_consistency", str(viclip))
    assert isinstance(backbone, backbones.PromptBackbone)
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
    backbone = backbones.load_backbone("overall_consistency", str(tmp_path))
    assert isinstance(backbone, backbones.PromptBackbone)
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


class FakePromptBackbone(backbones.PromptBackbone):
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
