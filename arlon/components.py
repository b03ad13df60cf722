"""Component folders: one model as `config.json` + `model.safetensors`.

`config.json` holds the fields of the model's config dataclass, `_class_name` and `_format`; weights may be
sharded (`model.safetensors.index.json`), and the `diffusion_pytorch_model` spelling is read too. Released
Hugging Face folders are component folders: keys that any of their configs has are passed over.

A loaded model keeps the form of the folder it comes from (`StoredForm`), so that it is saved as the same files: names,
shards, headers, precisions and config text. Only what was changed since has other bytes.

Everything is written to a temporary name and renamed, so that a reader never finds half a file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from arlon.config import config_from_dict, config_to_dict
from arlon.errors import CheckpointError, ConfigError, shorten_list
from arlon.files import (
    hash_bytes,
    hash_file,
    make_folder,
    publish,
    sync_file,
    sync_folder,
    temporary_beside,
    write_text,
)

M = TypeVar("M", bound=nn.Module)

FORMAT = 1
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
WEIGHTS_STEMS = ("model.safetensors", "diffusion_pytorch_model.safetensors")
HASHED_SUFFIXES = (".json", ".safetensors", ".model", ".txt")

HUGGING_FACE_KEYS = frozenset(
    {
        "architectures",
        "auto_map",
        "dtype",
        "model_type",
        "name_or_path",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Keys of released config.json files that are not fields of the model; keys with a leading `_` neither."""
_OF_ANY_PRETRAINED_CONFIG = """
    add_cross_attention attn_implementation chunk_size_feed_forward cross_attention_hidden_size finetuning_task
    gradient_checkpointing id2label is_decoder is_encoder_decoder label2id num_labels output_attentions
    output_hidden_states prefix problem_type pruned_heads return_dict task_specific_params tf_legacy_loss
    tie_encoder_decoder tie_last_hidden_states tie_word_embeddings tokenizer_class torchscript use_bfloat16
    assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens bos_token_id
    decoder_start_token_id diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    encoder_repetition_penalty eos_token_id epsilon_cutoff eta_cutoff exponential_decay_length_penalty
    forced_bos_token_id forced_decoder_ids forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams
    num_return_sequences output_scores pad_token_id remove_invalid_values repetition_penalty return_dict_in_generate
    sep_token_id suppress_tokens target_lookbehind temperature top_k top_p typical_p
"""
PRETRAINED_CONFIG_KEYS = HUGGING_FACE_KEYS | frozenset(_OF_ANY_PRETRAINED_CONFIG.split())
"""What transformers 4 and 5 write into the `config.json` of any model; the second half is about writing text. Not among
them is `quantization_config`: it says that weights are stored in a way that is not read."""


READ_PRECISIONS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
"""Types that floating-point tensors may be stored in: as safetensors names them, and as PyTorch does. Others, such as
float8, need scales that no component here has."""


