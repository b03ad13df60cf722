"""Accuracy of the oracle on rendered scenes whose truth is known, clean and degraded.

    python benchmarks/oracle_validation.py --clips 400

Prints one table of accuracies per attribute and degradation, then what is confused with what and by which
truth. The degradations stand for what a small VAE and a codec do: Gaussian blur, noise, both, half resolution
and back, and ringing (an unsharp mask after a blur). `dull, blur 2 px + noise` is harder than that on
purpose, to see what goes first. `bent` moves every pixel of every frame by a smooth random field, as a generating model
bends outlines. With `--vae FOLDER` the clips also go through a video VAE, which is the truth that films can reach.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from arlon.data.transforms import frames_to_video, video_to_frames
from arlon.models.video_vae import VideoVAE
from arlon.shapes import oracle, world

FPS = 8.0
Degradation = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def blur(frames: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of (F, pH, pW, 3) levels in the plane, edges repeated as a codec does."""
    return ndimage.gaussian_filter(frames, (0, sigma, sigma, 0), mode="nearest")


def noise(frames: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Add independent noise; `sigma` in units of the full range."""
    return frames + rng.normal(0, 255 * sigma, frames.shape).astype(np.float32)


def half_and_back(frames: np.ndarray) -> np.ndarray:
    """Mean of 2 x 2 pixels, brought back by linear interpolation."""
    small = (frames[:, ::2, ::2] + frames[:, 1::2, ::2] + frames[:, ::2, 1::2] + frames[:, 1::2, 1::2]) / 4
    return ndimage.zoom(small, (1, 2, 2, 1), order=1, mode="nearest", grid_mode=True)


def ringing(frames: np.ndarray) -> np.ndarray:
    """Overshoot at edges: a blurred picture, over-sharpened by a wider blur."""
    soft = blur(frames, 1.0)
    return soft + 0.8 * (soft - blur(soft, 1.5))


def bent(frames: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Move pixels by a random field of `sigma` pixels, smooth over 5 pixels and 3 frames; the frame is a torus."""
    num_frames, height, width, _ = frames.shape
    field = ndimage.gaussian_filter(rng.normal(size=(2, num_frames, height, width)), (0, 3, 5, 5), mode="wrap")
    field *= sigma / field.std()
    frame, y, x = np.mgrid[:num_frames, :height, :width]
    where = (frame, y + field[0], x + field[1])
    channels = [ndimage.map_coordinates(frames[..., c], where, order=1, mode="grid-wrap") for c in range(3)]
    return np.stack(channels, axis=-1)


DEGRADATIONS: dict[str, Degradation] = {
    "clean": lambda frames, rng: frames,
    "blur 1 px": lambda frames, rng: blur(frames, 1.0),
    "noise 0.04": lambda frames, rng: noise(frames, 0.04, rng),
    "blur 1 px + noise 0.05": lambda frames, rng: noise(blur(frames, 1.0), 0.05, rng),
    "half size + noise 0.03": lambda frames, rng: noise(half_and_back(frames), 0.03, rng),
    "dull, blur 2 px + noise": lambda frames, rng: noise(0.85 * blur(frames, 2.0) + 16, 0.05, rng),
    "ringing + noise 0.03": lambda frames, rng: noise(ringing(frames), 0.03, rng),
    "bent 1 px": lambda frames, rng: bent(frames, 1.0, rng),
    "bent 1.7 px": lambda frames, rng: bent(frames, 1.7, rng),
}


def degrade(name: str, frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Apply a degradation to frames (F, pH, pW, 3) uint8 and round to uint8 again."""
    return np.clip(np.rint(DEGRADATIONS[name](frames.astype(np.float32), rng)), 0, 255).astype(np.uint8)


def sample_clip(rng: np.random.Generator, num_frames: int) -> tuple[world.Shot, np.ndarray]:
    """One single-shot scene, from training and held-out pairs alike, and its frames (F, 64, 64, 3)."""
    split: world.Split = "train" if rng.random() < 0.5 else "held_out"
    scene = world.sample_scene(rng, seconds=[num_frames / FPS], split=split)
    return scene.shots[0], world.render_scene(scene, fps=FPS, num_frames=num_frames).frames


class Tally:
    """Counts of right readings per attribute, and of confusions."""

    def __init__(self) -> None:
        self.right: Counter[str] = Counter()
        self.total: Counter[str] = Counter()
        self.by_value: Counter[tuple[str, str]] = Counter()
        self.wrong_by_value: Counter[tuple[str, str]] = Counter()
        self.failed: Counter[tuple[str, str]] = Counter()

    def add(self, shot: world.Shot, reading: oracle.Reading) -> None:
        """Count one clip."""
        score = oracle.score_clip(reading, shot)
        self._count("background", score.background)
        self._count("count", score.count)
        crowd = "two objects" if len(shot.objects) == 2 else "one object"
        for look, result in zip(shot.objects, score.objects, strict=True):
            for name in oracle.ATTRIBUTES:
                right = getattr(result, name)
                if right is None:
                    continue
                self._count(name, right)
                self.by_value[name, getattr(look, name)] += 1
                if not right:
                    self.wrong_by_value[name, getattr(look, name)] += 1
                    self.failed[name, self._read_as(look, name, reading) + f" ({crowd}, {look.motion})"] += 1

    def _count(self, name: str, right: bool) -> None:
        self.right[name] += right
        self.total[name] += 1

    @staticmethod
    def _read_as(look: world.ObjectLook, name: str, reading: oracle.Reading) -> str:
        seen = next((o for o in reading.objects if o.colour == look.colour), None)
        return f"{getattr(look, name)} -> {getattr(seen, name) if seen else 'no object of its colour'}"

    def accuracy(self, name: str) -> float:
        """Share of right readings of an attribute, in percent."""
        return 100 * self.right[name] / max(1, self.total[name])


@torch.inference_mode()
def through_vae(vae: VideoVAE, frames: np.ndarray) -> np.ndarray:
    """Frames (F, pH, pW, 3) uint8 encoded and decoded again."""
    video = vae.decode(vae.encode(frames_to_video(frames)[None]), num_frames=len(frames))
    return video_to_frames(video[0])


def validate(
    num_clips: int,
    num_frames: int,
    seed: int,
    *,
    names: Sequence[str] = tuple(DEGRADATIONS),
    vae: VideoVAE | None = None,
) -> tuple[dict[str, Tally], float]:
    """Tallies by degradation on the same clips, and seconds of CPU a reading took. Clip i depends on (seed, i) only."""
    tallies = {name: Tally() for name in (*names, *(["VAE"] if vae else []))}
    spent = 0.0
    for index in range(num_clips):
        rng = np.random.default_rng([seed, index])
        shot, frames = sample_clip(rng, num_frames)
        for name, tally in tallies.items():
            pixels = through_vae(vae, frames) if vae and name == "VAE" else degrade(name, frames, rng)
            began = time.process_time()
            reading = oracle.read_clip(pixels, fps=FPS)
            spent += time.process_time() - began
            tally.add(shot, reading)
    return tallies, spent / (num_clips * len(tallies))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=400, help="rendered clips, each read under every degradation")
    parser.add_argument("--frames", type=int, default=51, help="frames a clip")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--degradations", nargs="+", choices=DEGRADATIONS, default=list(DEGRADATIONS), metavar="NAME")
    parser.add_argument("--vae", type=Path, metavar="FOLDER", help="also read clips that went through this video VAE")
    args = parser.parse_args()
    vae = VideoVAE.from_pretrained(args.vae) if args.vae else None
    tallies, seconds = validate(args.clips, args.frames, args.seed, names=args.degradations, vae=vae)
    names = ("background", "count", *oracle.ATTRIBUTES)
    print(
        f"accuracy in %, {args.clips} clips of {args.frames} frames, seed {args.seed}; {1000 * seconds:.0f} ms a clip"
    )
    print(f"{'':24}" + "".join(f"{name:>11}" for name in names))
    for title, tally in tallies.items():
        print(f"{title:24}" + "".join(f"{tally.accuracy(name):11.2f}" for name in names))
    for title, tally in tallies.items():
        print(f"\n{title}: where it fails")
        for (name, value), wrong in sorted(tally.wrong_by_value.items()):
            print(f"  {name} {value}: {wrong} of {tally.by_value[name, value]} wrong")
        for (name, text), count in tally.failed.most_common(12):
            print(f"    {count} x {name}: {text}")


if __name__ == "__main__":
    main()
