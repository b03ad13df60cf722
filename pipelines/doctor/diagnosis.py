"""What `arlon doctor` finds: whether a film fits this machine, in lines to print or plain values.

Nothing is downloaded, and no weights are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from arlon.checkpoint import BASE_COMPONENTS, PACKAGED_MODELS
from arlon.config import config_from_dict
from arlon.errors import UsageError
from arlon.film.geometry import (
    GenerationDefaults,
    ModelConfigs,
    ModelGeometry,
    make_geometry,
    open_model,
    read_configs,
    read_size,
)
from arlon.film.prepare import make_settings, plan_storyboard
from arlon.film.storyboard import storyboard_from_prompts, with_overrides
from arlon.film.storyboard_values import parse_duration
from arlon.film.workers import process_memory_bytes
from arlon.text import sources
from arlon.text.encoders import TextEncoderConfig
from pipelines.doctor.film_cost import cost_lines, gigabytes, operations, plan_cost
from pipelines.doctor.film_fit import Availability, MemoryReport, memory_advice
from pipelines.doctor.machine import Device, Machine, devices

MODES = {
    "text": "a film from prompts",
    "image": "one that begins with a picture (image:)",
    "end_image": "one that ends on a picture (end_image:)",
    "video": "one that continues a video (video:)",
    "picture": "one frame as a PNG (--num-frames 1)",
}
"""What every model makes, by the key or option that asks for it; given frames are held fixed, so no part is missing."""
ENCODER_NAMES = {"minilm": "all-MiniLM-L6-v2", "t5": "its T5"}


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
) -> MemoryReport:
    """Compute what a film of one shot needs, and compare it with what a device has free.

    Args:
        model: A model, or a model size (a folder of `configs/`), for which no weights are needed.
        height: Frame height in pixels. Default: the model's own.
        width: Frame width in pixels. Default: the model's own.
        duration: Length of the film, as in a storyboard. Default: 5 seconds.
        device: Device that it would run on.
        dtype: Precision that it would run in.
        values: Further film-level values of the storyboard.
        settings: Values of `Settings`.

    Raises:
        UsageError: If there is no such model, size, device or setting.
        CheckpointError: If the model is damaged.
    """
    configs, defaults, name = _read_model(model)
    try:
        length = None if duration is None else parse_duration(duration)
    except ValueError as error:
        raise UsageError(f"--duration {error}") from error
    film = storyboard_from_prompts(["a film"], duration=length)
    film = with_overrides(film, {**(values or {}), "height": height, "width": width})
    plan = plan_storyboard(film, make_geometry(configs, defaults))
    chosen = make_settings(plan.geometry, {"dtype": dtype, **(settings or {}), "device": device})
    wanted = f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device
    found = next((here for here in devices(timed=False) if here.name == wanted), None)
    return MemoryReport(
        model=name,
        configs=configs,
        defaults=defaults,
        plan=plan,
        cost=plan_cost(plan, configs, chosen),
        program_bytes=process_memory_bytes(),
        device=found or Device(name=device, kind=device, memory_bytes=None, free_bytes=None, flops_per_s={}),
        settings=chosen,
        text_encoder=availability(configs.text_encoder),
    )


def availability(config: TextEncoderConfig) -> Availability:
    """Find out whether a text encoder is on this machine or can be downloaded; nothing is downloaded."""
    if sources.is_cached(config):
        return "cached"
    return "downloadable" if sources.is_available(config) else "missing"


def _read_model(model: str) -> tuple[ModelConfigs, GenerationDefaults, str]:
    """Read configs, defaults and name of a model, or of a model size.

    Raises:
        UsageError: If there is neither.
        CheckpointError: If the model is damaged.
    """
    if model not in PACKAGED_MODELS and not Path(model).exists() and (size := read_size(model)) is not None:
        return *size, model
    try:
        folder, identity = open_model(model, required=BASE_COMPONENTS, download=False)
    except FileNotFoundError as error:
        raise UsageError(
            f"{error}. What a size needs can be computed without weights: --model opensora_v1_2"
        ) from error
    return read_configs(folder), config_from_dict(GenerationDefaults, folder.defaults), identity["name"]


def fit_lines(report: MemoryReport, rates: Mapping[str, float]) -> list[tuple[str, str]]:
    """Lines to print about a film, as pairs of name and text.

    Args:
        report: What the film needs.
        rates: Floating-point operations a second of the device, by precision.
    """
    plan, cost = report.plan, report.cost
    film, encoder = plan.storyboard, report.configs.text_encoder
    kind = "plans with codes" if plan.geometry.has_codes else "a base alone, without codes"
    lines = [
        ("model", f"{report.model}; {kind}"),
        ("makes", ", ".join(MODES.values())),
        ("", _describe_sizes(plan.geometry)),
        (
            "film",
            f"{plan.num_frames} frames, {plan.duration_s:.2f} s, {film.width} x {film.height} pixels, "
            f"segments: {len(plan.segments)}, steps: {film.num_inference_steps}",
        ),
        *(("needs", line) for line in cost_lines(cost)),
    ]
    if rate := rates.get(report.settings.dtype):
        time = _describe_time(cost.flops / rate)
        lines.append(("time", f"at least {time} at {operations(rate)}/s in {report.settings.dtype}"))
    lines.append(("text", f"{ENCODER_NAMES.get(encoder.kind, encoder.kind)} {sources.describe_source(encoder)}"))
    device, needed = report.device, gigabytes(report.needed_bytes)
    free = f"{gigabytes(device.free_bytes or 0)} free on {device.name}"
    verdict = {
        None: f"{device.name} does not tell its memory; {needed} are needed",
        True: f"yes: {needed} with the program, {free}",
        False: f"NO: {needed} with the program, {free}",
    }
    return [*lines, ("fits", verdict[report.fits]), *(("try", line) for line in memory_advice(report))]


def _describe_sizes(geometry: ModelGeometry) -> str:
    """Whether a model has codes, and which frame sizes it makes."""
    if not geometry.has_codes:
        return "without codes, at any even size"
    defaults = geometry.defaults
    size = "at any even size" if geometry.code_grid is None else f"at {defaults.width} x {defaults.height} pixels"
    return f"with codes, {size}; with the base alone (--base-only), at any even size"


def to_plain(machine: Machine, report: MemoryReport | None) -> dict[str, Any]:
    """Convert what was found to plain values for JSON."""
    plain: dict[str, Any] = asdict(machine) | {"devices": [asdict(device) for device in machine.devices]}
    if report is not None:
        plain["film"] = {
            "model": report.model,
            "num_frames": report.plan.num_frames,
            "height": report.plan.storyboard.height,
            "width": report.plan.storyboard.width,
            "cost": report.cost.to_plain(),
            "program_bytes": report.program_bytes,
            "needed_bytes": report.needed_bytes,
            "device": report.device.name,
            "free_bytes": report.device.free_bytes,
            "fits": report.fits,
            "settings": report.settings.to_plain(),
            "text_encoder": report.text_encoder,
            "modes": list(MODES),
            "has_codes": report.plan.geometry.has_codes,
            "advice": memory_advice(report),
        }
    return plain


def _describe_time(seconds: float) -> str:
    """A time for people: `40 s`, `12 min`, `3.1 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