STORED_TYPES = {
    **{name: getattr(torch, dtype) for name, dtype in READ_PRECISIONS.items()},
    **{f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)},
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types of all tensors that are written again as they were read."""


FULL_PRECISION = frozenset({"rope.freqs"})
"""Parameters that are constants: rounding rotary frequencies turns late frames by a visible angle."""


READABLE = 0o644
HEADER_LENGTH = 8
"""Bytes at the start of a safetensors file that say how long its header is."""


@dataclass(frozen=True)
class StoredForm:
    """How a component folder is written, beside the values of its tensors; plain data, in `stored_form` of a model."""

    config: Any
    """What `config_text` says, as the config dataclass of the model."""
    config_text: str
    """`config.json` as it is."""
    headers: dict[str, bytes]
    """File name -> header of that safetensors file with its length in front: names, places, metadata."""
    index: dict[str, str]
    """File name -> text of the shard index; empty if the weights are one file."""

    def tensors_in(self, file: str) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
        """Precision and shape of the tensors of a file, in the order of their bytes; None: not of `STORED_TYPES`."""
        entries = json.loads(self.headers[file][HEADER_LENGTH:])
        entries.pop("__metadata__", None)
        ordered = sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
        return {name: (STORED_TYPES.get(entry["dtype"]), tuple(entry["shape"])) for name, entry in ordered}

    def dtypes(self) -> dict[str, torch.dtype]:
        """Precision of the tensors."""
        kinds = [item for file in self.headers for item in self.tensors_in(file).items()]
        return {name: dtype for name, (dtype, _) in kinds if dtype is not None}

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether the headers are those of these tensors."""
        stored = {name: kind for file in self.headers for name, kind in self.tensors_in(file).items()}
        return stored == {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def save_component(
    module: nn.Module, folder: str | Path, dtype: torch.dtype | Mapping[str, torch.dtype] | None = None
) -> Path:
    """Write `config.json` and the weights of a model; an existing component is replaced.

    A model that was loaded from a folder is written as that was (`module.stored_form`): byte for byte if nothing has
    changed. The text of its config stays while it means `module.config`; files and headers stay while tensors have the
    names, shapes and precisions that the headers say. Otherwise there are a `config.json` and a `model.safetensors` of
    our own.

    The new weights are complete on disk before the old ones go, and the renames follow at once. Other
    files in the folder are left alone; weights under another name would be stale and are deleted.

    Args:
        module: A model with its config dataclass in `module.config`.
        folder: The component folder; parents are created.
        dtype: Parameters are stored in it, buffers and constants as they are. A mapping says it for every tensor by
            name. None stores all as they are; what was read into float32 from another precision goes back to that.

    Returns:
        The folder.
    """
    folder = Path(folder)
    make_folder(folder)
    form: StoredForm | None = getattr(module, "stored_form", None)
    texts = {CONFIG_NAME: _config_text(module, form)}
    tensors = _storable(module, dtype, form)
    if form is not None and form.fits(tensors):
        texts |= form.index
    else:
        form = None
    names = [WEIGHTS_NAME] if form is None else list(form.headers)
    temporary = {name: temporary_beside(folder / name) for name in names}
    try:
        for name, path in temporary.items():
            if form is None:
                save_file(tensors, path, metadata={"format": "pt"})
            else:
                _write_weights(path, form.headers[name], (tensors[key] for key in form.tensors_in(name)))
            path.chmod(READABLE)  # safetensors makes files that only their owner can read
            sync_file(path)
        for name, path in temporary.items():
            publish(path, folder / name)
        for name, text in texts.items():
            write_text(folder / name, text)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    for file in folder.glob("*.safetensors*"):
        if file.name not in {*names, *texts}:
            file.unlink()
    sync_folder(folder)
    return folder


def _config_text(module: nn.Module, form: StoredForm | None) -> str:
    """The text a model was loaded with, while that is its config; otherwise our own."""
    if form is not None and form.config == module.config:
        return form.config_text
    values = {"_class_name": type(module).__name__, "_format": FORMAT, **config_to_dict(module.config)}
    return json.dumps(values, indent=2) + "\n"


def load_component(
    model_class: type[M],
    folder: str | Path,
    *,
    strict: bool = True,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    **config_overrides: Any,
) -> M:
    """Build a model from a component folder and load its weights; the model is returned in eval mode.

    The model is constructed as usual, so that buffers which are not stored are right, and the global random
    state is put back afterwards. Floating-point weights may be stored as any of `READ_PRECISIONS`. `stored_form` of the
    model says how they were: `save_component` writes them so again.

    Args:
        model_class: The class, with its config dataclass in the class attribute `config_class`.
        folder: A component folder, ours or a released one.
        strict: Refuse missing and unexpected tensors. Wrong shapes are always refused.
        device: Where the model goes.
        dtype: Of its floating-point parameters; buffers keep the precision they were constructed in.
        **config_overrides: Fields of the config that win over `config.json`.

    Raises:
        FileNotFoundError: If the folder, its config or its weights are missing.
        CheckpointError: If the folder holds another class, or the weights are damaged or do not fit.
        ConfigError: If `config.json` or an override does not fit the config class.
    """
    folder = Path(folder)
    config = read_config(model_class, folder, **config_overrides)
    with torch.random.fork_rng(devices=[]):
        model = model_class(config)
    _load_weights(model, find_weights(folder), strict=strict)
    model.stored_form = _stored_form(folder, read_config(model_class, folder) if config_overrides else config)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and name not in FULL_PRECISION:
            parameter.data = parameter.data.to(dtype)
    return model.to(device).eval()


def read_config(model_class: type[nn.Module], folder: str | Path, **overrides: Any) -> Any:
    """Config of a component as its class wants it, from our own `config.json` or a released one.

    A class whose released configs have another layout translates them (`translate_config`).

    Args:
        model_class: The class, with its config dataclass in the class attribute `config_class`.
        folder: The component folder.
        **overrides: Fields that win over `config.json`.

    Raises:
        FileNotFoundError: If the folder or its `config.json` is missing.
        CheckpointError: If the file is not JSON or names another class.
        ConfigError: If a value does not fit the config class.
    """
    values = component_config(folder, model_class)
    translate = getattr(model_class, "translate_config", dict)
    try:
        return config_from_dict(model_class.config_class, translate(values) | overrides)
    except ConfigError as error:
        raise ConfigError(f"{str(Path(folder) / CONFIG_NAME)!r} as {model_class.__name__}: {error}") from error


def component_config(folder: str | Path, model_class: type[nn.Module] | None = None) -> dict[str, Any]:
    """Values of `config.json` without the keys that only Hugging Face libraries or this module read.

    Args:
        folder: A component folder.
        model_class: If given, a folder that says it holds another class is refused.

    Raises:
        FileNotFoundError: If the folder or its `config.json` is missing.
        CheckpointError: If the file is not JSON or names another class.
    """
    folder = Path(folder)
    values = read_json(folder / CONFIG_NAME, "a component folder with config.json and *.safetensors")
    # Only our own files have a format number; released ones may name the class of another code base.
    if model_class is not None and "_format" in values and values.get("_class_name") != model_class.__name__:
        raise CheckpointError(f"{str(folder)!r} holds a {values.get('_class_name')}, expected a {model_class.__name__}")
    own = {field.name for field in fields(model_class.config_class)} if model_class is not None else set()
    released = model_class is not None and "_format" not in values
    ignored = (PRETRAINED_CONFIG_KEYS if released else HUGGING_FACE_KEYS) - own
    return {k: v for k, v in values.items() if not k.startswith("_") and k not in ignored}


def find_weights(folder: str | Path) -> list[Path]:
    """The safetensors files of a component: one, or the shards its index names.

    Raises:
        FileNotFoundError: If there are none, or a shard is missing.
        CheckpointError: If the index is damaged.
    """
    return _find_weights(Path(folder))[0]


def _find_weights(folder: Path) -> tuple[list[Path], Path | None]:
    """The files of `find_weights`, and the index that names them, if one does."""
    for stem in WEIGHTS_STEMS:
        if (folder / stem).is_file():
            return [folder / stem], None
        index = folder / f"{stem}.index.json"
        if index.is_file():
            return _shards(index), index
    raise FileNotFoundError(f"no weights in {str(folder)!r}: expected {' or '.join(WEIGHTS_STEMS)}, or a shard index")


def stored_dtypes(folder: str | Path) -> dict[str, torch.dtype]:
    """Precision of every stored tensor of a component, by name; no weights are read.

    Raises:
        FileNotFoundError: If there are no weights.
        CheckpointError: If a file is damaged.
    """
    found: dict[str, torch.dtype] = {}
    for file in find_weights(folder):
        found |= _open(file, lambda f: {name: f.get_tensor(name).dtype for name in f.keys()})  # noqa: SIM118
    return found


def _stored_form(folder: Path, config: Any) -> StoredForm:
    """The form of a component that has been loaded, whose `config.json` says `config`."""
    files, index = _find_weights(folder)
    headers = {}
    for path in files:
        with path.open("rb") as file:
            length = file.read(HEADER_LENGTH)
            headers[path.name] = length + file.read(int.from_bytes(length, "little"))
    return StoredForm(
        config=config,
        config_text=(folder / CONFIG_NAME).read_bytes().decode(),
        headers=headers,
        index={} if index is None else {index.name: index.read_bytes().decode()},
    )


def check_precisions(files: Iterable[Path], what: str, names: Container[str] | None = None) -> None:
    """Refuse weights that are stored as numbers that are not read; only headers are looked at.

    Args:
        files: The safetensors files of a component.
        what: Whose weights they are, for the message.
        names: Tensors that must be floating-point numbers; None: all.

    Raises:
        CheckpointError: If one is not, or is damaged.
    """
    files, stored = list(files), {}
    for file in files:
        stored |= _open(file, lambda f: {name: f.get_slice(name).get_dtype() for name in f.keys()})  # noqa: SIM118
    wanted = {name: kind for name, kind in stored.items() if names is None or name in names}
    if odd := [f"{name} ({kind})" for name, kind in wanted.items() if kind not in READ_PRECISIONS]:
        raise CheckpointError(
            f"{str(files[0].parent)!r} holds {len(odd)} {what} tensors of a type that is not supported: "
            f"{shorten_list(odd)}; expected {', '.join(READ_PRECISIONS.values())}: get the weights that are not "
            "quantised, or store them as one of these"
        )


def hash_component(folder: str | Path) -> str:
    """SHA-256 over the names and contents of the files of a component (config, weights, tokenizer)."""
    files = [file for file in sorted(Path(folder).iterdir()) if file.suffix in HASHED_SUFFIXES]
    lines = [f"{file.name}:{hash_file(file)}\n" for file in files if not file.name.startswith(".")]
    return hash_bytes("".join(lines).encode())


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index, "a shard index").get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise CheckpointError(f"{str(index)!r} has no 'weight_map' from tensors to files")
    names = sorted({str(name) for name in weight_map.values()})
    if outside := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{str(index)!r} names files outside its folder: {shorten_list(outside)}")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise FileNotFoundError(
            f"{str(index.parent)!r} lacks {len(missing)} of {len(names)} shards: {shorten_list(missing)}"
        )
    return [index.parent / name for name in names]


