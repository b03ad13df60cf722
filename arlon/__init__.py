"""Arlon: long video from text. `ArlonPipeline` makes films; the models it is built from can be used by themselves.

Public names are loaded when they are first used, so that `import arlon` and the command line start at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arlon.models.ar import CodeTransformer
    from arlon.models.injection import SemanticInjection
    from arlon.models.stdit import STDiT3
    from arlon.models.video_vae import VideoVAE
    from arlon.models.vqvae import LatentVQVAE
    from arlon.pipeline import ArlonPipeline, Film, FilmSegment
    from arlon.text.encoders import load_text_encoder

__all__ = [
    "ArlonPipeline",
    "CodeTransformer",
    "Film",
    "FilmSegment",
    "LatentVQVAE",
    "STDiT3",
    "SemanticInjection",
    "VideoVAE",
    "load_text_encoder",
]

_MODULES = {
    "ArlonPipeline": "arlon.pipeline",
    "CodeTransformer": "arlon.models.ar",
    "Film": "arlon.pipeline",
    "FilmSegment": "arlon.pipeline",
    "LatentVQVAE": "arlon.models.vqvae",
    "STDiT3": "arlon.models.stdit",
    "SemanticInjection": "arlon.models.injection",
    "VideoVAE": "arlon.models.video_vae",
    "load_text_encoder": "arlon.text.encoders",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its module."""
    if name not in _MODULES:
        raise AttributeError(f"module 'arlon' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
