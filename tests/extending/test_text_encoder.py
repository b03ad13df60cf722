"""A text encoder from outside the package: registered under a kind, or found by an entry point."""

from __future__ import annotations

import json
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from arlon.errors import ConfigError
from arlon.text.encoders import (
    TextEncoderConfig,
    TextFeatures,
    load_text_encoder,
    register_text_encoder,
    save_text_encoder,
)
from arlon.text.sources import describe_source, is_cached


class WordHashEncoder:
    """Every word has fixed random features that depend on its letters alone; there are no weights to load."""

    dim = 8

    def __init__(
        self, source: str | None = None, *, max_length: int, clean: bool, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        self.max_length, self.device, self.dtype = max_length, device, dtype

    def encode(self, prompts: Sequence[str], *, batch_size: int = 1) -> TextFeatures:
        tokens = torch.zeros(len(prompts), self.max_length, self.dim)
        mask = torch.zeros(len(prompts), self.max_length, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            for place, word in enumerate(prompt.split()[: self.max_length]):
                generator = torch.Generator().manual_seed(zlib.crc32(word.encode()))
                tokens[row, place] = torch.randn(self.dim, generator=generator)
                mask[row, place] = True
        pooled = tokens.sum(1) / mask.sum(1, keepdim=True)
        return TextFeatures(tokens, mask, pooled).to(self.device, self.dtype)


register_text_encoder("word_hash", WordHashEncoder)

PLUGIN = """
class LetterEncoder:
    dim = 4

    def __init__(self, source=None, *, max_length, clean, device, dtype):
        self.max_length = max_length

from arlon.text.encoders import register_text_encoder
register_text_encoder("letters", LetterEncoder)
"""
USE_PLUGIN = """
import sys
from arlon.text.encoders import load_text_encoder
encoder = load_text_encoder(sys.argv[1])
print(type(encoder).__name__, encoder.max_length)
"""


def test_a_model_folder_names_the_encoder_by_its_kind(tmp_path: Path) -> None:
    save_text_encoder(tmp_path, TextEncoderConfig(kind="word_hash", max_length=5, dim=8))
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "WordHashEncoder"
    encoder = load_text_encoder(tmp_path)
    assert isinstance(encoder, WordHashEncoder)
    features = encoder.encode(["a red circle", "a red circle moves left and right"])
    assert features.tokens.shape == (2, 5, 8)
    assert features.mask.sum(1).tolist() == [3, 5]
    assert torch.equal(features.tokens[0, :3], features.tokens[1, :3])


def test_arlon_knows_where_it_comes_from(tmp_path: Path) -> None:
    assert is_cached(TextEncoderConfig(kind="word_hash"))
    assert is_cached(TextEncoderConfig(kind="word_hash", source=str(tmp_path)))
    missing = TextEncoderConfig(kind="word_hash", source=str(tmp_path / "missing"))
    assert not is_cached(missing)
    assert str(tmp_path / "missing") in describe_source(missing)


def test_a_wrong_width_is_refused(tmp_path: Path) -> None:
    save_text_encoder(tmp_path, TextEncoderConfig(kind="word_hash", max_length=5, dim=16))
    with pytest.raises(ValueError, match="16"):
        load_text_encoder(tmp_path)


def test_an_unknown_kind_is_refused_with_the_nearest(tmp_path: Path) -> None:
    save_text_encoder(tmp_path, TextEncoderConfig(kind="word_hash"))
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"kind": "word_hsh"}))
    with pytest.raises(ConfigError, match=r"'word_hsh'.*'word_hash'"):
        load_text_encoder(tmp_path)


def test_a_name_is_taken_once() -> None:
    register_text_encoder("word_hash", WordHashEncoder)  # importing a module twice does no harm
    with pytest.raises(ValueError, match="'minilm'"):
        register_text_encoder("minilm", WordHashEncoder)


def test_an_installed_package_is_found_by_its_entry_point(tmp_path: Path) -> None:
    """As the command line and Ray workers do, a fresh process knows the kind without importing the package."""
    (tmp_path / "letters.py").write_text(PLUGIN)
    info = tmp_path / "letters-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: letters\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[arlon.plugins]\nletters = letters\n")
    (tmp_path / "model").mkdir()
    config = {"_format": 1, "kind": "letters", "max_length": 6, "dim": 4}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    paths = f"{tmp_path}:{Path(__file__).parents[2]}"
    result = subprocess.run(
        [sys.executable, "-c", USE_PLUGIN, str(tmp_path / "model")],
        env={"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout == "LetterEncoder 6\n", result.stderr
