"""What this machine has, what a film needs, and what to change if it does not fit.

Nothing is downloaded, and no weights are loaded.
"""

from __future__ import annotations

import importlib.metadata
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arlon.data.video_io import VideoWriter, probe
from arlon.grids import ceil_div
from arlon.models.video_pieces import MIN_TILE
from arlon.models.video_vae import VideoVAEConfig
from arlon.text.encoders import TextEncoderConfig
from arlon.text.sources import can_be_had, describe_whence, is_at_hand
from pipelines.film_cost import FilmCost, cost_lines, gigabytes, operations, plan_cost
from pipelines.generate import available_cores, make_settings
from pipelines.model import (
    GenerationDefaults,
    ModelConfigs,
    ModelGeometry,
    make_geometry,
    open_model,
    read_configs,
    read_size,
)
from pipelines.plan import Plan, make_plan, resolve_storyboard
from pipelines.requests import Settings
from pipelines.storyboard import (
    Storyboard,
    UsageError,
    random_seed,
    storyboard_from_prompts,
    with_overrides,
)
from pipelines.storyboard_values import parse_duration
from pipelines.version import version
from pipelines.workers import process_memory_bytes

PACKAGES = ("torch", "av", "transformers", "diffusers", "safetensors", "huggingface_hub")
OPTIONAL = {
    "ray": "actors on several cores or machines: pip install 'arlon[ray]'",
    "lightning": "training: pip install 'arlon[train]'",
    "sentencepiece": "tokenizer of a released T5: pip install sentencepiece",
}
MODES = {
    "text": "a film from prompts",
    "image": "one that begins with a picture (image:)",
    "end_image": "one that ends on a picture (end_image:)",
    "video": "one that goes on from a video (video:)",
    "picture": "one frame as a PNG (--num-frames 1)",
}
"""What every model makes, as storyboards and options ask for it: given frames are held, no part is needed for that."""
ENCODER_NAMES = {"minilm": "all-MiniLM-L6-v2", "t5": "its T5"}
SMALLER = (0.75, 0.5, 0.375, 0.25)
"""Factors of the frame size that are tried where a film does not fit."""
RELEASED_VAE_SIDE = 256
"""Side in pixels of the frames that the VAE of Open-Sora v1.2 was trained on."""
TILE_LATENTS = 8
"""Sides of tiles that are tried are multiples of so many latents."""
MATMUL_SIZE = 1024
MATMUL_S = 0.2
"""How long one precision is timed."""
CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


@dataclass(frozen=True, kw_only=True)
class Device:
    """Where networks can run."""

    name: str
    """As --device takes it."""
    kind: str
    memory_bytes: int | None
    """None: not known."""
    free_bytes: int | None
    flops_per_s: dict[str, float]
    """Operations a second of one large matrix product, by precision; empty: not measured."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What `arlon doctor` looks at."""

    arlon: str
    python: str
    system: str
    packages: dict[str, str | None]
    """Versions; None: not installed."""
    devices: tuple[Device, ...]
    video: str | None
    """What is wrong with writing H.264; None: nothing."""
    has_minilm: bool
    """Whether the text encoder of the small model is here."""
    minilm: str
    """Where that comes from, in words."""


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


def examine() -> Machine:
    """Look at this machine; takes a second."""
    return Machine(
        arlon=version(),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        packages={name: _version(name) for name in (*PACKAGES, *OPTIONAL)},
        devices=(_cpu(), *_accelerators()),
        video=video_problem(),
        has_minilm=is_at_hand(TextEncoderConfig()),
        minilm=describe_whence(TextEncoderConfig()),
    )


