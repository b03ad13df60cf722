"""Working memory that `arlon.cost` computes, and what a process really takes: `python benchmarks/working_memory.py`.

Each case runs in a process of its own, after a small warm-up, on Linux. The difference is what the computation leaves
out: work space of convolutions and matrix products, and the fragments of the allocator.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from arlon import cost
from arlon.checkpoint import read_config, resolve_model
from arlon.models.stdit import STDiT3, STDiT3Config
from arlon.models.video_vae import VideoVAE

DIT = STDiT3Config(hidden_size=384, depth=2, num_heads=6, caption_channels=384, model_max_length=77)
CASES = {
    "dit 8x32x32": (8, 32, 32),
    "dit 16x32x32": (16, 32, 32),
    "vae 17x128x128": (17, 16, 16),
    "vae 51x256x256": (51, 32, 32),
}


def main() -> None:
    """Run all cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, help="Run one case in this process; used by the benchmark itself.")
    case = parser.parse_args().case
    if case is not None:
        print(json.dumps(run_case(case)))
        return
    print("| case | computed, MB | taken, MB | ratio |\n|---|---|---|---|")
    for name in CASES:
        command = [sys.executable, "-m", "benchmarks.working_memory", "--case", name]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
        found = json.loads(done.stdout)
        ratio = found["taken"] / found["computed"]
        print(f"| {name} | {found['computed'] / 1e6:.0f} | {found['taken'] / 1e6:.0f} | {ratio:.2f} |", flush=True)


def run_case(case: str) -> dict[str, int]:
    """Computed and taken working memory in bytes."""
    size = CASES[case]
    if case.startswith("dit"):
        computed = cost.dit_cost(DIT, size, text_length=77, batch=2)
        small, whole = dit_call((1, 2, 2)), dit_call(size)
    else:
        config = read_config(VideoVAE, resolve_model("shapes") / "vae")
        computed = cost.vae_decode_cost(config, size[0], size[1:])
        vae = VideoVAE(config).eval()
        small, whole = vae_call(vae, (17, 2, 2)), vae_call(vae, size)
    with torch.inference_mode():
        small()
        return {"computed": computed.working_bytes, "taken": taken_bytes(whole)}


def dit_call(size: tuple[int, int, int]) -> Callable[[], Any]:
    """A guided pass on latents of (T, H, W)."""
    dit = STDiT3(DIT).eval()
    inputs = {"latent": torch.randn(2, 4, *size), "t": torch.rand(2), "text": torch.randn(2, 77, 384)}
    masks = {"text_mask": torch.ones(2, 77).bool(), "frame_mask": torch.ones(2, size[0]).bool()}
    return lambda: dit(**inputs, **masks, fps=24.0, height=256.0, width=256.0)


def vae_call(vae: VideoVAE, size: tuple[int, int, int]) -> Callable[[], Any]:
    """Decoding of a video of `size[0]` frames from latents of size[1:] rows and columns."""
    latents = size[0] // 17 * vae.config.chunk_latents
    latent = torch.randn(1, vae.config.latent_channels, latents, *size[1:])
    return lambda: vae.decode(latent, size[0])


def taken_bytes(run: Callable[[], Any]) -> int:
    """By how much memory of this process rises above what it is, at most, during a call."""
    before = memory_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    kept = run()
    peak = memory_bytes("VmHWM")
    del kept
    return peak - before


def memory_bytes(field: str) -> int:
    """A field of /proc/PID/status."""
    lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
