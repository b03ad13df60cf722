"""From a storyboard to a plan: open the model, fill in what the storyboard leaves open, check the settings.

Nothing here loads weights or writes a file, so everything that can be refused is refused before any work starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arlon.errors import UsageError
from arlon.film.geometry import ModelGeometry, open_model, read_geometry
from arlon.film.plan import Plan, make_plan, resolve_storyboard, with_frame_size
from arlon.film.settings import Settings
from arlon.film.storyboard import Storyboard, random_seed
from arlon.threads import available_cores

if TYPE_CHECKING:
    from arlon.checkpoint import ModelFolder

DEFAULT_MODEL = "shapes"


@dataclass(frozen=True, kw_only=True)
class PlannedFilm:
    """The plan of a film, and the model it was planned for."""

    plan: Plan
    model: ModelFolder
    identity: Mapping[str, str]
    """Name and content hash of the model."""
    source: str
    """The model as it was asked for: a name, a hub id, or the full path of a folder."""


def plan_film(storyboard: Storyboard, model: str | None = None) -> PlannedFilm:
    """Open the model of a storyboard and plan the film.

    Args:
        storyboard: The film; what it leaves open is taken from the model.
        model: Name or path of the model. Default: the one that the storyboard names, or `shapes`.

    Raises:
        UsageError: If there is no such model, or the storyboard does not fit it.
        CheckpointError: If the model is damaged.
    """
    source = model if model is not None else storyboard.model or DEFAULT_MODEL
    path = Path(source).expanduser()
    if source and path.is_dir():
        source = str(path.resolve())  # a run must find its model whatever folder it is resumed from
    try:
        folder, identity = open_model(source)
    except FileNotFoundError as error:
        raise UsageError(str(error)) from error
    plan = plan_storyboard(replace(storyboard, model=identity["name"]), read_geometry(folder))
    return PlannedFilm(plan=plan, model=folder, identity=identity, source=source)


def plan_storyboard(storyboard: Storyboard, geometry: ModelGeometry) -> Plan:
    """Plan a film for a model of which only the sizes need to be known.

    A storyboard without a seed gets a random one.

    Raises:
        StoryboardError: If the storyboard does not fit the model.
        UsageError: If it names an unknown solver.
    """
    from arlon.diffusion.solvers import SOLVERS  # imports PyTorch, for which `--help` has no time

    resolved = resolve_storyboard(with_frame_size(storyboard, geometry), geometry.defaults, random_seed())
    SOLVERS[resolved.solver]  # refuses an unknown name
    return make_plan(resolved, geometry)


def make_settings(geometry: ModelGeometry, values: Mapping[str, Any]) -> Settings:
    """Build settings from the defaults of a model and given values.

    Args:
        geometry: Sizes and defaults of the model.
        values: Values by the names of `Settings`; None means not given.

    Raises:
        UsageError: If a value is unknown, out of range, or impossible with this model or on this machine.
    """
    from arlon.config import config_from_dict  # OmegaConf takes long to import
    from arlon.models.video_pieces import MIN_TILE

    names = ("ar_temperature", "ar_top_p", "ar_guidance_scale", "vae_blend_frames")
    base: dict[str, Any] = {name: getattr(geometry.defaults, name) for name in names}
    base |= {"num_threads": available_cores()}
    base |= {name: value for name, value in values.items() if value is not None}
    try:
        settings = config_from_dict(Settings, base)
        check_device(settings.device)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if settings.vae_blend_frames > geometry.max_blend_frames:
        raise UsageError(
            f"vae_blend_frames must be between 0 and {geometry.max_blend_frames} with the chunks of this model's VAE, "
            f"got {settings.vae_blend_frames}"
        )
    stride = geometry.space_stride
    if settings.vae_tile is not None and (settings.vae_tile % stride or settings.vae_tile < MIN_TILE * stride):
        raise UsageError(
            f"vae_tile must be a multiple of {stride} pixels and at least {MIN_TILE * stride}, got {settings.vae_tile}"
        )
    return settings


def check_device(device: str) -> None:
    """Refuse a device that PyTorch does not know or this machine does not have.

    Raises:
        ValueError: If it cannot compute.
    """
    import torch

    try:
        torch.zeros(1, device=device).cpu()  # and back: the meta device accepts tensors, but computes nothing
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"cannot compute on device {device!r}, try 'cpu': {reason[:120]}") from error
