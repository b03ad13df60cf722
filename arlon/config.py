"""Typed configurations: a frozen dataclass is the schema, YAML and dotted overrides hold the differences.

A schema is a `@dataclass(frozen=True, kw_only=True)` whose fields are plain values (`int`, `float`, `bool`,
`str`, `Literal[...]`, `X | None`), tuples, lists and dicts of them, or further dataclasses. OmegaConf parses
and checks the sources; what comes out is plain Python, and no OmegaConf type leaves this module.
"""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml
from omegaconf import DictConfig, OmegaConf, SCMode
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from arlon.errors import ConfigError, did_you_mean, one_line
from arlon.files import make_folder, write_text

T = TypeVar("T")


def load_config(schema: type[T], files: Sequence[str | Path] = (), overrides: Sequence[str] = ()) -> T:
    """Build a `schema` instance; later sources win.

    Args:
        schema: A dataclass. Its defaults are the base configuration.
        files: YAML files holding only what differs from the defaults, merged left to right.
        overrides: Dotted `key=value` strings from the command line, such as `dit.depth=8`; values are YAML.

    Returns:
        A plain `schema` instance; tuples are tuples at every depth.

    Raises:
        FileNotFoundError: If a file does not exist.
        ConfigError: If a source is not valid YAML, names an unknown key, holds a value of the wrong type, or
            leaves a required field out. A `ValueError` of a schema's `__post_init__` is passed on unchanged.
    """
    sources = [_read_yaml(Path(file)) for file in files]
    return _build(schema, *sources, _parse_overrides(overrides))


def config_from_dict(schema: type[T], values: Mapping[str, Any]) -> T:
    """Rebuild a `schema` instance from plain values, such as those stored in a checkpoint.

    Raises:
        ConfigError: If a key is unknown, a value has the wrong type, or a required field is left out.
    """
    return _build(schema, dict(values))


def config_to_dict(config: Any) -> dict[str, Any]:
    """Plain, JSON-able values of a dataclass instance: nested dicts, tuples as lists.

    Raises:
        ConfigError: If `config` is not a dataclass instance or holds something that JSON does not know.
    """
    if not is_dataclass(config) or isinstance(config, type):
        raise ConfigError(f"expected a dataclass instance as configuration, got {type(config).__name__}")
    return _to_plain(config, type(config).__name__)


def save_config(config: Any, path: str | Path) -> None:
    """Write the resolved configuration as YAML; it loads back with `load_config(type(config), [path])`."""
    make_folder(Path(path).parent)
    write_text(path, OmegaConf.to_yaml(OmegaConf.create(config_to_dict(config))))


def _read_yaml(path: Path) -> DictConfig:
    if not path.is_file():
        raise FileNotFoundError(f"no configuration file {str(path)!r}")
    try:
        loaded = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {str(path)!r} as YAML: {_one_line(error)}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{str(path)!r} must hold 'key: value' pairs at its top level, got a list")
    return loaded


def _parse_overrides(overrides: Sequence[str]) -> DictConfig:
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"override {override!r} must read key=value, for example train.max_steps=100")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except (yaml.YAMLError, OmegaConfBaseException, TypeError) as error:
        raise ConfigError(f"cannot parse the overrides {list(overrides)}: {_one_line(error)}") from error


def _build(schema: type, *sources: Any) -> Any:
    """Merge the sources over the defaults of `schema`, check them, and build plain dataclasses."""
    try:
        merged = OmegaConf.merge(_defaults(schema), *sources)
        values: Any = OmegaConf.to_container(
            merged, resolve=False, throw_on_missing=True, structured_config_mode=SCMode.DICT
        )
    except (OmegaConfBaseException, TypeError) as error:
        raise ConfigError(_explain(error, schema, sources)) from error
    return _to_dataclass(schema, values, "")


@functools.lru_cache
def _defaults(schema: type) -> DictConfig:
    """Defaults of a schema as an OmegaConf config; cached, since building them is slow and merging copies them."""
    return OmegaConf.structured(schema)


