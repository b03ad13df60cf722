"""The text encoders that come with Arlon, and loading any encoder from its component folder.

T5 (v1.1-XXL with the released weights, 4096 wide, 300 tokens; Open-Sora v1.2) and all-MiniLM-L6-v2 (384 wide, the
small default). Both are frozen and give the last hidden state, right-padded to a fixed length. Other packages add their
own with `register_text_encoder`.

A prompt's features do not depend on what else is encoded with it: padding is always to `max_length`, padded
positions are zero, and prompts go through the network one at a time unless `batch_size` says otherwise.

Dimension key
    B  prompts    L  text tokens (`max_length`)    E  width of the encoder
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from arlon.components import CONFIG_NAME, FORMAT, check_precisions, component_config, find_weights, read_json
from arlon.config import config_from_dict, config_to_dict
from arlon.errors import ConfigError, one_line, shorten_list
from arlon.files import make_folder, write_json
from arlon.memory import align_weights
from arlon.text.cleaning import clean_caption
from arlon.text.interface import MINILM_DIM, TextEncoder, TextEncoderConfig, TextFeatures, text_encoder_loader
from arlon.text.interface import register_text_encoder as register_text_encoder  # the place to look for it
from arlon.text.sources import T5_DIM, find_minilm, find_t5, tokenizer_folder


class _TransformerEncoder:
    """Common part of both encoders: tokenise to a fixed length, run the frozen network, mask and pool."""

    def __init__(self, tokenizer: Any, network: Any, *, dim: int, max_length: int, clean: bool) -> None:
        self.tokenizer = tokenizer
        self.network = network.eval().requires_grad_(False)
        align_weights(self.network)
        self.dim = dim
        self.max_length = max_length
        self.clean = clean

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights."""
        return sum(tensor.nbytes for tensor in (*self.network.parameters(), *self.network.buffers()))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, batch_size: int = 1) -> TextFeatures:
        """Encode prompts.

        Args:
            prompts: B texts; an empty text is allowed and gives the features of its special tokens.
            batch_size: Prompts that pass the network together. More than 1 is faster on a GPU, but the last
                bits may then depend on the company.

        Returns:
            Features in float32 on the device of the network.

        Raises:
            TypeError: If `prompts` is one text instead of a list, or holds something else than text.
            ValueError: If `prompts` is empty.
        """
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise TypeError(f"prompts must be a list of texts, got {prompts!r}")
        if not prompts:
            raise ValueError("no prompts to encode: expected at least one")
        texts = [clean_caption(prompt) if self.clean else prompt for prompt in prompts]
        return TextFeatures.cat(
            [self._encode_batch(texts[i : i + batch_size]) for i in range(0, len(texts), batch_size)]
        )

    def _encode_batch(self, texts: list[str]) -> TextFeatures:
        inputs = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        ids, mask = (inputs[key].to(self.network.device) for key in ("input_ids", "attention_mask"))
        hidden = self.network(input_ids=ids, attention_mask=mask).last_hidden_state.float()  # (B, L, E)
        tokens = hidden * mask[..., None]
        pooled = tokens.sum(1) / mask.sum(1, keepdim=True)
        return TextFeatures(tokens, mask.bool(), pooled)


