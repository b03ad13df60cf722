"""Sizes, grids and defaults of a model, from its configs: all that planning needs, without any weights.

A model is either complete, or a *base* alone: VAE, DiT and text encoder, without codes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arlon.grids import SegmentGrid
from arlon.registry import BASE_COMPONENTS, CODE_COMPONENTS, COMPONENTS, FILM_COMPONENTS

if TYPE_CHECKING:
    from arlon.checkpoint import ModelFolder
    from arlon.models.ar import CodeTransformerConfig
    from arlon.models.injection import InjectionConfig
    from arlon.models.video_vae import VideoVAEConfig
    from arlon.models.vqvae import LatentVQVAEConfig
    from arlon.protocols import BackboneSpec
    from arlon.text.encoders import TextEncoderConfig


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """Values for a film that leaves them open: the `defaults` in the index of a model folder."""

    height: int = 512
    """Frame height in pixels."""
    width: int = 512
    """Frame width in pixels."""
    fps: float = 24.0
    segment: int = 20
    """Latent frames of a segment."""
    overlap: int = 5
    """Latent frames carried over from the segment before."""
    guidance_scale: float = 7.0
    """Text guidance of the diffusion transformer; 1 turns it off."""
    shift_scale: float = 1.0
    """Factor of the resolution-aware time shift; see `arlon.diffusion.flow.shift_times`."""
    shift_base_size: int = 512
    """Frame side in pixels at which the spatial part of that shift is 1."""
    num_inference_steps: int = 30
    solver: str = "euler"
    ar_temperature: float = 1.0
    ar_top_p: float = 0.95
    ar_guidance_scale: float = 3.0
    """Text guidance of the code model; 1 turns it off."""
    aesthetic_score: float | None = None
    """Score added to every prompt, as released weights were trained on captions with scores; None adds nothing."""
    vae_blend_frames: int = 0
    """Frames blended on each side of the VAE's chunk borders; see `arlon.film.settings.Settings`."""


