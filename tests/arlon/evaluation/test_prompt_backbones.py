"""Backbones that hold a shot against its prompt, against the same arithmetic written out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

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


def normalised(video: np.ndarray) -> Tensor:
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    return ((torch.from_numpy(video).float() / 255 - mean) / std).permute(0, 3, 1, 2)


def test_overall_consistency_is_the_cosine_of_the_mean_frame_and_the_prompt(clip, tmp_path):
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
    with pytest.raises(ValueError, match="prompt of every shot"):
        backbone.score(video, fps=8)


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
