"""What this machine has: devices and their memory, packages, the video codec."""

from __future__ import annotations

import importlib.metadata
import platform
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from arlon.data.video_io import VideoWriter, probe
from arlon.text.encoders import TextEncoderConfig
from arlon.text.sources import describe_source, is_cached
from arlon.threads import available_cores
from arlon.version import version
from pipelines.doctor.film_cost import gigabytes

PACKAGES = ("torch", "av", "transformers", "diffusers", "safetensors", "huggingface_hub")
OPTIONAL = {
    "ray": "actors on several cores or machines: pip install 'arlon[ray]'",
    "lightning": "training: pip install 'arlon[train]'",
    "sentencepiece": "tokenizer of a released T5: pip install sentencepiece",
}
MATMUL_SIZE = 1024
MATMUL_S = 0.2
"""Seconds that one precision is timed."""
CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Files that tell the memory limit of a container and its use, in version 2 and 1 of cgroups."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """A processor or GPU that networks can run on."""

    name: str
    """Name as --device takes it."""
    kind: str
    """What it is, for people."""
    memory_bytes: int | None
    """Memory in all; None if the system does not tell."""
    free_bytes: int | None
    """Memory that is free now; None if the system does not tell."""
    flops_per_s: dict[str, float]
    """Floating-point operations a second in one large matrix product, by precision; empty if not measured."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A machine as `arlon doctor` finds it."""

    arlon: str
    python: str
    system: str
    packages: dict[str, str | None]
    """Versions by name; None if a package is not installed."""
    devices: tuple[Device, ...]
    video: str | None
    """Why no H.264 film can be written; None if one can."""
    has_minilm: bool
    """Whether the text encoder of the small model is on this machine."""
    minilm: str
    """Where that text encoder comes from, in words that follow its name."""


def examine() -> Machine:
    """Examine this machine, which takes a second."""
    packages: dict[str, str | None] = dict.fromkeys((*PACKAGES, *OPTIONAL))
    for name in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    return Machine(
        arlon=version(),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        packages=packages,
        devices=tuple(devices()),
        video=video_problem(),
        has_minilm=is_cached(TextEncoderConfig()),
        minilm=describe_source(TextEncoderConfig()),
    )


def machine_lines(machine: Machine) -> list[tuple[str, str]]:
    """Lines to print about a machine, as pairs of name and text."""
    packages = ", ".join(f"{name} {machine.packages[name] or 'missing'}" for name in PACKAGES)
    lines = [("arlon", f"{machine.arlon}, Python {machine.python}, {machine.system}"), ("packages", packages)]
    for device in machine.devices:
        memory = "memory unknown"
        if device.memory_bytes is not None and device.free_bytes is not None:
            memory = f"{gigabytes(device.memory_bytes)} memory, {gigabytes(device.free_bytes)} free"
        rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {name}" for name, rate in device.flops_per_s.items())
        measured = f"; one matrix product: {rates}" if rates else ""
        lines.append(("device", f"{device.name}: {device.kind}, {memory}{measured}"))
    if len(machine.devices) == 1:
        lines.append(("", "no GPU that PyTorch can use: the small model runs well without, the full size does not"))
    lines.append(("video", machine.video or "H.264 is encoded and decoded"))
    lines.append(("text", f"the small model's encoder all-MiniLM-L6-v2 {machine.minilm}"))
    lines += [(name, machine.packages[name] or f"not installed; {what}") for name, what in OPTIONAL.items()]
    return lines


def video_problem() -> str | None:
    """Write a small film and read it back; why that fails, or None if it works."""
    frames = np.zeros((2, 16, 16, 3), dtype=np.uint8)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "film.mp4"
            with VideoWriter(path, fps=8) as writer:
                writer.append(frames)
            if probe(path).num_frames != len(frames):
                return "H.264 is encoded, but not all frames come back"
    except Exception as error:  # whatever fails in FFmpeg is what the user has to know
        return f"H.264 cannot be written: {error}"
    return None


def devices(*, timed: bool = True) -> list[Device]:
    """List the processor and the GPUs that PyTorch can use.

    Args:
        timed: Whether to measure their rates, which takes a second.
    """
    total, free = memory_limits()
    cpu = Device(
        name="cpu",
        kind=f"{available_cores()} cores",
        memory_bytes=total,
        free_bytes=free,
        flops_per_s=_matmul_rates("cpu") if timed else {},
    )
    return [cpu, *_accelerators(timed=timed)]


def _accelerators(*, timed: bool) -> list[Device]:
    """List the GPUs that PyTorch can use."""
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
    """Read the total and the free memory of this machine or container, in bytes; None if the system does not tell."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        total, free = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return None, None
    for limit_file, used_file in CGROUP_FILES:
        try:
            limit, used = (int(Path(file).read_text()) for file in (limit_file, used_file))
        except (OSError, ValueError):  # no such file, or "max": there is no limit
            continue
        total, free = min(total, limit), min(free, max(0, limit - used))
    return total, free


def _matmul_rates(device: str) -> dict[str, float]:
    """Measure the operations a second of a matrix product in float32 and bfloat16."""
    rates = {}
    for name in ("float32", "bfloat16"):
        a = torch.ones(MATMUL_SIZE, MATMUL_SIZE, device=device, dtype=getattr(torch, name))
        float((a @ a)[0, 0])  # warm up; `float` waits for a GPU to finish
        count, started_s = 0, time.perf_counter()
        while (elapsed_s := time.perf_counter() - started_s) < MATMUL_S:
            float((a @ a)[0, 0])
            count += 1
        rates[name] = count * 2 * MATMUL_SIZE**3 / elapsed_s
    return rates