@dataclass(frozen=True, kw_only=True)
class ModelGeometry:
    """Sizes that a model works with, and how it is best used."""

    defaults: GenerationDefaults
    grid: SegmentGrid
    space_stride: int
    """Pixels per latent row or column."""
    patch_size: tuple[int, int, int]
    """Latent frames, rows and columns of one DiT token."""
    code_ratio: tuple[int, int, int]
    """Latent frames, rows and columns of one code."""
    code_halo: int = 0
    """Code frames on either side of its own that the VQ-VAE decoder depends on."""
    code_grid: tuple[int, int] | None = None
    """Rows and columns of codes that the AR model writes; None if it writes any number."""
    has_codes: bool = True
    """Whether the model plans with codes; a base alone does not, and its `code_ratio` is 1."""
    max_blend_frames: int = 0
    """Most frames on each side of a chunk border that the VAE can blend."""

    @property
    def size_multiple(self) -> int:
        """Frame height and width must be multiples of this many pixels."""
        return self.space_stride * max(self.patch_size[1:])

    def without_codes(self) -> ModelGeometry:
        """Geometry of the base alone."""
        return replace(self, code_ratio=(1, 1, 1), code_halo=0, code_grid=None, has_codes=False)

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Latent rows and columns of a frame."""
        return height // self.space_stride, width // self.space_stride


@dataclass(frozen=True, kw_only=True)
class ModelConfigs:
    """Configs of the components that make a film. A base alone has neither `vqvae`, `ar` nor `injection`."""

    vae: VideoVAEConfig
    backbone: BackboneSpec
    """Sizes of the component `dit`, of whatever family it is."""
    text_encoder: TextEncoderConfig
    vqvae: LatentVQVAEConfig | None = None
    ar: CodeTransformerConfig | None = None
    injection: InjectionConfig | None = None

    @property
    def has_codes(self) -> bool:
        """Whether the model plans with codes."""
        return self.vqvae is not None

    def without_codes(self) -> ModelConfigs:
        """The base alone."""
        return replace(self, vqvae=None, ar=None, injection=None)


def open_model(
    name_or_path: str, *, required: Iterable[str] | None = None, download: bool = True
) -> tuple[ModelFolder, Mapping[str, str]]:
    """Open a model by name, path, model file or hub id, and check it.

    Args:
        name_or_path: Name, path or hub id of the model.
        required: Components that the model must have. Default: those of a base; it may have codes besides.
        download: Whether a model of the hub that is not in the cache may be downloaded.

    Returns:
        The model folder, and what may be written about it into a film: its name (no host path) and content hash.

    Raises:
        FileNotFoundError: If there is no such model.
        CheckpointError: If its components are damaged or do not fit each other.
    """
    from arlon.checkpoint import MODEL_FILE_SUFFIXES, ModelFolder, resolve_model

    wanted = BASE_COMPONENTS if required is None else tuple(required)
    model = ModelFolder.open(resolve_model(name_or_path, download=download), required=wanted)
    path = Path(name_or_path).expanduser()
    name = name_or_path
    if path.is_dir():
        name = path.resolve().name
    elif path.suffix in MODEL_FILE_SUFFIXES:
        name = path.stem
    return model, {"name": name, "hash": model.model_hash}


def read_configs(model: ModelFolder) -> ModelConfigs:
    """Configs of the components of a model folder.

    Raises:
        FileNotFoundError: If VAE, DiT or text encoder is missing, or some but not all of what codes need.
        ConfigError: If a config is not what this version knows.
    """
    from arlon.backbones import read_backbone_spec
    from arlon.components import read_config
    from arlon.text.encoders import read_text_config

    there = [name for name in CODE_COMPONENTS if name in model.components]
    missing = [name for name in CODE_COMPONENTS if name not in there]
    if there and missing:
        raise FileNotFoundError(
            f"model {str(model.path)!r} has {', '.join(there)} but lacks {', '.join(missing)}: a base alone has none"
        )
    configs: dict[str, Any] = {
        name: read_config(COMPONENTS[name].model_class, model.component(name)) for name in ("vae", *there)
    }
    return ModelConfigs(
        backbone=read_backbone_spec(model.component("dit")),
        text_encoder=read_text_config(model.component("text_encoder")),
        **configs,
    )


def read_size(name: str) -> tuple[ModelConfigs, GenerationDefaults] | None:
    """Read configs and defaults of a model size, a folder of `configs/`; None if there is no such size.

    Raises:
        ConfigError: If a config is not what this version knows.
    """
    from arlon.backbones.stdit3 import spec_of
    from arlon.config import config_from_dict
    from arlon.film.strict_yaml import parse_yaml

    spec = importlib.util.find_spec("configs")
    places = spec.submodule_search_locations if spec is not None and name.isidentifier() else None
    folder = next((Path(place) / name for place in places or () if (Path(place) / name).is_dir()), None)
    if folder is None:
        return None
    files = {part: folder / f"{COMPONENTS[part].recipe}.yaml" for part in FILM_COMPONENTS}
    if not all(file.is_file() for file in files.values()):
        return None
    values = {part: parse_yaml(file.read_text(encoding="utf-8")) for part, file in files.items()}
    configs: dict[str, Any] = {
        part: config_from_dict(COMPONENTS[part].config_class, values[part][part]) for part in FILM_COMPONENTS
    }
    configs["backbone"] = spec_of(configs.pop("dit"))
    return ModelConfigs(**configs), config_from_dict(GenerationDefaults, values["text_encoder"]["defaults"])


def read_geometry(model: ModelFolder) -> ModelGeometry:
    """Read sizes and defaults of a model folder, from its configs alone.

    Raises:
        FileNotFoundError: If a component is missing.
        ConfigError: If a config or a default is not what this version knows.
    """
    from arlon.config import config_from_dict

    return make_geometry(read_configs(model), config_from_dict(GenerationDefaults, model.defaults))


def make_geometry(configs: ModelConfigs, defaults: GenerationDefaults) -> ModelGeometry:
    """Sizes and defaults of a model.

    Raises:
        ValueError: If the VAE does not work in chunks of frames.
    """
    geometry = ModelGeometry(
        defaults=defaults,
        grid=_segment_grid(configs.vae, defaults),
        space_stride=configs.vae.space_stride,
        patch_size=configs.backbone.patch_size,
        code_ratio=(1, 1, 1),
        has_codes=False,
        max_blend_frames=configs.vae.max_blend_frames,
    )
    if configs.vqvae is None or configs.ar is None:
        return geometry
    return replace(
        geometry,
        code_ratio=configs.vqvae.ratio,
        code_halo=configs.vqvae.receptive_halo,
        code_grid=configs.ar.grid,
        has_codes=True,
    )


def _segment_grid(vae: VideoVAEConfig, defaults: GenerationDefaults) -> SegmentGrid:
    if vae.micro_frame_size is None:
        raise ValueError(
            "the model's VAE works on whole videos (micro_frame_size is null): films need one that works in chunks of "
            "frames, the released one of 17; set that in the config.json of the VAE, or take another VAE"
        )
    return SegmentGrid(
        segment=defaults.segment,
        overlap=defaults.overlap,
        chunk_frames=vae.micro_frame_size,
        time_stride=vae.temporal.time_stride,
    )
