"""Strict YAML and JSON: plain values only, no key twice in a mapping, and errors of one line."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import yaml

MAX_SHOWN = 60
"""Most characters of a wrong value that a message repeats."""
MAX_TEXT_BYTES = 64 * 2**20
"""Size of the largest file that is read; 10,000 shots with the longest prompts fit."""
_MERGE_TAG = "tag:yaml.org,2002:merge"


def shown(value: Any) -> str:
    """A value for a message: printable and short."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def read_text(path: Path) -> str:
    """Read the text of a file that a user names.

    FIFOs and devices are refused, since reading them could block; so are files larger than `MAX_TEXT_BYTES`.

    Raises:
        ValueError: If the file cannot be read; the message is the reason alone.
    """
    try:
        # Without O_NONBLOCK, opening a FIFO waits for a writer; Windows has no such flag.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ValueError("it is not a regular file")
            data = file.read(MAX_TEXT_BYTES + 1)
        if len(data) > MAX_TEXT_BYTES:
            raise ValueError(f"it is larger than {MAX_TEXT_BYTES // 2**20} MiB")
        return data.decode("utf-8-sig")
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8 text") from error


def parse_yaml(text: str) -> Any:
    """Read the plain values of a YAML document.

    Raises:
        ValueError: If the text is not YAML, has a key twice in a mapping, or holds an impossible date or number.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"not YAML: {line}{error.problem}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f"not YAML: {_reason(error)}") from error


def parse_json(text: str) -> Any:
    """Read the plain values of a JSON document.

    Raises:
        ValueError: If the text is not JSON, has a key twice in an object, or holds an impossible number.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: line {error.lineno}: {error.msg}") from error
    except (RecursionError, ValueError) as error:
        raise ValueError(f"not JSON: {_reason(error)}") from error


class _StrictLoader(yaml.SafeLoader):
    """Safe loader that refuses a key that appears twice in a mapping, instead of taking the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE_TAG:
                continue
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=_twice(key.value), problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(_twice(key))
        values[key] = value
    return values


def _twice(key: str) -> str:
    return f"the key {shown(key)} stands twice"


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0].partition(";")[0]
