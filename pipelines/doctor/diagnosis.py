"""What `arlon doctor` finds: whether a film fits this machine, in lines to print or plain values.

Nothing is downloaded, and no weights are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

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
from arlon.text.sources import can_be_had, describe_whence, is_at_hand
from pipelines.doctor.film_cost import cost_lines, gigabytes, operations, plan_cost
from pipelines.doctor.film_fit import Fit, memory_advice
from pipelines.doctor.machine import Device, Machine, devices

MODES = {
    "text": "a film from prompts",
    "image": "one that begins with a picture (image:)",
    "end_image": "one that ends on a picture (end_image:)",
    "video": "one that goes on from a video (video:)",
    "picture": "one frame as a PNG (--num-frames 1)",
}
"""What every model makes, as storyboards and options ask for it: given frames are held, no part is needed for that."""
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
    plan = plan_storyboard(film, make_geometry(configs, defaults))
    chosen = make_settings(plan.geometry, {"dtype": dtype, **(settings or {}), "device": device})
    wanted = f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device
    found = next((here for here in devices(timed=False) if here.name == wanted), None)
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
    return fit if fit.fits is not False else replace(fit, advice=tuple(memory_advice(fit, configs, defaults)))


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


def _span(seconds: float) -> str:
    """A time for people: `40 s`, `12 min`, `3.1 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