def _load_weights(model: nn.Module, files: Iterable[Path], *, strict: bool) -> None:
    """Copy stored tensors into the model, file by file; the headers are checked before anything is copied."""
    files = list(files)
    expected = model.state_dict()
    stored = {name: file for file in files for name in _open(file, lambda f: list(f.keys()))}
    where = repr(str(files[0].parent))
    floats = {name for name, tensor in expected.items() if tensor.is_floating_point()}
    check_precisions(files, type(model).__name__, floats)
    if strict:
        _refuse(where, "lacks", [name for name in expected if name not in stored], len(expected))
        _refuse(where, "has unexpected", [name for name in stored if name not in expected], len(stored))
    names = [name for name in stored if name in expected]
    problems = [p for file in files for p in _open(file, lambda f, e=expected: _misfits(f, e))]
    if problems:
        raise CheckpointError(
            f"{where} does not fit {type(model).__name__} in {len(problems)} tensors: {shorten_list(problems)}"
        )
    for file in files:
        _open(file, lambda f, file=file: _copy(f, {n: expected[n] for n in names if stored[n] == file}))


def _misfits(file: Any, expected: Mapping[str, Tensor]) -> list[str]:
    """What is wrong in shape or kind with the tensors of one open safetensors file."""
    problems = []
    for name in file.keys():  # noqa: SIM118 (a safetensors file is not a dict)
        if name not in expected:
            continue
        stored, wanted = file.get_slice(name), expected[name]
        if tuple(stored.get_shape()) != tuple(wanted.shape):
            problems.append(f"{name} is {tuple(stored.get_shape())}, expected {tuple(wanted.shape)}")
        elif stored.get_dtype().startswith(("F", "BF")) and not wanted.is_floating_point():
            problems.append(f"{name} is stored as {stored.get_dtype()}, expected {wanted.dtype}")
    return problems


