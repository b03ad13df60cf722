"""The text encoder of a training: where it runs, in what precision, and that it goes when the captions are encoded."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from arlon.text.encoders import TextFeatures
from stages import data
from stages.config import DataConfig


class RingEncoder:
    """An encoder that only the collector of reference rings frees."""

    def __init__(self) -> None:
        self.ring = self

    def encode(self, prompts: list[str], *, batch_size: int) -> TextFeatures:
        tokens = torch.full((len(prompts), 4, 2), float(batch_size))
        return TextFeatures(tokens, torch.ones(len(prompts), 4, dtype=torch.bool), tokens.mean(dim=1))


@pytest.mark.parametrize(("has_gpu", "device"), [(True, "cuda"), (False, "cpu")])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_encoder_is_put_on_the_gpu_in_the_precision_of_the_config(
    monkeypatch: pytest.MonkeyPatch, has_gpu: bool, device: str, precision: Any
) -> None:
    made: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(data, "MiniLMEncoder", lambda **options: made.append(("minilm", options)))
    monkeypatch.setattr(data, "load_text_encoder", lambda folder, **options: made.append((folder, options)))
    for name in ("minilm", "weights/t5"):
        data.make_text_encoder(DataConfig(text_encoder=name, text_length=7, text_precision=precision))
    options = {"device": device, "dtype": getattr(torch, precision)}
    assert made == [("minilm", {"max_length": 7, **options}), ("weights/t5", options)]


def test_the_encoder_is_freed_when_the_captions_are_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref] = []

    def make(config: DataConfig) -> RingEncoder:
        encoder = RingEncoder()
        made.append(weakref.ref(encoder))
        return encoder

    monkeypatch.setattr(data, "make_text_encoder", make)
    config = DataConfig(cache_dir=str(tmp_path), text_length=4)
    texts = data.load_texts(config, ["a", "b", "a"])
    assert [encoder() for encoder in made] == [None]
    assert texts.features("b")[0].shape == (4, 2)
    data.load_texts(config, ["b", "a"])
    assert len(made) == 1, "nothing is missing"


def test_features_of_another_precision_are_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "make_text_encoder", lambda config: RingEncoder())
    data.load_texts(DataConfig(cache_dir=str(tmp_path), text_length=4), ["a"])
    half = DataConfig(cache_dir=str(tmp_path), text_length=4, text_precision="bfloat16")
    assert "a" not in data.open_texts(half)
    data.load_texts(half, ["a"])
    assert "a" in data.open_texts(half)
