"""Whether a film fits into the memory of a device, and what to change if it does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from typing import Any

from arlon.film.geometry import GenerationDefaults, ModelConfigs, make_geometry
from arlon.film.plan import Plan
from arlon.film.prepare import plan_storyboard
from arlon.film.settings import Settings
from arlon.film.storyboard import with_overrides
from arlon.grids import ceil_div
from arlon.models.video_pieces import MIN_TILE
from arlon.models.video_vae import VideoVAEConfig
from pipelines.doctor.film_cost import FilmCost, gigabytes, plan_cost
from pipelines.doctor.machine import Device, devices

SMALLER = (0.75, 0.5, 0.375, 0.25)
"""Factors of the frame size that are tried where a film does not fit."""
RELEASED_VAE_SIDE = 256
"""Side in pixels of the frames that the VAE of Open-Sora v1.2 was trained on."""
TILE_LATENTS = 8
"""Sides of tiles that are tried are multiples of so many latents."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Whether a film fits on a device."""

    model: str
    plan: Plan
    cost: FilmCost
    program_bytes: int
    """Memory of the program without any model."""
    device: Device
    settings: Settings
    has_text_encoder: bool
    lacks_text_encoder: bool
    """Whether the text encoder is not here, and cannot be downloaded."""
    text_encoder: str
    """Where the text encoder comes from, in words that go on from its name."""
    advice: tuple[str, ...]
    """What to change; empty if it fits."""

    @property
    def needed_bytes(self) -> int:
        """Memory on the device."""
        return self.cost.bytes + (self.program_bytes if self.device.name == "cpu" else 0)

    @property
    def fits(self) -> bool | None:
        """None: the device does not tell its memory."""
        return None if self.device.free_bytes is None else self.needed_bytes <= self.device.free_bytes


def memory_advice(fit: Fit, configs: ModelConfigs, defaults: GenerationDefaults) -> list[str]:
    """What to change, the change that keeps most first."""
    free = fit.device.free_bytes or 0
    advice = _options(fit, configs, defaults)
    if fit.settings.dtype == "bfloat16":
        rest = plan_cost(fit.plan, configs, settings=fit.settings).bytes
        advice.append(f"--dtype float32 needs {gigabytes(rest)}: bfloat16 keeps a rounded copy of the weights at work")
    if fit.cost.weight_bytes > free:
        largest = max(fit.cost.largest_together, key=lambda part: part.weight_bytes)
        shares = f"{gigabytes(fit.cost.weight_bytes)}, {gigabytes(largest.weight_bytes)} of it {largest.part}"
        advice.append(
            f"the weights alone take {shares}: use a machine or device with more memory, or spread the parts over "
            "machines with --executor ray"
        )
    others = [device for device in devices(timed=False) if device.name not in ("cpu", fit.device.name)]
    advice += [f"--device {d.name} has {gigabytes(d.free_bytes)} free" for d in others if (d.free_bytes or 0) > free]
    return [*advice, "--model shapes needs less than 1 GB and no text encoder beyond all-MiniLM-L6-v2"]


@dataclass(frozen=True, kw_only=True)
class _Change:
    """One way to need less memory."""

    option: str
    note: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    film: Mapping[str, Any] = field(default_factory=dict)


def _options(fit: Fit, configs: ModelConfigs, defaults: GenerationDefaults) -> list[str]:
    """Options that make the film fit, what keeps most first: one alone; two together where none does; and so on."""
    kinds = [kind for kind in _changes(fit, configs) if kind]
    for count in range(1, len(kinds) + 1):
        found = [_first_that_fits(fit, configs, defaults, chosen) for chosen in combinations(kinds, count)]
        if any(found):
            return [line for line in found if line]
    return []


