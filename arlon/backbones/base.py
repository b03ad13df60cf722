"""Families of backbones: how a folder is recognised, what is known before weights are read, and how it is loaded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import torch

from arlon.components import CONFIG_NAME, CheckpointError, read_json
from arlon.plugins import Registry
from arlon.protocols import Backbone, BackboneSpec


@dataclass(frozen=True, kw_only=True)
class TimeShift:
    """How the flow times of a model depend on the size of its video; see `arlon.diffusion.flow.shift_times`."""

    base_size: int = 512
    """Side in pixels of the frame at which the spatial part of the shift is the identity."""
    scale: float = 1.0
    """Further factor of the shift."""


class BackboneFamily(ABC):
    """Models of one architecture."""

    @abstractmethod
    def read_spec(self, folder: Path) -> BackboneSpec:
        """Sizes of the model in a component folder, from its config alone.

        Raises:
            ConfigError: If the config is not one of the family.
        """

    @abstractmethod
    def load(self, folder: Path, *, device: torch.device | str, shift: TimeShift) -> Backbone:
        """Model of a component folder with its weights.

        Raises:
            FileNotFoundError, CheckpointError, ConfigError: If the folder is incomplete or damaged.
        """


FAMILIES: Registry[type[BackboneFamily]] = Registry("backbone family")
"""Families by the class name in the `config.json` of their component folder."""


def open_backbone(
    folder: str | Path, *, device: torch.device | str = "cpu", shift: TimeShift | None = None
) -> Backbone:
    """Load a backbone.

    Args:
        folder: Component folder, ours or a released one.
        device: Device of the weights.
        shift: How its flow times depend on the video's size; None: as Open-Sora v1.2.

    Raises:
        FileNotFoundError: If the folder or its weights are missing.
        CheckpointError: If it holds a model of no known family, or is damaged.
    """
    return _family(Path(folder)).load(Path(folder), device=device, shift=shift or TimeShift())


def read_backbone_spec(folder: str | Path) -> BackboneSpec:
    """Sizes of a backbone, from the config of its component folder; errors as of `open_backbone`."""
    return _family(Path(folder)).read_spec(Path(folder))


def _family(folder: Path) -> BackboneFamily:
    values = read_json(folder / CONFIG_NAME, "a backbone's component folder")
    name = str(values.get("_class_name") or values.get("model_type") or "")
    try:
        return FAMILIES[name]()
    except ValueError as error:
        raise CheckpointError(f"{str(folder)!r} holds no backbone that is known: {error}") from error