def check_fit(
    model: str,
    *,
    height: int | None = None,
    width: int | None = None,
    duration: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    values: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Fit:
    """Compute what a film of one shot needs, and compare it with what a device has free.

    Args:
        model: A model, or a model size (a folder of `configs/`), for which no weights are needed.
        height: Of a frame in pixels; the model's own if None.
        width: Likewise.
        duration: Of the film, as in a storyboard; 5 seconds if None.
        device: Where it would run.
        dtype: Precision it would run in.
        values: Further values of the film, as --set takes them.
        settings: Values of `Settings`, likewise.

    Raises:
        UsageError: If there is no such model, size, device or setting.
        ValueError: If the model is damaged.
    """
    configs, defaults, name = _configs(model)
    try:
        length = None if duration is None else parse_duration(duration)
    except ValueError as error:
        raise UsageError(str(error)) from error
    film = storyboard_from_prompts(["a film"], duration=length)
    film = with_overrides(film, {**(values or {}), "height": height, "width": width})
    plan = _plan(film, configs, defaults)
    chosen = make_settings(plan.geometry, {"dtype": dtype, **(settings or {}), "device": device})
    wanted = f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device
    found = next((here for here in (_cpu(timed=False), *_accelerators(timed=False)) if here.name == wanted), None)
    fit = Fit(
        model=name,
        plan=plan,
        cost=plan_cost(plan, configs, dtype=chosen.dtype, settings=chosen),
        program_bytes=process_memory_bytes(),
        device=found or Device(name=device, kind=device, memory_bytes=None, free_bytes=None, flops_per_s={}),
        settings=chosen,
        has_text_encoder=is_at_hand(configs.text_encoder),
        lacks_text_encoder=not can_be_had(configs.text_encoder),
        text_encoder=f"{ENCODER_NAMES[configs.text_encoder.kind]} {describe_whence(configs.text_encoder)}",
        advice=(),
    )
    return fit if fit.fits is not False else replace(fit, advice=tuple(_advice(fit, configs, defaults)))


def _configs(model: str) -> tuple[ModelConfigs, GenerationDefaults, str]:
    from arlon.checkpoint import BASE_COMPONENTS, PACKAGED_MODELS
    from arlon.config import config_from_dict

    if model not in PACKAGED_MODELS and not Path(model).exists() and (size := read_size(model)) is not None:
        return *size, model
    try:
        folder, identity = open_model(model, required=BASE_COMPONENTS, download=False)
    except FileNotFoundError as error:
        raise UsageError(
            f"{error}. What a size needs can be computed without weights: --model opensora_v1_2"
        ) from error
    return read_configs(folder), config_from_dict(GenerationDefaults, folder.defaults), identity["name"]


def _plan(film: Storyboard, configs: ModelConfigs, defaults: GenerationDefaults) -> Plan:
    return make_plan(resolve_storyboard(film, defaults, random_seed()), make_geometry(configs, defaults))


def _advice(fit: Fit, configs: ModelConfigs, defaults: GenerationDefaults) -> list[str]:
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
    others = [device for device in _accelerators(timed=False) if device.name != fit.device.name]
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
        plan = _plan(with_overrides(plan.storyboard, change.film), configs, defaults) if change.film else plan
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


def machine_lines(machine: Machine) -> list[tuple[str, str]]:
    """What to print about a machine: name and text."""
    packages = ", ".join(f"{name} {machine.packages[name] or 'missing'}" for name in PACKAGES)
    lines = [("arlon", f"{machine.arlon}, Python {machine.python}, {machine.system}"), ("packages", packages)]
    for device in machine.devices:
        rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {name}" for name, rate in device.flops_per_s.items())
        lines.append(
            ("device", f"{device.name}: {_memory(device)}" + (f"; one matrix product: {rates}" if rates else ""))
        )
    if len(machine.devices) == 1:
        lines.append(("", "no GPU that PyTorch can use: the small model runs well without, the full size does not"))
    lines.append(("video", machine.video or "H.264 is encoded and decoded"))
    lines.append(("text", f"the small model's encoder all-MiniLM-L6-v2 {machine.minilm}"))
    lines += [(name, machine.packages[name] or f"not installed; {what}") for name, what in OPTIONAL.items()]
    return lines


def fit_lines(fit: Fit, rates: dict[str, float]) -> list[tuple[str, str]]:
    """What to print about a film: name and text; `rates` are operations a second by precision."""
    film = fit.plan.storyboard
    lines = [
        (
            "model",
            f"{fit.model}; {'plans with codes' if fit.plan.geometry.has_codes else 'a base alone, without codes'}",
        ),
        ("makes", ", ".join(MODES.values())),
        ("", mode_line(fit.plan.geometry)),
        (
            "film",
            f"{fit.plan.num_frames} frames, {fit.plan.duration_s:.2f} s, {film.width} x {film.height} pixels, "
            f"segments: {len(fit.plan.segments)}, steps: {film.num_inference_steps}",
        ),
        *(("needs", line) for line in cost_lines(fit.cost)),
    ]
    if rate := rates.get(fit.settings.dtype):
        lines.append(
            ("time", f"at least {_span(fit.cost.flops / rate)} at {operations(rate)}/s in {fit.settings.dtype}")
        )
    lines.append(("text", fit.text_encoder))
    needed, free = gigabytes(fit.needed_bytes), gigabytes(fit.device.free_bytes or 0)
    verdict = {
        None: f"{fit.device.name} does not tell its memory; {needed} are needed",
        True: f"yes: {needed} with the program, {free} free on {fit.device.name}",
        False: f"NO: {needed} with the program, {free} free on {fit.device.name}",
    }
    return [*lines, ("fits", verdict[fit.fits]), *(("try", line) for line in fit.advice)]


def mode_line(geometry: ModelGeometry) -> str:
    """With or without codes, and at which sizes, in words."""
    any_size = "at any even size"
    if not geometry.has_codes:
        return f"without codes, {any_size}"
    defaults = geometry.defaults
    size = any_size if geometry.code_grid is None else f"at {defaults.width} x {defaults.height} pixels"
    return f"with codes, {size}; with the base alone (--base-only), {any_size}"


def to_plain(machine: Machine, fit: Fit | None) -> dict[str, Any]:
    """Plain values for JSON."""
    plain: dict[str, Any] = asdict(machine) | {"devices": [asdict(device) for device in machine.devices]}
    if fit is not None:
        plain["film"] = {
            "model": fit.model,
            "num_frames": fit.plan.num_frames,
            "height": fit.plan.storyboard.height,
            "width": fit.plan.storyboard.width,
            "cost": fit.cost.to_plain(),
            "program_bytes": fit.program_bytes,
            "needed_bytes": fit.needed_bytes,
            "device": fit.device.name,
            "free_bytes": fit.device.free_bytes,
            "fits": fit.fits,
            "settings": fit.settings.to_plain(),
            "has_text_encoder": fit.has_text_encoder,
            "lacks_text_encoder": fit.lacks_text_encoder,
            "text_encoder": fit.text_encoder,
            "modes": list(MODES),
            "has_codes": fit.plan.geometry.has_codes,
            "advice": list(fit.advice),
        }
    return plain


def video_problem() -> str | None:
    """What is wrong with writing a film, found by writing one; None: nothing."""
    frames = np.zeros((2, 16, 16, 3), dtype=np.uint8)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "film.mp4"
            with VideoWriter(path, fps=8) as writer:
                writer.append(frames)
            if probe(path).num_frames != len(frames):
                return "H.264 is encoded, but not all frames come back"
    except Exception as error:  # whatever it is, it is what the user should read
        return f"H.264 cannot be written: {error}"
    return None


def _cpu(*, timed: bool = True) -> Device:
    total, free = memory_limits()
    return Device(
        name="cpu",
        kind=f"{available_cores()} cores",
        memory_bytes=total,
        free_bytes=free,
        flops_per_s=_matmul_rates("cpu") if timed else {},
    )


def _accelerators(*, timed: bool = True) -> list[Device]:
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name, kind = f"cuda:{index}", torch.cuda.get_device_name(index)
        rates = _matmul_rates(name) if timed else {}
        found.append(Device(name=name, kind=kind, memory_bytes=total, free_bytes=free, flops_per_s=rates))
    if torch.backends.mps.is_available():
        total = torch.mps.recommended_max_memory()
        free = total - torch.mps.driver_allocated_memory()
        rates = _matmul_rates("mps") if timed else {}
        found.append(Device(name="mps", kind="Apple GPU", memory_bytes=total, free_bytes=free, flops_per_s=rates))
    return found


def memory_limits() -> tuple[int | None, int | None]:
    """Memory of this machine or container, and what of it is free; None: the system does not tell."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        total, free = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return None, None
    for limit_file, used_file in CGROUP_FILES:
        try:
            limit, used = (int(Path(file).read_text()) for file in (limit_file, used_file))
        except (OSError, ValueError):  # not there, or "max"
            continue
        total, free = min(total, limit), min(free, max(0, limit - used))
    return total, free


def _matmul_rates(device: str) -> dict[str, float]:
    """Operations a second of a matrix product in float32 and bfloat16."""
    rates = {}
    for name in ("float32", "bfloat16"):
        a = torch.ones(MATMUL_SIZE, MATMUL_SIZE, device=device, dtype=getattr(torch, name))
        float((a @ a)[0, 0])  # warm up, and wait
        count, started_s = 0, time.perf_counter()
        while (elapsed_s := time.perf_counter() - started_s) < MATMUL_S:
            float((a @ a)[0, 0])
            count += 1
        rates[name] = count * 2 * MATMUL_SIZE**3 / elapsed_s
    return rates


def _memory(device: Device) -> str:
    if device.memory_bytes is None or device.free_bytes is None:
        return f"{device.kind}, memory unknown"
    return f"{device.kind}, {gigabytes(device.memory_bytes)} memory, {gigabytes(device.free_bytes)} free"


def _span(seconds: float) -> str:
    """A time for people: `40 s`, `12 min`, `3.1 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