class MiniLMEncoder(_TransformerEncoder):
    """all-MiniLM-L6-v2: six layers, 384 wide, English; its weights are checked against a pinned SHA-256."""

    def __init__(
        self,
        source: str | Path | None = None,
        *,
        max_length: int = 48,
        clean: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Load the encoder.

        Args:
            source: Folder with its files; None looks in the folder that `ARLON_TEXT_ENCODER` names, the
                installed package, the Hugging Face cache, and last on the hub.
            max_length: Tokens a prompt is padded or cut to, with the two special ones.
            clean: Clean prompts first.
            device: Where it runs.
            dtype: Of its weights; features are float32 all the same.

        Raises:
            FileNotFoundError: If the encoder is nowhere; the message says how to get it.
            ValueError: If the weights found are not the pinned ones.
        """
        from transformers import AutoTokenizer, BertModel

        folder = find_minilm(source)
        with _no_progress_bar():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            network: Any = BertModel.from_pretrained(folder, local_files_only=True, dtype=dtype, use_safetensors=True)
        super().__init__(tokenizer, network.to(device), dim=MINILM_DIM, max_length=max_length, clean=clean)

    @staticmethod
    def network(config: TextEncoderConfig) -> tuple[type, Any]:
        """Class and config of the network."""
        from transformers import BertConfig, BertModel

        return BertModel, BertConfig(hidden_size=MINILM_DIM, num_hidden_layers=6, intermediate_size=1536)


class T5Encoder(_TransformerEncoder):
    """The encoder half of T5; `attention_mask` is used inside it, as in Open-Sora v1.2."""

    def __init__(
        self,
        source: str | Path | None = None,
        *,
        max_length: int = 300,
        clean: bool = True,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Load the encoder. Weights are read from safetensors only.

        Args:
            source: Folder or hub id; None is the v1.1-XXL that the released base needs. The tokenizer lies
                beside the weights or in a sibling folder `tokenizer`.
            max_length: Tokens a prompt is padded or cut to.
            clean: Clean prompts first, as the released models were trained with.
            device: Where it runs.
            dtype: Of its weights; bfloat16 halves the memory. Features are float32 all the same.

        Raises:
            FileNotFoundError: If the weights or the tokenizer cannot be found; the message says how to get them.
            ValueError: If they are damaged or not those of a T5.
        """
        folder = find_t5(source)
        check_precisions(find_weights(folder), "T5")
        from transformers import AutoTokenizer, T5EncoderModel

        tokenizer = _from_pretrained(AutoTokenizer, tokenizer_folder(folder))
        options = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # what does not fit is refused below
        network, info = _from_pretrained(T5EncoderModel, folder, dtype=dtype, use_safetensors=True, **options)
        _refuse_misfits(folder, info)
        super().__init__(tokenizer, network.to(device), dim=network.config.d_model, max_length=max_length, clean=clean)

    @staticmethod
    def network(config: TextEncoderConfig) -> tuple[type, Any]:
        """Class and config of the network: of the files in a local folder, else those of the v1.1-XXL."""
        from transformers import T5Config, T5EncoderModel

        if config.source is not None and (Path(config.source) / CONFIG_NAME).is_file():
            return T5EncoderModel, T5Config(**component_config(config.source))
        return T5EncoderModel, T5Config(
            d_model=T5_DIM, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
        )


def save_text_encoder(folder: str | Path, config: TextEncoderConfig) -> Path:
    """Write the component folder that names an encoder; its weights are not copied."""
    make_folder(Path(folder))
    write_json(Path(folder) / CONFIG_NAME, _component_values(config))
    return Path(folder)


def t5_component(source: str | Path) -> dict[str, Any]:
    """`config.json` of a component that names a T5 with the settings of the released base.

    Args:
        source: Folder of the T5, or a hub id; that is taken for a v1.1-XXL.
    """
    local = Path(source).is_dir()
    dim = component_config(source)["d_model"] if local else T5_DIM
    return _component_values(TextEncoderConfig(kind="t5", source=str(source), max_length=300, dim=dim, clean=True))


def _component_values(config: TextEncoderConfig) -> dict[str, Any]:
    load = text_encoder_loader(config.kind)
    name = getattr(load, "__name__", type(load).__name__)
    return {"_class_name": name, "_format": FORMAT, **config_to_dict(config)}


def load_text_encoder(
    folder: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> TextEncoder:
    """Load the encoder that a component folder names; a released T5 folder is one too.

    Args:
        folder: Folder with `config.json`: our own (see `TextEncoderConfig`), or that of a T5 encoder.
        device: Where it runs.
        dtype: Of its weights.

    Raises:
        FileNotFoundError: If the folder or the encoder is missing.
        ValueError: If the config or the weights are not as expected.
    """
    config = read_text_config(folder)
    options = {"max_length": config.max_length, "clean": config.clean, "device": device, "dtype": dtype}
    encoder = text_encoder_loader(config.kind)(config.source, **options)
    if encoder.dim != config.dim:
        raise ValueError(f"{str(folder)!r} states a width of {config.dim}, but its encoder has {encoder.dim}")
    return encoder


def read_text_config(folder: str | Path) -> TextEncoderConfig:
    """Config of a text encoder folder; its `source`, if it is a folder, can be found from anywhere.

    Raises:
        FileNotFoundError: If the folder or its `config.json` is missing.
        ConfigError: If the config is not as expected.
    """
    folder = Path(folder)
    if read_json(folder / CONFIG_NAME, "a text encoder folder").get("model_type") == "t5":
        values = {name: value for name, value in t5_component(folder).items() if not name.startswith("_")}
        return config_from_dict(TextEncoderConfig, values)
    try:
        config = config_from_dict(TextEncoderConfig, component_config(folder))
    except ValueError as error:
        raise ConfigError(f"{str(folder / CONFIG_NAME)!r}: {error}") from error
    if config.source is not None and (folder / config.source).is_dir():
        return replace(config, source=str(folder / config.source))
    return config


def network_config(config: TextEncoderConfig) -> tuple[type, Any]:
    """Class and config of the network of an encoder, from its files if they are there, without any weights.

    Raises:
        ValueError: If its kind does not tell them.
    """
    network = getattr(text_encoder_loader(config.kind), "network", None)
    if network is None:
        raise ValueError(
            f"what a text encoder of the kind {config.kind!r} costs is not known: its class has no function 'network', "
            "see arlon.text.interface.TextEncoderLoader"
        )
    return network(config)


def _from_pretrained(kind: Any, folder: Path, **options: Any) -> Any:
    """`kind.from_pretrained` from the disk alone: transformers would download, and convert on the hub, behind it."""
    with _no_progress_bar():
        try:
            return kind.from_pretrained(folder, local_files_only=True, **options)
        except Exception as error:  # transformers raises errors of several libraries
            raise ValueError(f"cannot load the T5 text encoder in {str(folder)!r}: {one_line(error)}") from error


def _refuse_misfits(folder: Path, info: Mapping[str, Any]) -> None:
    """Refuse weights that transformers would make up, or leave out, for the encoder half of a T5."""
    extra = (name for name in info["unexpected_keys"] if not name.startswith(("decoder.", "lm_head.")))
    shapes = {name: (tuple(found), tuple(wanted)) for name, found, wanted in info["mismatched_keys"]}
    problems = [
        *(f"missing {name}" for name in sorted(info["missing_keys"])),
        *(f"unexpected {name}" for name in sorted(extra)),
        *(f"{name} is {found}, expected {wanted}" for name, (found, wanted) in sorted(shapes.items())),
    ]
    if problems:
        raise ValueError(
            f"the weights in {str(folder)!r} do not fit the T5 of its config.json: "
            f"{shorten_list(problems, separator='; ')}. Copy them again, or name another folder"
        )


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keep the loading bar of transformers away from a program's own output."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
