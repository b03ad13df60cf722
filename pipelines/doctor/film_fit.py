"""Whether a film fits into the memory of a device, and what to change if it does not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from typing import Any, Literal

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

Availability = Literal["cached", "downloadable", "missing"]
"""Whether the weights of a text encoder are on this machine, can be downloaded, or neither."""

SMALLER = (0.75, 0.5, 0.375, 0.25)
"""Factors of the frame size that are tried if a film does not fit."""
RELEASED_VAE_SIDE = 256
"""Side in pixels of the frames that the VAE of Open-Sora v1.2 was trained on."""
TILE_LATENTS = 8
"""The sides of the tiles that are tried are multiples of this many latents."""


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """Memory that a film needs, compared with what a device has free."""

    model: str
    """Name of the model, or of the model size."""
    configs: ModelConfigs
    defaults: GenerationDefaults
    plan: Plan
    cost: FilmCost
    program_bytes: int
    """Memory of the program without any model."""
    device: Device
    settings: Settings
    text_encoder: Availability

    @property
    def needed_bytes(self) -> int:
        """Memory that the film needs on the device."""
        return self.cost.bytes + (self.program_bytes if self.device.name == "cpu" else 0)

    @property
    def fits(self) -> bool | None:
        """Whether the film fits; None if the device does not tell its memory."""
        return None if self.device.free_bytes is None else self.needed_bytes <= self.device.free_bytes

    def changed(self, changes: Sequence[Change]) -> MemoryReport:
        """Report of the same film with changes."""
        settings, film = self.settings, self.plan.storyboard
        for change in changes:
            settings = replace(settings, **change.settings)
            film = with_overrides(film, change.film)
        plan = self.plan
        if film != plan.storyboard:  # planning is the slow part
            plan = plan_storyboard(film, make_geometry(self.configs, self.defaults))
        cost = plan_cost(plan, self.configs, settings)
        return replace(self, plan=plan, settings=settings, cost=cost)


@dataclass(frozen=True, kw_only=True)
class Change:
    """One way to need less memory."""

    option: str
    """Option as it is typed on the command line."""
    note: str = ""
    """Drawback of the change; empty if it has none."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    film: Mapping[str, Any] = field(default_factory=dict)
    """Film-level values of the storyboard."""


def memory_advice(report: MemoryReport) -> list[str]:
    """Advise what to change if a film does not fit, the change that keeps most of the film first."""
    if report.fits is not False:
        return []
    free = report.device.free_bytes or 0
    advice = _options_that_fit(report)
    if report.settings.dtype == "bfloat16":
        rest = plan_cost(report.plan, report.configs, replace(report.settings, dtype="float32")).bytes
        advice.append(f"--dtype float32 needs {gigabytes(rest)}: bfloat16 keeps a rounded copy of the weights at work")
    if report.cost.weight_bytes > free:
        largest = max(report.cost.largest_together, key=lambda part: part.weight_bytes)
        shares = f"{gigabytes(report.cost.weight_bytes)}, {gigabytes(largest.weight_bytes)} of it {largest.part}"
        advice.append(
            f"the weights alone take {shares}: use a machine or device with more memory, or spread the parts over "
            "machines with --executor ray"
        )
    for other in devices(timed=False):
        if other.name not in ("cpu", report.device.name) and (other.free_bytes or 0) > free:
            advice.append(f"--device {other.name} has {gigabytes(other.free_bytes or 0)} free")
    return [*advice, "--model shapes needs less than 1 GB and no text encoder beyond all-MiniLM-L6-v2"]


def _options_that_fit(report: MemoryReport) -> list[str]:
    """Options with which the film fits: single changes, or if none is enough, pairs of changes, and so on."""
    kinds = [kind for kind in _kinds_of_changes(report) if kind]
    for count in range(1, len(kinds) + 1):
        lines = []
        for chosen in combinations(kinds, count):
            # The last change of a kind needs least memory; if even these are not enough, none is.
            if not report.changed([kind[-1] for kind in chosen]).fits:
                continue
            changes = next(changes for changes in product(*chosen) if report.changed(changes).fits)
            options = " ".join(change.option for change in changes)
            notes = "".join(f"; {change.note}" for change in changes if change.note)
            lines.append(f"{options} needs {gigabytes(report.changed(changes).needed_bytes)}: fits{notes}")
        if lines:
            return lines
    return []


def _kinds_of_changes(report: MemoryReport) -> Iterator[list[Change]]:
    """Kinds of changes, the kind that keeps most of the film first, and the changes of a kind likewise."""
    if (report.settings.vae_micro_batch or report.configs.vae.micro_batch_size) != 1:
        yield [Change(option="--set vae_micro_batch=1", settings={"vae_micro_batch": 1})]
    largest = max(report.cost.parts, key=lambda part: part.weight_bytes)
    if largest.part == "text_encoder" and report.settings.text_dtype == "float32":
        note = "the text encoder is its largest part, and changes its features a little in bfloat16"
        yield [Change(option="--set text_dtype=bfloat16", settings={"text_dtype": "bfloat16"}, note=note)]
    yield tile_changes(report)
    film, geometry = report.plan.storyboard, report.plan.geometry
    if geometry.code_grid is None:  # otherwise the model makes frames of one size only
        multiple = geometry.size_multiple
        sizes = [
            {
                name: max(multiple, round(side * factor / multiple) * multiple)
                for name, side in (("height", film.height or 0), ("width", film.width or 0))
            }
            for factor in SMALLER
        ]
        yield [Change(option=f"--height {size['height']} --width {size['width']}", film=size) for size in sizes]


def tile_changes(report: MemoryReport) -> list[Change]:
    """VAE tiles smaller than the frames, the largest first, down to the size of the frames the VAE was trained on."""
    geometry, defaults = report.plan.geometry, report.defaults
    smallest, stride = RELEASED_VAE_SIDE, geometry.space_stride
    stated = ((vae.spatial, vae.temporal) for vae in (report.configs.vae, VideoVAEConfig()))
    if len({repr(shapes) for shapes in stated}) > 1:  # not the released VAE: take the frames that its model makes
        smallest = ceil_div(max(defaults.height, defaults.width, MIN_TILE * stride), stride) * stride
    largest = max(report.plan.frame_fit.made_height, report.plan.frame_fit.made_width)
    if report.settings.vae_tile is not None:
        largest = min(largest, report.settings.vae_tile)
    unit = TILE_LATENTS * stride
    sides = [side for side in range(largest // unit * unit, smallest, -unit) if side < largest]
    note = f"smaller tiles than {smallest} would spoil the picture, the VAE was trained on frames of that size"
    return [
        Change(option=f"--set vae_tile={side}", settings={"vae_tile": side}, note=note)
        for side in (*sides, smallest)
        if smallest <= side < largest
    ]
