"""Files of the networks behind VBench: looked at before they are loaded, and never run.

A network is a folder in the layout of transformers, read from safetensors only, or a file of weights, read as tensors
only.
"""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from arlon.checkpoint import read_json
from arlon.errors import one_line
from arlon.files import hash_file


def check_kind(folder: Path, kind: str, wanted: str) -> None:
    """Refuse a folder that is not a network of a kind, by the type its configuration names.

    Raises:
        ValueError: If it is not; the message says why.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"'{folder}' is not {wanted}: it has no config.json")
    found = read_json(config, "a configuration").get("model_type")
    if found != kind:
        raise ValueError(f"'{folder}' is not {wanted}: its model_type is {found!r}, expected {kind!r}")
    if not list(folder.glob("*.safetensors")):
        raise ValueError(f"'{folder}' has no weights in safetensors; other formats are not loaded")


def describe(folder: Path) -> str:
    """Kind, sizes and hash of the weights; VBench's own figures hold for VBench's weights only."""
    config = read_json(folder / "config.json", "a configuration")
    sizes = config.get("vision_config", config)
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(bytes.fromhex(hash_file(file)))
    names = ("num_hidden_layers", "hidden_size", "patch_size")
    layers, width, patch = (sizes.get(name, "?") for name in names)
    return f"{config['model_type']}, {layers} layers of {width}, patch {patch}, weights {digest.hexdigest()[:12]}"


def load_network(model_class: Any, folder: Path, device: str, **options: Any) -> Any:
    """A network with every weight from the folder; transformers would make up those that are missing.

    Raises:
        ValueError: If it cannot be loaded, or lacks weights.
    """
    from transformers.utils import logging

    verbosity, shows_progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # what is missing is reported below, and a text tower that is left out is no news
    logging.disable_progress_bar()
    try:
        model, info = model_class.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True, **options
        )
    except Exception as error:  # errors of several libraries
        raise ValueError(f"cannot load '{folder}': {one_line(error, 200)}") from error
    finally:
        logging.set_verbosity(verbosity)
        if shows_progress:
            logging.enable_progress_bar()
    missing = [*info["missing_keys"], *map(str, info.get("mismatched_keys", ()))]
    if missing:
        raise ValueError(f"'{folder}' lacks {len(missing)} weights, such as {sorted(missing)[0]}")
    return model.eval().requires_grad_(False).to(device)


def load_tokenizer(folder: Path, num_words: int) -> Any:
    """CLIP's tokenizer, from the files of transformers in a folder.

    Raises:
        ValueError: If there is none, it cannot be loaded, or it has more than `num_words` tokens.
    """
    from transformers import CLIPTokenizer

    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        raise ValueError(f"'{folder}' has no tokenizer: put CLIP's vocab.json and merges.txt, or tokenizer.json, there")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # errors of several libraries
        raise ValueError(f"cannot load the tokenizer in '{folder}': {short_message(error)}") from error
    if len(tokenizer) > num_words:
        raise ValueError(f"the tokenizer in '{folder}' has {len(tokenizer)} tokens, the network {num_words}")
    return tokenizer


def tokens_of(tokenizer: Any, prompt: str, longest: int) -> list[int]:
    """Tokens of a prompt with start and end; of a longer one the first ones, and the end."""
    tokens = tokenizer(prompt)["input_ids"]
    return tokens if len(tokens) <= longest else [*tokens[: longest - 1], tokens[-1]]


def weight_file(source: Path) -> Path:
    """The file itself, or the only file of weights in a folder.

    Raises:
        ValueError: If the folder holds another number of them.
    """
    if source.is_file():
        return source
    files = sorted(file for file in source.iterdir() if file.suffix in (".safetensors", ".pth", ".pt"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise ValueError(f"'{source}' must hold one file of weights (.safetensors, .pth), found {found}: name the file")
    return files[0]


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Tensors by name; nothing in the file is run.

    Raises:
        ValueError: If it is damaged, or holds anything else.
    """
    try:
        if file.suffix == ".safetensors":
            tensors = safetensors.torch.load(file.read_bytes())
        else:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"'{file}' is damaged, or holds more than weights: {short_message(error)}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"'{file}' must hold tensors by name, and nothing else")
    return tensors


def short_hash(file: Path) -> str:
    """First 12 digits of the SHA-256 of a file."""
    return hash_file(file)[:12]


def short_message(error: Exception) -> str:
    """The whole message of an error in one line of at most 200 characters; details often stand in later lines."""
    return " ".join(str(error).split())[:200]