def _first_that_fits(
    fit: Fit, configs: ModelConfigs, defaults: GenerationDefaults, kinds: Sequence[Sequence[_Change]]
) -> str | None:
    """The first changes, one of each kind, with which the film fits, in words; None if none do."""
    least = tuple(kind[-1] for kind in kinds)
    if not _changed(fit, configs, defaults, least).fits:
        return None
    for changes in product(*kinds):
        changed = _changed(fit, configs, defaults, changes)
        if changed.fits:
            break
    options = " ".join(change.option for change in changes)
    notes = "".join(f"; {change.note}" for change in changes if change.note)
    return f"{options} needs {gigabytes(changed.needed_bytes)}: fits{notes}"


def _changed(fit: Fit, configs: ModelConfigs, defaults: GenerationDefaults, changes: Sequence[_Change]) -> Fit:
    """The film with changes."""
    settings, plan = fit.settings, fit.plan
    for change in changes:
        settings = replace(settings, **change.settings)
        plan = (
            plan_storyboard(with_overrides(plan.storyboard, change.film), make_geometry(configs, defaults))
            if change.film
            else plan
        )
    cost = plan_cost(plan, configs, dtype=settings.dtype, settings=settings)
    return replace(fit, plan=plan, settings=settings, cost=cost)


def _changes(fit: Fit, configs: ModelConfigs) -> list[list[_Change]]:
    """Kinds of changes, that which keeps most first, and of each kind likewise; the last of a kind needs least."""
    vae, settings = configs.vae, fit.settings
    kinds: list[list[_Change]] = []
    if (settings.vae_micro_batch or vae.micro_batch_size) != 1:
        kinds.append([_Change(option="--set vae_micro_batch=1", settings={"vae_micro_batch": 1})])
    largest = max(fit.cost.parts, key=lambda part: part.weight_bytes)
    if largest.part == "text_encoder" and settings.text_dtype == "float32":
        note = "the text encoder is its largest part, and changes its features a little in bfloat16"
        change = _Change(option="--set text_dtype=bfloat16", settings={"text_dtype": "bfloat16"}, note=note)
        kinds.append([change])
    return [*kinds, _tiles(fit, configs), _smaller_frames(fit)]


def _tiles(fit: Fit, configs: ModelConfigs) -> list[_Change]:
    """Tiles, the largest first, of the frames the VAE was trained on at least."""
    smallest, geometry = _trained_side(fit, configs), fit.plan.geometry
    largest = max(fit.plan.frame_fit.made_height, fit.plan.frame_fit.made_width)
    if fit.settings.vae_tile is not None:
        largest = min(largest, fit.settings.vae_tile)
    unit = TILE_LATENTS * geometry.space_stride
    sides = [side for side in range(largest // unit * unit, smallest, -unit) if side < largest]
    note = f"smaller tiles than {smallest} would spoil the picture, the VAE was trained on frames of that size"
    return [
        _Change(option=f"--set vae_tile={side}", settings={"vae_tile": side}, note=note)
        for side in (*sides, smallest)
        if smallest <= side < largest
    ]


def _trained_side(fit: Fit, configs: ModelConfigs) -> int:
    """Side in pixels of the frames the VAE was trained on; unless it has the shape of the released one, the model's."""
    released = VideoVAEConfig()
    stated = ((part.spatial, part.temporal) for part in (configs.vae, released))
    if len({repr(shapes) for shapes in stated}) == 1:
        return RELEASED_VAE_SIDE
    defaults, stride = fit.plan.geometry.defaults, fit.plan.geometry.space_stride
    return ceil_div(max(defaults.height, defaults.width, MIN_TILE * stride), stride) * stride


def _smaller_frames(fit: Fit) -> list[_Change]:
    """Smaller frames, the largest first, if the model makes other sizes than its own."""
    film, geometry = fit.plan.storyboard, fit.plan.geometry
    if geometry.code_grid is not None:
        return []
    sizes = []
    for factor in SMALLER:
        multiple = geometry.size_multiple
        size = {
            name: max(multiple, round(getattr(film, name) * factor / multiple) * multiple)
            for name in ("height", "width")
        }
        sizes.append(_Change(option=f"--height {size['height']} --width {size['width']}", film=size))
    return sizes