def _to_dataclass(schema: type[Any], values: Mapping[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(schema)
    arguments = {
        field.name: _to_field(hints[field.name], values[field.name], f"{prefix}{field.name}")
        for field in fields(schema)
        if field.init
    }
    return schema(**arguments)


def _to_field(hint: Any, value: Any, key: str) -> Any:
    """Give a plain value the type its annotation asks for: tuples and dataclasses at every depth."""
    for option in _options(hint):
        origin, arguments = typing.get_origin(option) or option, typing.get_args(option)
        if isinstance(option, type) and is_dataclass(option) and isinstance(value, Mapping):
            # OmegaConf checks fields, but not the elements of a container of dataclasses: merge those here.
            complete = value.keys() == {field.name for field in fields(option)}
            return _to_dataclass(option, value, f"{key}.") if complete else _build(option, dict(value))
        if origin in (tuple, list) and isinstance(value, list | tuple):
            each = _element_hints(origin, arguments, len(value), key)
            return origin(_to_field(h, v, f"{key}[{i}]") for i, (h, v) in enumerate(zip(each, value, strict=True)))
        if origin is dict and isinstance(value, Mapping):
            inner = arguments[1] if arguments else Any
            return {k: _to_field(inner, v, f"{key}.{k}") for k, v in value.items()}
    return _to_scalar(hint, value, key)


def _to_scalar(hint: Any, value: Any, key: str) -> Any:
    if isinstance(value, str) and "${" in value:
        raise ConfigError(f"{key}: interpolation {value!r} is not supported, write the value out")
    for option in _options(hint):
        if option is Any or (isinstance(option, type) and isinstance(value, option)):
            return value
        if option is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if typing.get_origin(option) is Literal and value in typing.get_args(option):
            return value
    raise ConfigError(f"{key}: expected {getattr(hint, '__name__', hint)}, got {value!r}")


def _options(hint: Any) -> tuple[Any, ...]:
    """Members of a union; a single type is its own only member."""
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def _element_hints(kind: type, arguments: tuple[Any, ...], length: int, key: str) -> tuple[Any, ...]:
    """Annotation of each element of a tuple or list whose type parameters are `arguments`."""
    if not arguments:
        return (Any,) * length
    if kind is list or arguments[-1] is Ellipsis:
        return (arguments[0],) * length
    if len(arguments) != length:
        raise ConfigError(f"{key}: expected {len(arguments)} values, got {length}")
    return arguments


def _to_plain(value: Any, key: str) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _to_plain(getattr(value, f.name), f"{key}.{f.name}") for f in fields(value) if f.init}
    if isinstance(value, Mapping):
        return {str(k): _to_plain(v, f"{key}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(v, f"{key}[{i}]") for i, v in enumerate(value)]
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise ConfigError(f"{key} must be a plain value (number, text, list, dict), got {type(value).__name__}: {value!r}")


def _explain(error: Exception, schema: type, sources: Sequence[Any]) -> str:
    """One-line message for a value that OmegaConf refused: dotted key, reason, and the nearest known key."""
    key = getattr(error, "full_key", None) or _culprit(schema, sources)
    owner = getattr(error, "object_type", None)
    if isinstance(error, ConfigKeyError) and is_dataclass(owner):
        known = [field.name for field in fields(owner)]
        return f"unknown key {str(key)!r}, {did_you_mean(str(key).split('.')[-1], known)}"
    if isinstance(error, MissingMandatoryValue):
        return f"missing value for the required key {str(key)!r} of {schema.__name__}"
    return f"{key or schema.__name__}: {_one_line(error)}"


def _culprit(schema: type, sources: Sequence[Any]) -> str | None:
    """Dotted key whose value alone makes `schema` fail, for errors that do not name it."""
    for source in sources:
        plain: Any = OmegaConf.to_container(source) if OmegaConf.is_config(source) else source
        for key, nested in _leaves(plain):
            try:
                OmegaConf.merge(_defaults(schema), nested)
            except (OmegaConfBaseException, TypeError):
                return key
    return None


def _leaves(values: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each leaf of a nested dict as (dotted key, nested dict with that leaf alone)."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from ((f"{name}.{key}", {name: nested}) for key, nested in _leaves(value))
        else:
            yield str(name), {name: value}


def _one_line(error: Exception) -> str:
    """First line of an OmegaConf message; every line of a YAML message, whose end has line and column."""
    if isinstance(error, yaml.YAMLError):
        return "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
    return one_line(error).replace("TupleConfig", "tuple").replace("ListConfig", "list").replace("DictConfig", "dict")
