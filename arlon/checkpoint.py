"""Model folders: the components of one ARLON model, checked against each other and hashed.

    shapes/
        model_index.json
        vae/  vqvae/  vqvae_coarser/  ar/  dit/  injection/  text_encoder/     (see arlon/components.py)

`model_index.json` names the class and the SHA-256 of each component and the defaults of generation:

    {"_class_name": "ArlonPipeline", "format": 1,
     "components": {"dit": {"class": "STDiT3", "sha256": "..."}, ...},
     "defaults": {"height": 64, "width": 64, "fps": 8.0, ...}}

Components in different folders, such as released ones, are put together by a *model file*: YAML that names them (see
`ModelSources` and `combine`). A model file can be given wherever a model folder can.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import itertools
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from arlon.components import (
    CONFIG_NAME,
    FORMAT,
    component_config,
    find_weights,
    hash_component,
    load_component,
    read_config,
    read_json,
    save_component,
    stored_dtypes,
)
from arlon.config import load_config
from arlon.errors import CheckpointError, did_you_mean
from arlon.files import hash_bytes, make_folder, publish, temporary_beside, write_json
from arlon.grids import code_grid
from arlon.hub import fetch, is_hub_id
from arlon.registry import BASE_COMPONENTS, COMPONENTS, FILM_COMPONENTS

__all__ = [
    "CheckpointError",
    "ModelFolder",
    "ModelSources",
    "check_consistency",
    "combine",
    "component_config",
    "find_weights",
    "hash_component",
    "load_component",
    "read_config",
    "resolve_model",
    "save_component",
    "stored_dtypes",
    "write_model_index",
]

INDEX_NAME = "model_index.json"
PACKAGED_MODELS = ("shapes",)
MODEL_FILE_SUFFIXES = (".yaml", ".yml")
RELEASED_KINDS = {stated: name for name, kind in COMPONENTS.items() for stated in kind.released_kinds}
"""Component that a folder holds, by the kind that its `config.json` states."""
RELEASED_DEFAULTS = {"aesthetic_score": 6.5}
"""Generation defaults of released components that differ from `arlon.film.geometry.GenerationDefaults`."""
CACHE_VARIABLE = "ARLON_CACHE"
"""Environment variable that names the folder for models put together from model files; default ~/.cache/arlon."""

SHARED_VALUES: tuple[tuple[str, dict[str, str]], ...] = (
    ("codebook size", {"vqvae": "codebook_size", "ar": "codebook_size"}),
    (
        "latent channels",
        {
            "vae": "temporal.embed_dim",
            "vqvae": "latent_channels",
            "vqvae_coarser": "latent_channels",
            "dit": "in_channels",
            "injection": "in_channels",
        },
    ),
    ("text width", {"text_encoder": "dim", "dit": "caption_channels", "ar": "text_dim"}),
    ("token width", {"dit": "hidden_size", "injection": "dim"}),
    ("patch size", {"dit": "patch_size", "injection": "patch_size"}),
)
"""Values that components must share: name for messages, and the (dotted) config field of each component."""


@dataclass(frozen=True)
class ModelFolder:
    """A checked model folder.

    Attributes:
        path: The folder.
        components: SHA-256 of each component, by name.
        defaults: Generation defaults stored with the model (frame size, fps, steps, guidance ...).
        model_hash: SHA-256 over the hashes of all components; it changes when any weight or config does.
    """

    path: Path
    components: dict[str, str]
    defaults: dict[str, Any]
    model_hash: str

    @classmethod
    def open(cls, path: str | Path, *, required: Iterable[str] = FILM_COMPONENTS, verify: bool = True) -> ModelFolder:
        """Read `model_index.json` and check the folder.

        Args:
            path: The model folder.
            required: Components that must be there.
            verify: Hash every component and compare with the index; otherwise the hashes in the index are trusted.

        Raises:
            FileNotFoundError: If the folder, its index or a required component is missing.
            CheckpointError: If components do not fit each other or differ from the index. All are listed.
        """
        path = Path(path)
        index = read_json(path / INDEX_NAME, "a model folder (see arlon.checkpoint.write_model_index)")
        if index.get("format") != FORMAT or not isinstance(index.get("components"), Mapping):
            raise CheckpointError(
                f"{str(path / INDEX_NAME)!r} has format {index.get('format')!r}, this version reads {FORMAT}"
            )
        hashes: dict[str, str] = {}
        for name, entry in index["components"].items():
            stated = entry.get("sha256") if isinstance(entry, Mapping) else None
            if not isinstance(stated, str):
                raise CheckpointError(f"{str(path / INDEX_NAME)!r} has no sha256 for {name}")
            hashes[name] = stated
        names = set(hashes) | set(required)
        if missing := sorted(n for n in names if n not in hashes or not (path / n / CONFIG_NAME).is_file()):
            message = f"model {str(path)!r} lacks the components {', '.join(missing)}"
            if "text_encoder" in missing:
                message += ". Copy the text_encoder of the model beside its other parts; --model shapes needs none"
            raise FileNotFoundError(message)
        defaults = dict(index.get("defaults") or {})
        check_consistency(path, hashes, defaults)
        if verify:
            _verify(path, hashes)
        return cls(path=path, components=hashes, defaults=defaults, model_hash=_hash_of_hashes(hashes))

    def component(self, name: str) -> Path:
        """Folder of a component.

        Raises:
            FileNotFoundError: If the model has no such component.
        """
        if name not in self.components:
            known = ", ".join(sorted(self.components))
            raise FileNotFoundError(f"model {str(self.path)!r} has no component {name!r}, it has {known}")
        return self.path / name


def write_model_index(folder: str | Path, defaults: Mapping[str, Any] | None = None) -> ModelFolder:
    """Check the components found in `folder`, hash them, and write `model_index.json`.

    Args:
        folder: A folder with some of the subfolders in `arlon.registry.COMPONENTS`.
        defaults: Plain values stored with the model. Those of an existing index are kept if None.

    Raises:
        FileNotFoundError: If there is no component at all.
        CheckpointError: If components do not fit each other.
    """
    folder = Path(folder)
    found = [name for name in COMPONENTS if (folder / name / CONFIG_NAME).is_file()]
    if not found:
        raise FileNotFoundError(f"no component in {str(folder)!r}: expected some of {', '.join(COMPONENTS)}")
    if defaults is None:
        old = folder / INDEX_NAME
        defaults = read_json(old, "a model index").get("defaults", {}) if old.is_file() else {}
    check_consistency(folder, found, defaults)
    entries = {n: {"class": _class_name(folder / n), "sha256": hash_component(folder / n)} for n in found}
    index = {
        "_class_name": "ArlonPipeline",
        "format": FORMAT,
        "components": entries,
        "defaults": dict(defaults),
    }
    write_json(folder / INDEX_NAME, index)
    return ModelFolder.open(folder, required=found, verify=False)


def check_consistency(folder: Path, names: Iterable[str], defaults: Mapping[str, Any]) -> None:
    """Refuse components that cannot work together; every disagreement is one line of the error.

    Values missing from a `config.json` (as in bare released folders) are not compared.

    Raises:
        CheckpointError: If any two of the named components disagree.
    """
    configs = {name: component_config(folder / name) for name in names}
    problems = []
    for what, keys in SHARED_VALUES:
        values = {name: _stated(configs, name, key) for name, key in keys.items()}
        stated = [(name, value) for name, value in values.items() if value is not None]
        problems += [
            f"{str(folder / name)!r} has {what} {value}, but {str(folder / first)!r} has {wanted}"
            for (first, wanted), (name, value) in itertools.product(stated[:1], stated[1:])
            if value != wanted
        ]
    problems += _text_length_problems(configs) + _code_grid_problems(configs, defaults)
    if problems:
        raise CheckpointError("\n".join(problems))


def _stated(configs: Mapping[str, Any], name: str, key: str) -> Any:
    """Value of a dotted config field of a component; None if the config does not have it."""
    value: Any = configs.get(name)
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _text_length_problems(configs: Mapping[str, Any]) -> list[str]:
    length = _stated(configs, "text_encoder", "max_length")
    limits = {(n, k): _stated(configs, n, k) for n, k in (("dit", "model_max_length"), ("ar", "max_text"))}
    return [
        f"the text encoder writes {length} tokens, but {name} takes at most {limit} ({key})"
        for (name, key), limit in limits.items()
        if None not in (length, limit) and length > limit
    ]


def _code_grid_problems(configs: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """Check that the code grid of the AR model is that of the default frame size, if both are known."""
    grid, ratio = _stated(configs, "ar", "grid"), _stated(configs, "vqvae", "ratio")
    blocks = _stated(configs, "vae", "spatial.block_out_channels")
    frame = defaults.get("height"), defaults.get("width")
    if None in (grid, ratio, blocks, *frame):
        return []
    latent = [size // 2 ** (len(blocks) - 1) for size in frame]
    expected = code_grid((1, *latent), tuple(ratio))[1:]
    if tuple(grid) == expected:
        return []
    return [f"ar writes {tuple(grid)} codes a frame, but the VQ-VAE has {expected} for frames of {frame}"]


@dataclass(frozen=True, kw_only=True)
class ModelSources:
    """Contents of a model file: the folder of each component of a model.

    Each is a component folder, ours or released, or a hub id (`owner/name`, `owner/name/folder`); relative folders
    start at the model file. Weights are not copied.
    """

    vae: str | None = None
    vqvae: str | None = None
    vqvae_coarser: str | None = None
    ar: str | None = None
    dit: str | None = None
    injection: str | None = None
    text_encoder: str | None = None
    """May also be a T5, whose weights are looked for when it is first used."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Recommended generation settings; see `arlon.film.geometry.GenerationDefaults`."""

    @property
    def components(self) -> dict[str, str]:
        """The sources that are given, by component."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "defaults"}
        return {name: source for name, source in values.items() if source is not None}


def combine(
    folder: str | Path, sources: ModelSources, *, relative_to: str | Path = ".", download: bool = True
) -> ModelFolder:
    """Make a model folder of symbolic links to components elsewhere; hub ids are downloaded.

    Args:
        folder: The model folder to write; it appears complete or not at all.
        sources: Folder or hub id of each component.
        relative_to: Folder that relative paths start from.
        download: Whether hub ids that are not in the cache may be downloaded.

    Raises:
        FileNotFoundError: If a source is not there.
        FileExistsError: If `folder` exists already.
        CheckpointError: If components do not fit each other.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{str(folder)!r} is there already: give another folder, or remove it")
    links = {name: _locate(name, source, Path(relative_to), download) for name, source in sources.components.items()}
    text, dit = links.get("text_encoder"), links.get("dit")
    if isinstance(text, dict) and isinstance(dit, Path):  # as many tokens as the DiT was trained with
        text["max_length"] = component_config(dit).get("model_max_length", text["max_length"])
    temporary = temporary_beside(folder)
    make_folder(temporary)
    try:
        for name, source in links.items():
            if isinstance(source, Path):
                (temporary / name).symlink_to(source, target_is_directory=True)
            else:
                make_folder(temporary / name)
                write_json(temporary / name / CONFIG_NAME, source)
        write_model_index(temporary, sources.defaults)
        publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return ModelFolder.open(folder, required=links, verify=False)


