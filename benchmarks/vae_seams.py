"""Visibility of the borders between chunks of the video VAE, with and without blending.

    python -m benchmarks.vae_seams --takes 16 --blend-frames 0 1 2 4 --json figures.json
    python -m benchmarks.vae_seams --video clip.mp4 --height 128 --width 128

Clips are takes of shapes world without a switch of the prompt, or the first frames of the video files that are given.
They pass encoder and decoder, and are compared with themselves. Prints a Markdown table:

    seam            change of the picture across chunk borders over its change elsewhere; the clips' own value is 1, but
                    for chance, as nothing happens at the borders
    PSNR            of all frames, dB
    PSNR, borders   of the two frames on each side of every border: what blending costs
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from arlon.checkpoint import load_component
from arlon.data.datasets import ShapesTakes, ShapesTakesConfig
from arlon.data.transforms import resize_and_crop
from arlon.data.video_io import read_video
from arlon.evaluation import metrics
from arlon.models.video_vae import VideoVAE
from benchmarks.reconstruction import SEED, find_model
from benchmarks.vae_decode import parse_tile, table_row
from pipelines.store.run_folder import write_json

NEAR = 2
"""Frames on each side of a border that count as near it."""


@dataclass(frozen=True)
class Seams:
    """Figures of clips at one setting; PSNR in dB, infinite for the clips themselves."""

    seam: float
    psnr: float
    psnr_borders: float


def chunk_borders(num_frames: int, chunk: int) -> list[int]:
    """First frame of every chunk but the first."""
    return list(range(chunk, num_frames, chunk))


def measure_seams(made: Tensor, clips: Tensor, borders: Sequence[int]) -> Seams:
    """Figures of `made` (n, 3, pT, pH, pW), which should look like `clips`; both in [-1, 1]."""
    near = [at for border in borders for at in range(border - NEAR, border + NEAR) if at < clips.shape[2]]
    return Seams(
        seam=metrics.seam_strength(made, borders),
        psnr=metrics.psnr(made, clips),
        psnr_borders=metrics.psnr(made[:, :, near], clips[:, :, near]),
    )


@torch.inference_mode()
def measure(vae: VideoVAE, clips: Tensor, blends: Sequence[int], *, tile: int | None = None) -> dict[str, Seams]:
    """Figures of clips (n, 3, pT, pH, pW) for each number of blended frames, after those of the clips themselves.

    Raises:
        ValueError: If the clips are not longer than a chunk, or an option is out of range.
    """
    chunk, num_frames = vae.config.micro_frame_size, clips.shape[2]
    if chunk is None or num_frames <= chunk:
        raise ValueError(f"clips need more frames than one chunk of the VAE ({chunk}), got {num_frames}")
    borders = chunk_borders(num_frames, chunk)
    latents = [vae.encode(clip[None], tile=tile) for clip in clips]
    figures = {"clips": measure_seams(clips, clips, borders)}
    for blend in blends:
        made = torch.cat([vae.decode(z, num_frames, blend_frames=blend, tile=tile) for z in latents])
        figures[f"blend {blend}"] = measure_seams(made.clamp(-1, 1), clips, borders)
    return figures


def shapes_clips(num_takes: int, num_frames: int, height: int, width: int) -> Tensor:
    """Takes (n, 3, pT, pH, pW) in which nothing changes at a chunk border."""
    config = ShapesTakesConfig(
        num_takes=num_takes, num_frames=num_frames, height=height, width=width, switch_prob=0.0, seed=SEED
    )
    source = ShapesTakes(config)
    return torch.stack([source.take(index).video for index in range(num_takes)])


def file_clips(paths: Sequence[Path], num_frames: int, height: int, width: int) -> Tensor:
    """The first frames of video files, (n, 3, pT, pH, pW), scaled to cover the size and cut to it."""
    return torch.stack(
        [resize_and_crop(read_video(path, num_frames=num_frames), height=height, width=width) for path in paths]
    )


def table_lines(figures: dict[str, Seams]) -> list[str]:
    """Lines of a Markdown table."""
    head = ("", "seam", "PSNR", "PSNR, borders")
    rows = ([name, f"{v.seam:.3f}", f"{v.psnr:.2f}", f"{v.psnr_borders:.2f}"] for name, v in figures.items())
    return [table_row(head), table_row(["---"] * len(head)), *map(table_row, rows)]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes", help="name or folder of the model; only its VAE is needed")
    parser.add_argument("--takes", type=int, default=16, help="rendered takes, where no video is given")
    parser.add_argument("--video", type=Path, nargs="+", metavar="FILE", help="measure these instead")
    parser.add_argument("--frames", type=int, default=68, help="frames of a clip; of takes, a multiple of 17")
    parser.add_argument("--height", type=int, default=64, help="of the frames")
    parser.add_argument("--width", type=int, default=64, help="of the frames")
    parser.add_argument("--blend-frames", type=int, nargs="+", default=[0, 1, 2, 4], help="on each side of a border")
    parser.add_argument("--tile", type=parse_tile, help="side of the tiles, pixels, or none")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch")
    parser.add_argument("--json", type=Path, metavar="OUT.json", help="write the figures")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    size = (args.frames, args.height, args.width)
    try:
        vae = load_component(VideoVAE, find_model(args.model) / "vae").eval()
        clips = file_clips(args.video, *size) if args.video else shapes_clips(args.takes, *size)
        figures = measure(vae, clips, args.blend_frames, tile=args.tile)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    kind = "video files" if args.video else "takes of shapes world"
    print(f"{len(clips)} {kind}, {'x'.join(map(str, size))}, tile {args.tile or 'none'}, model {Path(args.model).name}")
    print("\n".join(table_lines(figures)))
    if args.json:
        values = {name: asdict(value) for name, value in figures.items() if name != "clips"}
        own = {"seam": figures["clips"].seam}
        write_json(args.json, {"model": Path(args.model).name, "tile": args.tile, "clips": own, "figures": values})


if __name__ == "__main__":
    main()
