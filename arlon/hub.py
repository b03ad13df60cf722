"""Downloads of models and of T5 from the Hugging Face hub; MiniLM is in `arlon.text.sources`.

A hub id is `owner/name`, or `owner/name/folder` for one folder of a repository. `HF_HUB_OFFLINE=1` keeps to what is in
the local cache. Pickles are never fetched.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from arlon.errors import one_line

FILES = ("*.json", "*.safetensors", "*.model", "*.txt")
"""Patterns of the files that make up a component or its tokenizer."""
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)((?:/[A-Za-z0-9][\w.-]*)*)")


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a hub id; nothing is looked up."""
    return _HUB_ID.fullmatch(name) is not None


def is_offline() -> bool:
    """Whether the environment forbids downloads."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def fetch(name: str, *, siblings: Sequence[str] = (), download: bool = True) -> Path:
    """Local folder of a hub id: from the cache if possible, otherwise downloaded.

    Args:
        name: `owner/name` or `owner/name/folder`.
        siblings: Further folders of the same repository to fetch, siblings of `folder`; missing ones are skipped.
        download: Whether what is not in the cache may be downloaded.

    Raises:
        FileNotFoundError: If there is no such repository or folder, or it cannot be reached.
    """
    from huggingface_hub import snapshot_download

    match = _HUB_ID.fullmatch(name)
    if match is None:
        raise FileNotFoundError(f"{name!r} is not a hub id: expected owner/name or owner/name/folder")
    repository, folder = match[1], match[2].lstrip("/")
    folders = [f"{folder}/", *(f"{other}/" for other in siblings)] if folder else [""]
    try:
        patterns = [f"{part}{file}" for part in folders for file in FILES]
        root = snapshot_download(repository, allow_patterns=patterns, local_files_only=not download)
    except Exception as error:  # the hub client raises errors of several libraries
        raise FileNotFoundError(
            f"no folder {name!r}, and no model of that name on the hub: {one_line(error)}"
        ) from error
    if not (Path(root) / folder).is_dir():
        raise FileNotFoundError(f"the hub's {repository!r} has no folder {folder!r} with {', '.join(FILES)}")
    return Path(root) / folder
