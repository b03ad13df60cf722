"""Seconds and memory that decoding takes, over chunk, micro batch and tile sizes.

    python -m benchmarks.vae_decode --size 17x128x128 --size 51x256x256 --tile none 128 --micro-batch 4 1

Without `--model`, the VAE has the size of Open-Sora v1.2's (393 M parameters) and random weights: figures depend on
neither weights nor latents. Every row is measured in a process of its own; memory is the highest resident size of that
process (Linux: VmHWM), the weights and the libraries among it. Frames are dropped as they are decoded, as those of a
film on its way to disk are; `--whole` keeps them, as `VideoVAE.decode` does. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import re
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from arlon.checkpoint import load_component
from arlon.memory import keep_freed_memory
from arlon.models.video_vae import VideoVAE, VideoVAEConfig
from pipelines.store.run_folder import write_json

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row: what is decoded, and how."""

    num_frames: int
    height: int
    width: int
    chunk: int
    """Frames of a temporal chunk."""
    micro_batch: int
    """Frames that pass the spatial part together."""
    tile: int | None = None
    """Side of the tiles, pixels; None: whole frames."""
    blend_frames: int = 0
    whole: bool = False
    """Decode all at once instead of as a stream."""


@dataclass(frozen=True)
class Figures:
    """Time and memory of a row of the table."""

    seconds: float
    idle_mib: float
    """Resident memory before decoding: libraries and weights."""
    peak_mib: float
    """Highest resident memory."""


def cases(
    sizes: Sequence[tuple[int, int, int]],
    chunks: Sequence[int],
    micro_batches: Sequence[int],
    tiles: Sequence[int | None],
    *,
    blend_frames: int = 0,
    whole: bool = False,
) -> Iterator[Case]:
    """All combinations, sizes first; tiles that hold the whole frame once only, as no tiles."""
    for (frames, height, width), chunk, micro_batch in itertools.product(sizes, chunks, micro_batches):
        for tile in dict.fromkeys(None if side and max(height, width) <= side else side for side in tiles):
            yield Case(
                num_frames=frames,
                height=height,
                width=width,
                chunk=chunk,
                micro_batch=micro_batch,
                tile=tile,
                blend_frames=blend_frames,
                whole=whole,
            )


@torch.inference_mode()
def measure(case: Case, folder: Path | None, threads: int) -> Figures:
    """Decode noise once in this process, which should be fresh: its peak cannot be reset everywhere."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    overrides = {"micro_frame_size": case.chunk, "micro_batch_size": case.micro_batch}
    vae = VideoVAE(VideoVAEConfig(**overrides)) if folder is None else load_component(VideoVAE, folder, **overrides)
    vae.eval()
    latent = torch.randn(1, *vae.latent_shape(case.num_frames, case.height, case.width))
    idle = resident_mib("VmRSS")
    started_s = time.perf_counter()
    if case.whole:
        vae.decode(latent, case.num_frames, blend_frames=case.blend_frames, tile=case.tile)
    else:
        stream = vae.decode_stream([latent], case.num_frames, blend_frames=case.blend_frames, tile=case.tile)
        for _ in stream:
            pass
    return Figures(time.perf_counter() - started_s, idle, resident_mib("VmHWM"))


def resident_mib(field: str) -> float:
    """Resident memory of this process in MiB: VmRSS now, VmHWM at its highest.

    Raises:
        OSError: If the system does not tell.
    """
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {field}: memory can be measured on Linux only")
    return int(found[1]) * 1024 / MIB


def measure_apart(case: Case, folder: Path | None, threads: int) -> Figures:
    """`measure` in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, case, folder, threads).result()


COLUMNS = ("size", "chunk", "micro batch", "tile", "seconds", "seconds a frame", "peak MiB", "above idle MiB")


def table_row(cells: Sequence[str]) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def table_cells(case: Case, figures: Figures) -> list[str]:
    """One row, in the order of COLUMNS."""
    return [
        f"{case.num_frames}x{case.height}x{case.width}",
        str(case.chunk),
        str(case.micro_batch),
        str(case.tile or "none"),
        f"{figures.seconds:.1f}",
        f"{figures.seconds / case.num_frames:.2f}",
        f"{figures.peak_mib:.0f}",
        f"{figures.peak_mib - figures.idle_mib:.0f}",
    ]


def parse_size(text: str) -> tuple[int, int, int]:
    """`17x128x128` -> (frames, height, width)."""
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; expected FRAMESxHEIGHTxWIDTH, such as 17x128x128")
    return int(parts[0]), int(parts[1]), int(parts[2])


def parse_tile(text: str) -> int | None:
    """`none` or pixels."""
    if text == "none":
        return None
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no tile; expected pixels or none")
    return int(text)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure."""
    # Not at the top: every row is measured in a process that imports this file, and its memory counts.
    from benchmarks.reconstruction import find_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model whose VAE is measured; default: full size, random weights")
    parser.add_argument("--size", type=parse_size, action="append", metavar="FxHxW", help="default: 17x128x128")
    parser.add_argument("--chunk", type=int, nargs="+", default=[17], help="frames of a temporal chunk")
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[4], help="frames in the spatial part together")
    parser.add_argument("--tile", type=parse_tile, nargs="+", default=[None], help="side of the tiles, pixels, or none")
    parser.add_argument("--blend-frames", type=int, default=0, help="frames blended on each side of a chunk border")
    parser.add_argument("--whole", action="store_true", help="decode all at once instead of as a stream")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch")
    parser.add_argument("--json", type=Path, metavar="OUT.json", help="write the figures")
    args = parser.parse_args(argv)
    sizes = args.size or [(17, 128, 128)]
    options = {"blend_frames": args.blend_frames, "whole": args.whole}
    rows = []
    try:
        folder = None if args.model is None else find_model(args.model) / "vae"
        print(f"{args.threads} threads, PyTorch {torch.__version__}, VAE: {args.model or 'full size, random weights'}")
        print(table_row(COLUMNS), table_row(["---"] * len(COLUMNS)), sep="\n", flush=True)
        for case in cases(sizes, args.chunk, args.micro_batch, args.tile, **options):
            figures = measure_apart(case, folder, args.threads)
            rows.append({**asdict(case), **asdict(figures)})
            print(table_row(table_cells(case, figures)), flush=True)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if args.json:
        write_json(args.json, {"model": args.model, "threads": args.threads, "torch": torch.__version__, "rows": rows})


if __name__ == "__main__":
    main()
