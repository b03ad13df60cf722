"""What a pipeline knows of a model before it loads any weights: sizes, grids and defaults, from its configs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arlon.grids import SegmentGrid

if TYPE_CHECKING:
    from arlon.checkpoint import ModelFolder


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """What a model folder says about how to use it: the `defaults` of its index."""

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


@dataclass(frozen=True, kw_only=True)
class ModelGeometry:
    """The sizes a model works with and how it is best used."""

    defaults: GenerationDefaults
    grid: SegmentGrid
    space_stride: int
    """Pixels per latent row or column."""
    patch_size: tuple[int, int, int]
    """Latent frames, rows and columns of one DiT token."""
    code_ratio: tuple[int, int, int]
    """Latent frames, rows and columns of one code."""
    code_halo: int = 0
    """Code frames on either side that the VQ-VAE decoder looks at."""
    code_grid: tuple[int, int] | None = None
    """Rows and columns of codes the AR model writes; None: any."""

    @property
    def size_multiple(self) -> int:
        """Frame height and width must be multiples of this many pixels."""
        return self.space_stride * max(self.patch_size[1:])

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Latent rows and columns of a frame."""
        return height // self.space_stride, width // self.space_stride


def open_model(name_or_path: str) -> tuple[ModelFolder, Mapping[str, str]]:
    """Open a model by name or path and check it.

    Returns:
        The model folder, and what may be written about it into a film: its name (no host path) and content hash.

    Raises:
        FileNotFoundError: If there is no such model.
        CheckpointError: If its components are damaged or do not fit each other.
    """
    from arlon.checkpoint import ModelFolder, resolve_model

    model = ModelFolder.open(resolve_model(name_or_path))
    is_path = Path(name_or_path).expanduser().is_dir()
    name = Path(name_or_path).expanduser().resolve().name if is_path else name_or_path
    return model, {"name": name, "hash": model.model_hash}


def read_geometry(model: ModelFolder) -> ModelGeometry:
    """Sizes and defaults of a model folder, from its configs alone.

    Raises:
        ConfigError: If a config or a default is not what this version knows.
    """
    from arlon.checkpoint import component_config
    from arlon.config import config_from_dict
    from arlon.models.video_vae import VideoVAE, VideoVAEConfig
    from arlon.models.vqvae import LatentVQVAE, LatentVQVAEConfig

    defaults = config_from_dict(GenerationDefaults, model.defaults)
    vae_values = VideoVAE.translate_config(component_config(model.component("vae"), VideoVAE))
    vae: VideoVAEConfig = config_from_dict(VideoVAEConfig, vae_values)
    vqvae = config_from_dict(LatentVQVAEConfig, component_config(model.component("vqvae"), LatentVQVAE))
    code_size = component_config(model.component("ar")).get("grid")
    return ModelGeometry(
        defaults=defaults,
        grid=_segment_grid(vae, defaults),
        space_stride=vae.space_stride,
        patch_size=_triple(component_config(model.component("dit")).get("patch_size", (1, 2, 2))),
        code_ratio=vqvae.ratio,
        code_halo=vqvae.receptive_halo,
        code_grid=None if code_size is None else (int(code_size[0]), int(code_size[1])),
    )


def _segment_grid(vae: Any, defaults: GenerationDefaults) -> SegmentGrid:
    if vae.micro_frame_size is None:
        raise ValueError("the model's VAE works on whole videos: films need one that works in chunks of frames")
    return SegmentGrid(
        segment=defaults.segment,
        overlap=defaults.overlap,
        chunk_frames=vae.micro_frame_size,
        time_stride=vae.temporal.time_stride,
    )


def _triple(values: Any) -> tuple[int, int, int]:
    t, h, w = (int(value) for value in values)
    return t, h, w
