"""How often the oracle is right on rendered truth, clean and degraded.

    python benchmarks/oracle_validation.py --clips 400

Prints one table of accuracies per attribute and degradation, then what is confused with what and by which
truth. The degradations stand for what a small VAE and a codec do: Gaussian blur, noise, both, half resolution
and back, and ringing (an unsharp mask after a blur). `dull, blur 2 px + noise` is harder than that on
purpose, to see what goes first.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable

import numpy as np
from scipy import ndimage

from arlon.data import shapes_world as world
from arlon.evaluation import oracle

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


DEGRADATIONS: dict[str, Degradation] = {
    "clean": lambda frames, rng: frames,
    "blur 1 px": lambda frames, rng: blur(frames, 1.0),
    "noise 0.04": lambda frames, rng: noise(frames, 0.04, rng),
    "blur 1 px + noise 0.05": lambda frames, rng: noise(blur(frames, 1.0), 0.05, rng),
    "half size + noise 0.03": lambda frames, rng: noise(half_and_back(frames), 0.03, rng),
    "dull, blur 2 px + noise": lambda frames, rng: noise(0.85 * blur(frames, 2.0) + 16, 0.05, rng),
    "ringing + noise 0.03": lambda frames, rng: noise(ringing(frames), 0.03, rng),
}


def degrade(name: str, frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Apply a degradation to frames (F, pH, pW, 3) uint8 and round to uint8 again."""
    return np.clip(np.rint(DEGRADATIONS[name](frames.astype(np.float32), rng)), 0, 255).astype(np.uint8)


def sample_clip(rng: np.random.Generator, num_frames: int) -> tuple[world.Shot, np.ndarray]:
    """One single-shot scene, from training and held-out pairs alike, and its frames (F, 64, 64, 3)."""
    split = "train" if rng.random() < 0.5 else "held_out"
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


def validate(num_clips: int, num_frames: int, seed: int) -> tuple[dict[str, Tally], float]:
    """Tallies by degradation on the same clips, and seconds of CPU a reading took."""
    tallies = {name: Tally() for name in DEGRADATIONS}
    rng, spent = np.random.default_rng(seed), 0.0
    for _ in range(num_clips):
        shot, frames = sample_clip(rng, num_frames)
        for name, tally in tallies.items():
            pixels = degrade(name, frames, rng)
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
    args = parser.parse_args()
    tallies, seconds = validate(args.clips, args.frames, args.seed)
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