def _locate(name: str, source: str, base: Path, download: bool) -> Path | dict[str, Any]:
    """Folder of a component, or for a T5 the `config.json` that names it, so that its gigabytes are not hashed."""
    place = base / Path(source).expanduser()
    if not place.is_dir() and not is_hub_id(source):
        raise FileNotFoundError(f"{name}: no folder {source!r}, and that is no hub id 'owner/name'")
    if name == "text_encoder":
        from arlon.text.encoders import t5_component

        if not place.is_dir():
            return t5_component(source)
        if component_config(place).get("d_model") is not None:
            return t5_component(place.resolve())
    folder = place.resolve() if place.is_dir() else fetch(source, download=download)
    component_config(folder)  # whether there is one
    return folder


def resolve_model(name_or_path: str | Path, *, download: bool = True) -> Path:
    """Folder of a model: the name of a packaged model, a folder, a model file (.yaml), or a hub id `owner/name`.

    A folder or repository without an index may hold the released STDiT3, VAE and T5 folders side by side, under any
    names.

    A hub id is looked up in the local cache or downloaded, unless `download` or `HF_HUB_OFFLINE=1` forbid it.

    Raises:
        FileNotFoundError: If there is no such model; the message tells the nearest known name.
        ConfigError: If a model file is not one.
    """
    name = str(name_or_path)
    if name in PACKAGED_MODELS:
        folder = Path(str(importlib.resources.files("arlon"))) / "weights" / name
        if not (folder / INDEX_NAME).is_file():
            raise FileNotFoundError(f"the weights of {name!r} are not installed: no {INDEX_NAME} in {str(folder)!r}")
        return folder
    if name and Path(name).expanduser().is_dir():
        folder = Path(name).expanduser()
        return _whole_folder(folder, folder, download)
    if Path(name).suffix in MODEL_FILE_SUFFIXES:
        file = Path(name).expanduser()
        return _combined(load_config(ModelSources, [file]), file, file.parent, download)
    if is_hub_id(name):
        return _whole_folder(fetch(name, download=download), Path(name), download)
    raise FileNotFoundError(
        f"unknown model {name!r}, {did_you_mean(name, PACKAGED_MODELS)} (or give a model folder, a model file or a hub "
        "id 'owner/name')"
    )


