"""Training stages by name. Another package adds its own: `docs/extending.md` has an example."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from arlon.errors import UsageError, did_you_mean
from arlon.plugins import Registry, load_plugins

if TYPE_CHECKING:
    from arlon.components import Component

BUILT_IN = ("vae", "vqvae", "ar", "dit", "inject")
"""Stages that come with Arlon, in the order in which they are trained; each is a module of this package."""


@dataclass(frozen=True, kw_only=True)
class StageKind:
    """What `python -m stages.train` has to know of a stage."""

    config_class: type
    """Config dataclass; its fields `train` (`stages.config.RunConfig`) and `optim` (`OptimConfig`) are read here."""
    build: Callable[[Any], Any]
    """Loads the data and makes the Lightning module from a configuration; returns a `stages.common.StageParts`."""
    model_class: type[Component]
    """Class of the model that is trained and exported."""
    model_key: str
    """Field of the config that holds the shape of the model, which must not change while a run is resumed."""


STAGES: Registry[StageKind] = Registry("training stage")


def stage_kind(name: str) -> StageKind:
    """The stage of a name; its module is imported now.

    Raises:
        UsageError: If there is none, plugins included.
    """
    if name in BUILT_IN:
        importlib.import_module(f"stages.{name}")  # registers itself
    else:
        load_plugins()
    if name not in STAGES:
        raise UsageError(f"unknown stage {name!r}, {did_you_mean(name, dict.fromkeys((*BUILT_IN, *STAGES)))}")
    return STAGES[name]
