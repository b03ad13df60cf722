"""Buckets: the original's choices, and batches that depend on their number only."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from arlon.data.buckets import Bucket, BucketPlan, BucketTable, ClipSize, PlannedBatch

GOLDEN = json.loads((Path(__file__).parents[2] / "data" / "buckets.json").read_text())
CHOICES = [row for row in GOLDEN["bucket_ids"] if "T" in row]
NUMBERS = {row["stage"]: row["ids"] for row in GOLDEN["bucket_ids"] if "ids" in row}


def table_of(stage: str) -> BucketTable:
    """The buckets of a released stage."""
    buckets = []
    for resolution, lengths in GOLDEN["bucket_config"][stage].items():
        for frames, (probability, batch_size) in lengths.items():
            keep, length = probability if isinstance(probability, list) else (probability, None)
            buckets.append(
                Bucket(
                    resolution=resolution,
                    num_frames=int(frames),
                    keep_prob=keep,
                    length_prob=length,
                    batch_size=batch_size,
                )
            )
    return BucketTable(buckets)


@pytest.mark.parametrize("stage", NUMBERS)
def test_buckets_are_numbered_as_in_the_original(stage: str) -> None:
    numbers = {(b.resolution, str(b.num_frames)): number for number, b in enumerate(table_of(stage).buckets)}
    assert numbers == {(r, t): n for r, lengths in NUMBERS[stage].items() for t, n in lengths.items()}


def test_every_choice_is_that_of_the_original() -> None:
    """There a clip must be longer than the bucket; ours may be as long: one frame less gives the same choice."""
    tables = {stage: table_of(stage) for stage in NUMBERS}
    assert len(CHOICES) >= 120
    for row in CHOICES:
        frames = row["T"] if row["T"] == 1 else row["T"] - 1
        slot = tables[row["stage"]].choose(ClipSize(frames, row["H"], row["W"]), row["seed"])
        found = None if slot is None else [slot.bucket.resolution, slot.bucket.num_frames, slot.ratio]
        assert found == row["bucket"], row


def test_a_clip_of_exactly_the_frames_of_a_bucket_enters_it() -> None:
    """The original leaves out all of its clips of 51 frames; ours gives them the bucket of 51."""
    exact = [row for row in CHOICES if row["T"] == 51]
    assert exact
    assert {row["bucket"] for row in exact if row["bucket"] is None} == {None}
    table = BucketTable([Bucket(resolution="144p", num_frames=51, batch_size=1)])
    for row in exact:
        slot = table.choose(ClipSize(51, row["H"], row["W"]), row["seed"])
        assert (slot is not None) == (row["H"] * row["W"] >= 0.8 * 36864)


def simple_table(*, batch_size: int = 3) -> BucketTable:
    return BucketTable(
        [
            Bucket(resolution="32x32", num_frames=34, keep_prob=0.5, batch_size=2),
            Bucket(resolution="32x32", num_frames=17, keep_prob=0.5, batch_size=2),
            Bucket(resolution="16x24", num_frames=17, batch_size=batch_size),
            Bucket(resolution="16x24", num_frames=1, batch_size=batch_size),
        ]
    )


CLIPS = [ClipSize(40, 32, 32)] * 5 + [ClipSize(20, 36, 36)] * 4 + [ClipSize(17, 16, 24)] * 7 + [ClipSize(1, 20, 20)] * 2


def take(plan: BucketPlan, count: int, world: int = 1) -> list[PlannedBatch]:
    return [plan.batch(number, world) for number in range(count)]


def test_batches_are_full_of_clips_that_fit_their_slot() -> None:
    plan = BucketPlan(simple_table(), CLIPS, seed=3)
    for world in (1, 2):
        for slot, clips in take(plan, 40, world):
            assert len(clips) == slot.bucket.batch_size * world
            assert all(slot.bucket.holds(CLIPS[index]) for index in clips)


def test_a_batch_depends_on_seed_and_number_only() -> None:
    whole = take(BucketPlan(simple_table(), CLIPS, seed=3), 60)
    late = BucketPlan(simple_table(), CLIPS, seed=3)
    assert [late.batch(number) for number in (41, 42, 5, 59, 0)] == [whole[n] for n in (41, 42, 5, 59, 0)]
    assert take(BucketPlan(simple_table(), CLIPS, seed=4), 60) != whole


def test_no_clip_is_lost_between_epochs() -> None:
    """Pictures come in twos and batches in threes: what an epoch leaves over opens the next one."""
    plan = BucketPlan(simple_table(), CLIPS, seed=0)
    batches = take(plan, 400)
    seen = Counter(index for _, clips in batches for index in clips)
    assert set(seen) == set(range(len(CLIPS)))
    small = [seen[index] for index in range(9, 18)]  # fit one bucket only, of probability 1: once an epoch
    assert max(small) - min(small) <= 2


def test_shares_follow_the_probabilities() -> None:
    plan = BucketPlan(simple_table(batch_size=1), CLIPS, seed=1)
    found = Counter()
    for slot, clips in take(plan, 3000):
        found.update(slot.bucket.name for index in clips if CLIPS[index].num_frames == 40)
    total = sum(found.values())
    # A long clip takes 34 frames with 0.5; refused there it goes on to the next resolution, not to 17 frames.
    assert found["32x32_34"] / total == pytest.approx(0.5, abs=0.04)
    assert found["16x24_17"] / total == pytest.approx(0.5, abs=0.04)
    assert found["32x32_17"] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resolution": "481p"}, "unknown resolution '481p', choose from 144p"),
        ({"keep_prob": 1.5}, r"keep_prob must be in \[0, 1\], got 1.5"),
        ({"batch_size": None}, "batch_size must be at least 1 where keep_prob is not 0, got None"),
        ({"num_frames": 0}, "num_frames must be at least 1"),
    ],
)
def test_bad_buckets_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Bucket(**{"resolution": "480p", "num_frames": 51, "batch_size": 1} | settings)


def test_clips_that_fit_nowhere_are_refused_with_what_was_found() -> None:
    table = BucketTable([Bucket(resolution="480p", num_frames=51, batch_size=1)])
    with pytest.raises(ValueError, match=r"none of 2 clips fits a bucket: the longest has 40 frames.*480p_51"):
        BucketPlan(table, [ClipSize(40, 480, 854), ClipSize(30, 64, 64)], seed=0)
    with pytest.raises(ValueError, match="given twice: 480p_51"):
        BucketTable([Bucket(resolution="480p", num_frames=51, batch_size=1)] * 2)