@torch.no_grad()
def _copy(file: Any, targets: Mapping[str, Tensor]) -> None:
    for name, target in targets.items():
        target.copy_(file.get_tensor(name))


def _open(path: Path, read: Callable[[Any], Any]) -> Any:
    try:
        with safe_open(path, framework="pt") as file:
            return read(file)
    except SafetensorError as error:
        raise CheckpointError(
            f"{str(path)!r} is damaged or cut off ({path.stat().st_size} bytes): {error}; copy or export it again"
        ) from error


def _storable(
    module: nn.Module, dtype: torch.dtype | Mapping[str, torch.dtype] | None, form: StoredForm | None
) -> dict[str, Tensor]:
    """State dict on the CPU, contiguous, trained parameters cast, shared storage copied (safetensors refuses aliases).

    Buffers and frozen parameters (codebooks, rotary frequencies, statistics) are small and keep their precision. If no
    precision is asked for, it is that of the form, but for tensors that are in another than float32 on purpose.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    state = module.state_dict()
    if dtype is None:
        converted = {name for name, t in state.items() if t.is_floating_point() and t.dtype != torch.float32}
        dtype = {} if form is None else {n: stored for n, stored in form.dtypes().items() if n not in converted}
    elif not isinstance(dtype, Mapping):
        trained = {name for name, _ in module.named_parameters(remove_duplicate=False)} - FULL_PRECISION
        dtype = dict.fromkeys(trained, dtype)
    for name, tensor in state.items():
        tensor = tensor.detach().to("cpu", dtype.get(name, tensor.dtype)).contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    return tensors


def _write_weights(path: Path, header: bytes, tensors: Iterable[Tensor]) -> None:
    """A safetensors file with a given header: the tensors it names, in the order of their bytes."""
    with path.open("wb") as file:
        file.write(header)
        for tensor in tensors:
            file.write(tensor.reshape(-1).view(torch.uint8).numpy())


def _refuse(where: str, what: str, names: list[str], total: int) -> None:
    if names:
        raise CheckpointError(f"{where} {what} tensors, {len(names)} of {total}: {shorten_list(names)}")


def read_json(path: Path, expectation: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: The file.
        expectation: What the error of a missing file says was expected.

    Raises:
        FileNotFoundError: If the file or its folder is missing.
        CheckpointError: If it is not a JSON object.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {str(path.parent)!r}: expected {expectation}")
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {str(path.parent)!r}: expected {expectation}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{str(path)!r} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{str(path)!r} must hold a JSON object, got {type(values).__name__}")
    return values
