"""Buckets of training clips: one resolution, one length and one aspect each, and the order of their batches.

A bucket takes clips that are large and long enough, each with a probability, so that a long clip is seen at several
sizes and lengths over the epochs. Batch k depends on (seed, k) and the set of clips only.

A clip must have more frames than its bucket, as in Open-Sora v1.2 (`Bucket`), where clips of exactly 51 frames do not
enter the buckets of 51. A table that is not strict takes them; all other choices are the same.

Ours differ from Open-Sora's (`VariableVideoBatchSampler`) in that
    - clips that do not fill a batch wait for the next epoch (there they are dropped), so that a small set trains too;
    - all processes take their rows from one bucket in each step, so that two processes with batches of b do what one
      does with 2 b.

Source: Open-Sora v1.2, training recipe.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from arlon.data.aspect import PIXEL_BUDGETS, SIZE_TABLES
from arlon.data.samples import sample_generator, sample_seed
from arlon.errors import did_you_mean

log = logging.getLogger(__name__)

SIZE_TOLERANCE = 0.8
"""A clip with this share of the pixels of a resolution is large enough for it."""


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Clips of one resolution and length; in use it is divided by aspect.

    Raises:
        ValueError: If the resolution is unknown, a probability is none, or a bucket that is used has no batch size.
    """

    resolution: str
    """A resolution with its sizes, such as 480p (see `arlon/data/aspect.py`), or one size HEIGHTxWIDTH in pixels."""
    num_frames: int
    """Video frames; 1 for pictures, which no other bucket takes."""
    keep_prob: float = 1.0
    """Probability that a clip which fits is used here; otherwise it is offered to smaller resolutions."""
    length_prob: float | None = None
    """Probability that a clip which is long enough takes this length, not a shorter one. None: always."""
    batch_size: int | None = None
    """Clips of a batch, in each process. Only a bucket of `keep_prob` 0 does without."""

    def __post_init__(self) -> None:
        problems = []
        if self.resolution not in PIXEL_BUDGETS and not _one_size(self.resolution):
            problems.append(
                f"unknown resolution {self.resolution!r}, {did_you_mean(self.resolution, PIXEL_BUDGETS)} (or give "
                "HEIGHTxWIDTH such as 256x384)"
            )
        if self.num_frames < 1:
            problems.append(f"num_frames must be at least 1, got {self.num_frames}")
        for name in ("keep_prob", "length_prob"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                problems.append(f"{name} must be in [0, 1], got {value}")
        if (self.batch_size or 0) < 1 and (self.keep_prob > 0 or self.batch_size is not None):
            problems.append(f"batch_size must be at least 1 unless keep_prob is 0, got {self.batch_size}")
        if problems:
            raise ValueError(f"bucket {self.name}: " + "; ".join(problems))

    @property
    def name(self) -> str:
        """Resolution and length: `480p_51`."""
        return f"{self.resolution}_{self.num_frames}"

    @cached_property
    def pixels(self) -> int:
        """Pixels of a frame, about."""
        size = _one_size(self.resolution)
        return size[0] * size[1] if size else PIXEL_BUDGETS[self.resolution]

    @cached_property
    def sizes(self) -> Mapping[str, tuple[int, int]]:
        """Frame sizes (height, width) in pixels, by the ratio of the two."""
        size = _one_size(self.resolution)
        return {f"{size[0] / size[1]:.2f}": size} if size else SIZE_TABLES[self.resolution]

    @property
    def is_used(self) -> bool:
        """Whether any clip can come here."""
        return self.keep_prob > 0 and self.length_prob != 0

    def is_covered_by(self, clip: ClipSize) -> bool:
        """Whether the frames of a clip are large enough."""
        return clip.height * clip.width >= SIZE_TOLERANCE * self.pixels


class ClipSize(NamedTuple):
    """Frames, at the rate that is trained on, and pixels of a clip."""

    num_frames: int
    height: int
    width: int


class Slot(NamedTuple):
    """A bucket and the ratio of its frames: everything in a slot has one shape."""

    bucket: Bucket
    ratio: str

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.bucket.sizes[self.ratio]


class BucketTable:
    """Buckets in the order in which a clip is offered to them: large before small, long before short.

    Raises:
        ValueError: If there is none, or one is given twice.
    """

    def __init__(self, buckets: Sequence[Bucket], *, strict: bool = True) -> None:
        """Order the buckets; `strict` ones take clips of more frames than theirs, others also those of as many."""
        if not buckets:
            raise ValueError("there are no buckets: give at least one")
        names = [bucket.name for bucket in buckets]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"buckets given twice: {', '.join(twice)}")
        self.buckets = offered_order(buckets)
        self.used = tuple(bucket for bucket in self.buckets if bucket.is_used)
        self.strict = strict

    def holds(self, bucket: Bucket, clip: ClipSize) -> bool:
        """Whether a clip is large and long enough for a bucket."""
        if 1 in (bucket.num_frames, clip.num_frames):
            return bucket.num_frames == clip.num_frames and bucket.is_covered_by(clip)
        return clip.num_frames >= self._least_frames(bucket) and bucket.is_covered_by(clip)

    def choose(self, clip: ClipSize, seed: int) -> Slot | None:
        """The slot of a clip, None if it is not used this time.

        Every bucket draws from a generator of its own, seeded by `seed` plus its number.
        """
        refused = None  # a resolution whose probability has turned the clip away
        for number, bucket in enumerate(self.buckets):
            if bucket.resolution == refused or not self.holds(bucket, clip):
                continue
            rng = np.random.default_rng(seed + number)
            if bucket.length_prob is not None and rng.random() > bucket.length_prob:
                continue
            if bucket.keep_prob >= 1 or rng.random() < bucket.keep_prob:
                return nearest_slot(bucket, clip)
            refused = bucket.resolution
        return None

    def misfits(self, clips: Iterable[ClipSize]) -> tuple[int, list[str]]:
        """Number of clips that fit no bucket, and a line for each reason: clips, limit, nearest remedy."""
        found: dict[str, Counter[ClipSize]] = {}
        for clip, count in Counter(clips).items():
            if not any(self.holds(bucket, clip) for bucket in self.used):
                found.setdefault(self._reason(clip), Counter())[clip] = count
        lines = [self._misfit_line(reason, counts) for reason, counts in found.items()]
        return sum(counts.total() for counts in found.values()), lines

    def _least_frames(self, bucket: Bucket) -> int:
        return bucket.num_frames + self.strict

    def _kin(self, clip: ClipSize) -> list[Bucket]:
        """The used buckets of pictures for a picture, of videos for a video."""
        return [bucket for bucket in self.used if (bucket.num_frames == 1) == (clip.num_frames == 1)]

    def _reason(self, clip: ClipSize) -> str:
        """Why a clip fits no bucket."""
        kin = self._kin(clip)
        if not kin:
            return "picture" if clip.num_frames == 1 else "video"
        lengths = [bucket.num_frames for bucket in kin if bucket.is_covered_by(clip)]
        if not lengths:
            return "small"
        return "exact" if clip.num_frames in lengths else "short"

    def _misfit_line(self, reason: str, counts: Counter[ClipSize]) -> str:
        count = counts.total()
        if reason == "picture":
            return f"{count} pictures: no bucket has num_frames 1; add one"
        if reason == "video":
            return f"{count} videos: all buckets that are used are for pictures; add one of more frames"
        if reason == "small":
            clip = max(counts, key=lambda c: c.height * c.width)
            bucket = min(self._kin(clip), key=lambda b: b.pixels)
            return (
                f"{count} too small: the largest has {clip.height}x{clip.width} pixels, {bucket.name} takes "
                f"{math.ceil(SIZE_TOLERANCE * bucket.pixels)} pixels and more; add a bucket of resolution "
                f"{clip.height}x{clip.width}, or give larger clips"
            )
        clip = max(counts, key=lambda c: c.num_frames)
        bucket = min((b for b in self._kin(clip) if b.is_covered_by(clip)), key=lambda b: b.num_frames)
        if reason == "exact":
            return (
                f"{count} of exactly the frames of a bucket, such as {clip.num_frames}: strict buckets take longer "
                "ones; set data.strict_buckets=false, or give longer clips"
            )
        longest = clip.num_frames - self.strict
        remedy = f"add a bucket of {bucket.resolution} of at most {longest} frames, or " if longest > 1 else ""
        return (
            f"{count} too short: the longest has {clip.num_frames} frames, {bucket.name} takes "
            f"{self._least_frames(bucket)} and more; {remedy}give longer clips"
        )


