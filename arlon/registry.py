"""The table of components: every part of an ARLON model, one row each.

Whatever needs to know a component by name asks here: model folders, planning from configs, training, assembling.
Classes are imported when they are asked for, so that reading the table loads no network code.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arlon.components import Component


@dataclass(frozen=True, kw_only=True)
class ComponentKind:
    """One row of the table."""

    name: str
    """Name of the component: its folder inside a model folder, and its key in configuration files."""
    class_path: str | None
    """`module:class` of the network; None for the text encoder, which `arlon.text.encoders` loads by its kind."""
    config_path: str
    """`module:class` of the config dataclass."""
    recipe: str
    """Name of its file in a folder of `configs/`; a trained component also has a run folder of that name."""
    in_base: bool = False
    """Whether the base alone needs it: video from text without codes, as Open-Sora v1.2 makes it."""
    in_film: bool = True
    """Whether a film needs it; otherwise it serves training only."""
    released_kinds: tuple[str, ...] = ()
    """What the `config.json` of a released folder states as its kind (`model_type` or `_class_name`)."""

    @property
    def model_class(self) -> type[Component]:
        """Class of the network.

        Raises:
            LookupError: If the component has no class of its own (the text encoder).
        """
        if self.class_path is None:
            raise LookupError(f"{self.name!r} is loaded by its kind: use arlon.text.encoders.load_text_encoder")
        return _load(self.class_path)

    @property
    def config_class(self) -> type:
        """Config dataclass."""
        return _load(self.config_path)


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _table(rows: Iterable[ComponentKind]) -> dict[str, ComponentKind]:
    return {row.name: row for row in rows}


COMPONENTS = _table(
    (
        ComponentKind(
            name="vae",
            class_path="arlon.models.video_vae:VideoVAE",
            config_path="arlon.models.video_vae:VideoVAEConfig",
            recipe="vae",
            in_base=True,
            released_kinds=("VideoAutoencoderPipeline", "VideoVAE"),
        ),
        ComponentKind(
            name="vqvae",
            class_path="arlon.models.vqvae:LatentVQVAE",
            config_path="arlon.models.vqvae:LatentVQVAEConfig",
            recipe="vqvae",
        ),
        ComponentKind(
            name="vqvae_coarser",
            class_path="arlon.models.vqvae:LatentVQVAE",
            config_path="arlon.models.vqvae:LatentVQVAEConfig",
            recipe="vqvae_coarser",
            in_film=False,
        ),
        ComponentKind(
            name="ar",
            class_path="arlon.models.ar:CodeTransformer",
            config_path="arlon.models.ar:CodeTransformerConfig",
            recipe="ar",
        ),
        ComponentKind(
            name="dit",
            class_path="arlon.models.stdit:STDiT3",
            config_path="arlon.models.stdit:STDiT3Config",
            recipe="dit",
            in_base=True,
            released_kinds=("STDiT3",),
        ),
        ComponentKind(
            name="injection",
            class_path="arlon.models.injection:SemanticInjection",
            config_path="arlon.models.injection:InjectionConfig",
            recipe="inject",
        ),
        ComponentKind(
            name="text_encoder",
            class_path=None,
            config_path="arlon.text.encoders:TextEncoderConfig",
            recipe="model",
            in_base=True,
            released_kinds=("t5",),
        ),
    )
)
"""Every component by name, in the order in which messages list them."""
FILM_COMPONENTS = tuple(name for name, kind in COMPONENTS.items() if kind.in_film)
"""Names of what a film with codes needs."""
BASE_COMPONENTS = tuple(name for name, kind in COMPONENTS.items() if kind.in_base)
"""Names of what the base alone needs."""
CODE_COMPONENTS = tuple(name for name in FILM_COMPONENTS if name not in BASE_COMPONENTS)
"""Names of what codes need besides the base; a model has all of them or none."""
TRAINED_COMPONENTS = tuple(name for name, kind in COMPONENTS.items() if kind.class_path is not None)
"""Names of what is trained here; the text encoder is frozen."""
