"""What `run.json` says about a run: what its film is made from, where it goes, and with which libraries."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

from pipelines.runs.prepare import Prepared

FILM_LIBRARIES = (
    *("av", "numpy", "safetensors", "torch"),
    "diffusers",  # per-frame VAE
    *("beautifulsoup4", "ftfy", "tokenizers", "transformers"),  # text and its features
)
"""Distributions whose code the bits of a film depend on; resuming a run tells if one has changed."""


def run_record(prepared: Prepared, executor: str) -> dict[str, Any]:
    """Build the content of `run.json`: the record of the film, and where and with what it is made."""
    record = prepared.record | {"versions": library_versions(), "executor": executor}
    record |= {"film": prepared.paths.film_from_run_dir, "metadata": bool(prepared.output.tags)}
    record |= {"hls": True} if prepared.output.has_stream else {}
    record["model"] = record["model"] | {"source": prepared.model_source}
    return record | {"plan": prepared.plan.to_plain()}


def library_versions() -> dict[str, str]:
    """Read the versions of the libraries that decide the bits of a film."""
    return {name: importlib.metadata.version(name) for name in FILM_LIBRARIES}


def changed_libraries(record: Mapping[str, Any]) -> list[str]:
    """Name the libraries whose version differs from the one a run was started with, as `torch 2.6.0 -> 2.7.0`.

    Libraries that the record does not name are left out: earlier versions of this program recorded fewer.
    """
    then, now = record.get("versions", {}), library_versions()
    return [f"{name} {then[name]} -> {now[name]}" for name in now if then.get(name, now[name]) != now[name]]