def _whole_folder(folder: Path, name: Path, download: bool) -> Path:
    """Model folder for a folder: itself if it has an index, else one put together from the released components in it.

    Args:
        folder: The folder.
        name: Its path, or the hub id that it was fetched for.
        download: Whether hub ids that are not in the cache may be downloaded.

    Raises:
        FileNotFoundError: If it holds some of a base, but not all.
    """
    found = {} if (folder / INDEX_NAME).is_file() else _released_components(folder)
    if not found:
        return folder
    if missing := [part for part in BASE_COMPONENTS if part not in found]:
        have = ", ".join(f"{part} in {place!r}" for part, place in found.items())
        raise FileNotFoundError(
            f"{str(name)!r} has no {INDEX_NAME} and lacks {', '.join(missing)} (it has {have}): put the released "
            "STDiT3, VAE and T5 folders side by side in one folder, or name them in a model file such as "
            "configs/opensora_v1_2/base.yaml"
        )
    return _combined(ModelSources(**found, defaults=RELEASED_DEFAULTS), name, folder, download)


def _released_components(folder: Path) -> dict[str, str]:
    """Component -> subfolder, by what the `config.json` of each subfolder (or of the folder itself) says it is.

    Raises:
        CheckpointError: If two subfolders hold the same component.
    """
    found: dict[str, str] = {}
    for place in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        if not (place / CONFIG_NAME).is_file():
            continue
        values = read_json(place / CONFIG_NAME, "a component")
        kind = values.get("model_type") or values.get("_class_name")
        name = RELEASED_KINDS.get(kind) if isinstance(kind, str) else None
        if name is None:
            continue
        where = "." if place == folder else place.name
        if name in found:
            raise CheckpointError(f"{str(folder)!r} holds {name} twice, in {found[name]!r} and {where!r}: remove one")
        found[name] = where
    return found


