"""Component folders: one model as `config.json` + `model.safetensors`.

`config.json` holds the fields of the model's config dataclass, `_class_name` and `_format`; weights may be sharded
(`model.safetensors.index.json`), and the `diffusion_pytorch_model` spelling is read too. Released Hugging Face folders
are component folders as well. An unknown key is refused in our own files. In a released `config.json`, where libraries
leave keys of their own, it is ignored with a warning that names it; a model of another structure is still refused, as
its weights do not fit.

A loaded model remembers how its folder was written (`arlon.stored_form`), so that saving it gives the same files.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

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
from arlon.stored_form import READ_PRECISIONS, StoredForm

log = logging.getLogger(__name__)
M = TypeVar("M", bound="Component")

FORMAT = 1
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
WEIGHTS_STEMS = ("model.safetensors", "diffusion_pytorch_model.safetensors")
COMPONENT_EXPECTED = "a component folder with config.json and *.safetensors"
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
"""Keys of released `config.json` files that describe the file, not the model. So do keys with a leading `_`."""
FULL_PRECISION = frozenset({"rope.freqs"})
"""Parameters that are constants: rounded rotary frequencies would turn late frames by a visible angle."""
READABLE = 0o644


class Component(nn.Module):
    """Base class of the models that are saved as component folders.

    A subclass has a config dataclass `config_class`, is built from an instance of it, and keeps that as `self.config`.
    """

    config_class: ClassVar[type]
    """Dataclass whose fields are the contents of `config.json`."""
    ignored_keys: ClassVar[frozenset[str]] = frozenset()
    """Keys of a `config.json` that change nothing in this class, besides `HUGGING_FACE_KEYS`; they are passed over in
    silence. Other unknown keys of a released file are named in a warning, those of our own files are refused."""
    stored_form: StoredForm | None = None
    """How the folder that the model was loaded from is written; None for a new model."""

    @classmethod
    def from_pretrained(cls, folder: str | Path, **config_overrides: Any) -> Self:
        """Load a component folder, our own or a released one, in eval mode; see `load_component`.

        Args:
            folder: The component folder.
            **config_overrides: Fields of the config that win over `config.json`.

        Raises:
            FileNotFoundError: If the folder, its config or its weights are missing.
            CheckpointError: If the folder holds another class, or the weights are damaged or do not fit.
            ConfigError: If `config.json` or an override does not fit the config class.
        """
        return load_component(cls, folder, **config_overrides)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write `config.json` and the weights to a folder; see `save_component`."""
        save_component(self, folder, dtype=dtype)

    @staticmethod
    def translate_config(values: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of the config from the contents of a `config.json`, for classes whose released layout differs."""
        return dict(values)


def save_component(
    module: Component, folder: str | Path, dtype: torch.dtype | Mapping[str, torch.dtype] | None = None
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
    form = module.stored_form
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
                form.write_weights(name, path, tensors)
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


def _config_text(module: Component, form: StoredForm | None) -> str:
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
    files, index = _find_weights(folder)
    _load_weights(model, files, strict=strict)
    stored_config = read_config(model_class, folder) if config_overrides else config
    model.stored_form = StoredForm.read(stored_config, folder / CONFIG_NAME, files, index)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and name not in FULL_PRECISION:
            parameter.data = parameter.data.to(dtype)
    return model.to(device).eval()


def read_config(model_class: type[Component], folder: str | Path, **overrides: Any) -> Any:
    """Config of a component as its class wants it, from our own `config.json` or a released one.

    Args:
        model_class: The class; one whose released configs have another layout translates them (`translate_config`).
        folder: The component folder.
        **overrides: Fields that win over `config.json`.

    Raises:
        FileNotFoundError: If the folder or its `config.json` is missing.
        CheckpointError: If the file is not JSON, names another class or says that its weights are quantised.
        ConfigError: If a value does not fit the config class.
    """
    folder = Path(folder)
    stored = read_json(folder / CONFIG_NAME, COMPONENT_EXPECTED)
    is_released = "_format" not in stored
    # A released file may name the class of another code base, so only our own are held to their name.
    if not is_released and stored.get("_class_name") != model_class.__name__:
        raise CheckpointError(f"{str(folder)!r} holds a {stored.get('_class_name')}, expected a {model_class.__name__}")
    known = {field.name for field in fields(model_class.config_class)}
    ignored = (model_class.ignored_keys | HUGGING_FACE_KEYS) - known
    values = model_class.translate_config(
        {key: value for key, value in stored.items() if not key.startswith("_") and key not in ignored}
    )
    if "quantization_config" in stored:
        raise CheckpointError(
            f"{str(folder / CONFIG_NAME)!r} has a quantization_config, but quantised weights are not supported: get "
            f"those in {', '.join(READ_PRECISIONS.values())}"
        )
    if is_released and known & values.keys():  # a file without any known key is that of another model: refused below
        _warn_once(str(folder / CONFIG_NAME), model_class.__name__, tuple(sorted(values.keys() - known)))
        values = {key: value for key, value in values.items() if key in known}
    try:
        return config_from_dict(model_class.config_class, values | overrides)
    except ConfigError as error:
        raise ConfigError(f"{str(folder / CONFIG_NAME)!r} as {model_class.__name__}: {error}") from error


@functools.lru_cache
def _warn_once(file: str, class_name: str, keys: tuple[str, ...]) -> None:
    """Name the ignored keys of a file, once: a model's config is read several times while a film is made."""
    if keys:
        log.warning("%r: %s has no keys %s; they are ignored", file, class_name, shorten_list(keys))


def component_config(folder: str | Path) -> dict[str, Any]:
    """Values of `config.json` without the keys that describe the file.

    Raises:
        FileNotFoundError: If the folder or its `config.json` is missing.
        CheckpointError: If the file is not JSON.
    """
    values = read_json(Path(folder) / CONFIG_NAME, COMPONENT_EXPECTED)
    return {k: v for k, v in values.items() if not k.startswith("_") and k not in HUGGING_FACE_KEYS}


def find_weights(folder: str | Path) -> list[Path]:
    """The safetensors files of a component: one, or the shards its index names.

    Raises:
        FileNotFoundError: If there are none, or a shard is missing.
        CheckpointError: If the index is damaged.
    """
    return _find_weights(Path(folder))[0]


def _find_weights(folder: Path) -> tuple[list[Path], Path | None]:
    """Files of `find_weights`, and the shard index that names them, if there is one."""
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


def check_precisions(files: Iterable[Path], what: str, names: Container[str] | None = None) -> None:
    """Raise if weights use an unsupported dtype; only headers are read.

    Args:
        files: The safetensors files of a component.
        what: Name of the model, for the message.
        names: Tensors that must be floating-point numbers; None: all.

    Raises:
        CheckpointError: If one is not, or is damaged.
    """
    files = list(files)
    stored: dict[str, str] = {}
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
    problems = [problem for file in files for problem in _open(file, lambda f: _misfits(f, expected))]
    if problems:
        raise CheckpointError(
            f"{where} does not fit {type(model).__name__} in {len(problems)} tensors: {shorten_list(problems)}"
        )
    for file in files:
        targets = {name: expected[name] for name in stored if stored[name] == file and name in expected}
        _open(file, functools.partial(_copy, targets=targets))


def _misfits(file: Any, expected: Mapping[str, Tensor]) -> list[str]:
    """Tensors of an open safetensors file whose shape or type does not fit, one message each."""
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