def offered_order(buckets: Sequence[Bucket]) -> tuple[Bucket, ...]:
    """Buckets by size, then by length, largest and longest first."""
    first_seen = {bucket.resolution: place for place, bucket in reversed([*enumerate(buckets)])}
    return tuple(sorted(buckets, key=lambda b: (-b.pixels, first_seen[b.resolution], -b.num_frames)))


def nearest_slot(bucket: Bucket, clip: ClipSize) -> Slot:
    """The slot of a bucket whose proportions are nearest to those of a clip."""
    ratio = clip.height / clip.width
    return Slot(bucket, min(bucket.sizes, key=lambda key: abs(float(key) - ratio)))


class PlannedBatch(NamedTuple):
    """Clips, by index, that are trained on in one step of all processes; all in one slot."""

    slot: Slot
    clips: tuple[int, ...]


class BucketPlan:
    """The batches of an endless training, addressed by their number.

    In each epoch every clip is put into the slot that the table chooses for it; the clips of each slot, in random
    order, follow those left over from the epochs before; full batches are then shuffled.
    """

    def __init__(self, table: BucketTable, clips: Sequence[ClipSize], seed: int) -> None:
        """Plan for `clips`.

        Raises:
            ValueError: If no clip can ever enter a bucket.
        """
        self._table, self._clips, self._seed = table, tuple(clips), seed
        unfit, lines = table.misfits(self._clips)
        if unfit == len(self._clips):
            names = ", ".join(bucket.name for bucket in table.used) or "none"
            raise ValueError(
                f"none of {unfit} clips fits a bucket, and those that are used are {names}:" + _listed(lines)
            )
        if unfit:
            log.warning("%d of %d clips fit no bucket and are left out:%s", unfit, len(self._clips), _listed(lines))
        self._walk: Iterator[PlannedBatch] = iter(())
        self._position, self._world = 0, 0

    def batch(self, number: int, world: int = 1) -> PlannedBatch:
        """Batch `number` of `world` processes: `world` times the clips of the bucket's batch.

        Going on from the batch before is quick; any other number walks through the epochs from the first.
        """
        if world != self._world or number < self._position:
            self._walk, self._position, self._world = self._batches(world), 0, world
        while True:
            batch = next(self._walk)
            self._position += 1
            if self._position > number:
                return batch

    def _batches(self, world: int) -> Iterator[PlannedBatch]:
        waiting: dict[Slot, list[int]] = {}
        epoch = 0
        while True:
            order = torch.randperm(len(self._clips), generator=self._generator("clips", epoch))
            for index in order.tolist():
                slot = self._table.choose(self._clips[index], self._clip_seed(epoch, index))
                if slot is not None:
                    waiting.setdefault(slot, []).append(index)
            full = list(_take_full(waiting, world))
            for place in torch.randperm(len(full), generator=self._generator("batches", epoch)).tolist():
                yield full[place]
            epoch += 1

    def _clip_seed(self, epoch: int, index: int) -> int:
        """Seed of a clip's draws. A hash, because seeds in a row would give one bucket the draws of its neighbour."""
        return sample_seed(self._seed, f"bucket epoch {epoch}", index)

    def _generator(self, role: str, epoch: int) -> torch.Generator:
        return sample_generator(self._seed, f"bucket {role}", epoch)


def _take_full(waiting: dict[Slot, list[int]], world: int) -> Iterator[PlannedBatch]:
    """Take whole batches out of the clips that wait; what remains stays."""
    for slot, clips in waiting.items():
        assert slot.bucket.batch_size is not None
        size = slot.bucket.batch_size * world
        whole = len(clips) // size * size
        for start in range(0, whole, size):
            yield PlannedBatch(slot, tuple(clips[start : start + size]))
        del clips[:whole]


def _listed(lines: Iterable[str]) -> str:
    return "".join(f"\n  {line}" for line in lines)


def _one_size(resolution: str) -> tuple[int, int] | None:
    """(height, width) of a resolution that is one size, such as 256x384."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", resolution)
    return (int(match[1]), int(match[2])) if match else None