def _combined(sources: ModelSources, file: Path, base: Path, download: bool) -> Path:
    """Model folder in the cache, made of links to components elsewhere; made again if a weight changes.

    Args:
        sources: Folder or hub id of each component.
        file: The file that names them; the model is called like it.
        base: Folder that relative paths start from.
        download: Whether hub ids that are not in the cache may be downloaded.
    """
    if not sources.components:
        raise CheckpointError(f"{str(file)!r} names no component: expected some of {', '.join(COMPONENTS)}")
    digest = hashlib.sha256(repr((base.resolve(), sources)).encode())
    for name, source in sources.components.items():
        located = _locate(name, source, base, download)
        for weights in sorted(located.iterdir()) if isinstance(located, Path) else []:
            digest.update(f"{weights}:{weights.stat().st_size}:{weights.stat().st_mtime_ns}\n".encode())
    cache = Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "arlon").expanduser()
    folder = cache / "models" / f"{file.stem}-{digest.hexdigest()[:12]}"
    if not folder.is_dir():
        combine(folder, sources, relative_to=base, download=download)
    return folder


def _verify(path: Path, hashes: Mapping[str, str]) -> None:
    if changed := [name for name, stored in hashes.items() if hash_component(path / name) != stored]:
        raise CheckpointError(
            f"in {str(path)!r} the content of {', '.join(changed)} differs from {INDEX_NAME}: copy the model again; "
            "if the change is meant, write the index again (arlon.checkpoint.write_model_index)"
        )


def _hash_of_hashes(hashes: Mapping[str, str]) -> str:
    lines = "".join(f"{name}:{hashes[name]}\n" for name in sorted(hashes))
    return hash_bytes(lines.encode())


def _class_name(folder: Path) -> str:
    values = read_json(folder / CONFIG_NAME, "a component")
    return str(values.get("_class_name") or values.get("kind") or values.get("model_type") or "unknown")
