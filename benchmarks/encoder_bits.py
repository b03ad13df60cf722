"""How often the same frames, encoded again, give other bytes, and what each choice of encoder options costs.

    python -m benchmarks.encoder_bits --threads 2 --seconds 300 --options "" asm=avx2 cpu-independent=1
    python -m benchmarks.encoder_bits --size 240x426 --fill --options "" cpu-independent=1

Several processes work at once (two by default), because slips are seen on a busy machine. Each of them decodes fixed
latents with the video VAE again and again and encodes the frames with every choice of `--options` in turn. Options are
those of x264, `NAME=VALUE` joined by colons; an empty string leaves all of them as x264 sets them. A hash of the frames
is counted beside that of the encoded bytes, so that a slip of the decoder is not taken for one of the encoder.

Prints, for the decoder and for every choice of options, "N of M differ": N results are not the most frequent result of
the same input, over all processes. Then the CPU time of an encoding, relative to that with the first options.

With `--fill`, glibc fills new memory with another byte in every process (`MALLOC_PERTURB_`). An encoder that reads
memory before it writes it then gives other bytes in other processes, always and without any load.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from arlon.data.video_io import encode_fragment
from arlon.files import hash_bytes, hash_tensor, write_json
from benchmarks.reconstruction import find_model

NUM_CLIPS = 6
NUM_FRAMES = 51
REPEATS = 8
"""Encodings with each choice of options after each decoding."""
DECODER = "decoder"
"""What stands for the decoder where others have their options."""
FPS, CRF = 8, 16


class Input(NamedTuple):
    """What was done to which clip."""

    options: str
    """Options of x264, or `DECODER`."""
    clip: int


class Counts(NamedTuple):
    """What one process saw."""

    results: dict[Input, Counter[str]]
    """How often each result came, by its hash."""
    seconds: dict[str, float]
    """CPU seconds of all encodings, by options."""


@torch.inference_mode()
def count_results(folder: Path, size: tuple[int, int], options: Sequence[str], seconds: float, threads: int) -> Counts:
    """Decode and encode the same clips again and again for a time, and count the results.

    Args:
        folder: Model folder with a `vae`.
        size: Height and width of the frames in pixels, rounded down to whole latents.
        options: Options of x264 to compare.
        seconds: When to stop; every clip is decoded once at least.
        threads: Threads of PyTorch.
    """
    from arlon.checkpoint import load_component
    from arlon.data.transforms import video_to_frames
    from arlon.models.video_vae import VideoVAE

    torch.set_num_threads(threads)
    vae = load_component(VideoVAE, folder / "vae").eval()
    shape = (1, *vae.latent_shape(NUM_FRAMES, *size))
    latents = [torch.randn(shape, generator=torch.Generator().manual_seed(clip)) for clip in range(NUM_CLIPS)]
    counts = Counts({}, dict.fromkeys(options, 0.0))
    stop_s, number = time.monotonic() + seconds, 0
    while number < NUM_CLIPS or time.monotonic() < stop_s:
        clip = number % NUM_CLIPS
        frames = video_to_frames(vae.decode(latents[clip], NUM_FRAMES)[0])
        counts.results.setdefault(Input(DECODER, clip), Counter())[hash_tensor(torch.from_numpy(frames))] += 1
        for _ in range(REPEATS):
            # In turn, so that the load of the machine is the same for all.
            for chosen in options:
                started_s = time.thread_time()
                data = encode_fragment(frames, fps=FPS, crf=CRF, x264_params=chosen).data
                counts.seconds[chosen] += time.thread_time() - started_s
                counts.results.setdefault(Input(chosen, clip), Counter())[hash_bytes(data)] += 1
        number += 1
    return counts


def merge(parts: Iterable[Counts]) -> Counts:
    """The counts of several processes together."""
    total = Counts({}, {})
    for part in parts:
        for key, results in part.results.items():
            total.results.setdefault(key, Counter()).update(results)
        for chosen, seconds in part.seconds.items():
            total.seconds[chosen] = total.seconds.get(chosen, 0.0) + seconds
    return total


def count_differing(results: Mapping[Input, Counter[str]], options: str) -> tuple[int, int]:
    """How many results are not the most frequent one of their input, and how many there are."""
    counters = [counter for key, counter in results.items() if key.options == options]
    total = sum(counter.total() for counter in counters)
    return total - sum(max(counter.values()) for counter in counters), total


def report(counts: Counts) -> list[str]:
    """A line for the decoder and one for each choice of options."""
    lines = ["{}: {} of {} differ".format(DECODER, *count_differing(counts.results, DECODER))]
    means = {o: seconds / count_differing(counts.results, o)[1] for o, seconds in counts.seconds.items()}
    first = next(iter(means.values()))
    for chosen, mean in means.items():
        differing, total = count_differing(counts.results, chosen)
        name = chosen or "x264's own choice"
        lines.append(
            f"{name}: {differing} of {total} differ, {1000 * mean:.1f} ms each, {mean / first:.3f} of the time"
        )
    return lines


def measure(
    folder: Path,
    size: tuple[int, int],
    options: Sequence[str],
    *,
    seconds: float,
    threads: int,
    processes: int,
    fill: bool,
) -> Counts:
    """The counts of several fresh processes that work at the same time.

    Args:
        folder: Model folder with a `vae`.
        size: Height and width of the frames in pixels, rounded down to whole latents.
        options: Options of x264 to compare.
        seconds: How long each process works.
        threads: Threads of PyTorch in each process.
        processes: Number of processes.
        fill: Fill new memory with another byte in each process.
    """
    context = multiprocessing.get_context("spawn")
    pools, futures = [], list[Future[Counts]]()
    before = os.environ.get("MALLOC_PERTURB_")
    try:
        for number in range(processes):
            if fill:  # read by glibc when a process starts
                os.environ["MALLOC_PERTURB_"] = str(1 + 89 * number % 255)
            pools.append(ProcessPoolExecutor(1, mp_context=context))
            futures.append(pools[-1].submit(count_results, folder, size, options, seconds, threads))
        return merge(future.result() for future in futures)
    finally:
        os.environ.pop("MALLOC_PERTURB_", None)
        if before is not None:
            os.environ["MALLOC_PERTURB_"] = before
        for pool in pools:
            pool.shutdown(cancel_futures=True)


def parse_size(text: str) -> tuple[int, int]:
    """Height and width in pixels of `240x426`."""
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; expected HEIGHTxWIDTH, such as 64x64")
    return int(parts[0]), int(parts[1])


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--options", nargs="+", default=["", "cpu-independent=1"], help="of x264, to compare")
    parser.add_argument("--size", type=parse_size, default=(64, 64), metavar="HxW", help="of the frames, pixels")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch in each process")
    parser.add_argument("--seconds", type=float, default=300.0, help="how long each process works")
    parser.add_argument("--processes", type=int, default=2, help="that work at the same time")
    parser.add_argument("--fill", action="store_true", help="fill new memory with another byte in each process")
    parser.add_argument("--model", default="shapes", help="name or folder of the model whose VAE decodes")
    parser.add_argument("--json", type=Path, metavar="OUT.json", help="write the counts")
    args = parser.parse_args(argv)
    for name in ("threads", "processes"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be 1 or more, got {getattr(args, name)}")
    try:
        counts = measure(
            find_model(args.model),
            args.size,
            list(dict.fromkeys(args.options)),
            seconds=args.seconds,
            threads=args.threads,
            processes=args.processes,
            fill=args.fill,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print("\n".join(report(counts)))
    if args.json:
        lines = [
            {"options": key.options, "clip": key.clip, "results": results} for key, results in counts.results.items()
        ]
        write_json(args.json, {"seconds": counts.seconds, "counts": lines})


if __name__ == "__main__":
    main()
