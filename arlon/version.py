"""Version of the installed package."""

from __future__ import annotations

import importlib.metadata


def version() -> str:
    """Version of the installed package, `unknown` when run from a bare checkout."""
    try:
        return importlib.metadata.version("arlon")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
