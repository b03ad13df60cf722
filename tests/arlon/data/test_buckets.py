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
    tables = {stage: table_of(stage) for stage in NUMBERS}
    assert len(CHOICES) >= 120
    for row in CHOICES:
        slot = tables[row["stage"]].choose(ClipSize(row["T"], row["H"], row["W"]), row["seed"])
        found = None if slot is None else [slot.bucket.resolution, slot.bucket.num_frames, slot.ratio]
        assert found == row["bucket"], row


def test_clips_of_exactly_the_frames_of_a_bucket_enter_one_that_is_not_strict() -> None:
    """The original leaves out all of its clips of 51 frames."""
    exact = [row for row in CHOICES if row["T"] == 51]
    assert exact
    assert {row["bucket"] for row in exact if row["bucket"] is None} == {None}
    buckets = [Bucket(resolution="144p", num_frames=51, batch_size=1)]
    for row in exact:
        clip = ClipSize(51, row["H"], row["W"])
        assert BucketTable(buckets).choose(clip, row["seed"]) is None
        slot = BucketTable(buckets, strict=False).choose(clip, row["seed"])
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


CLIPS = [ClipSize(40, 32, 32)] * 5 + [ClipSize(20, 36, 36)] * 4 + [ClipSize(18, 16, 24)] * 7 + [ClipSize(1, 20, 20)] * 2


def take(plan: BucketPlan, count: int, world: int = 1) -> list[PlannedBatch]:
    return [plan.batch(number, world) for number in range(count)]


def test_batches_are_full_of_clips_that_fit_their_slot() -> None:
    table = simple_table()
    plan = BucketPlan(table, CLIPS, seed=3)
    for world in (1, 2):
        for slot, clips in take(plan, 40, world):
            assert len(clips) == slot.bucket.batch_size * world
            assert all(table.holds(slot.bucket, CLIPS[index]) for index in clips)


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
        ({"resolution": "481p"}, "unknown resolution '481p', did you mean '480p'"),
        ({"keep_prob": 1.5}, r"keep_prob must be in \[0, 1\], got 1.5"),
        ({"batch_size": None}, "batch_size must be at least 1 unless keep_prob is 0, got None"),
        ({"num_frames": 0}, "num_frames must be at least 1"),
    ],
)
def test_bad_buckets_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Bucket(**{"resolution": "480p", "num_frames": 51, "batch_size": 1} | settings)


def test_clips_that_fit_nowhere_are_refused_with_what_was_found() -> None:
    table = BucketTable([Bucket(resolution="480p", num_frames=51, batch_size=1)])
    clips = [ClipSize(*size) for size in ((40, 480, 854), (30, 480, 854), (90, 64, 96), (51, 480, 854), (1, 9, 9))]
    with pytest.raises(ValueError, match=r"5 clips.*480p_51") as e:
        BucketPlan(table, clips, seed=0)
    assert str(e.value).splitlines()[1:] == [
        "  2 too short: the longest has 40 frames, 480p_51 takes 52 and more; "
        "add a bucket of 480p of at most 39 frames, or give longer clips",
        "  1 too small: the largest has 64x96 pixels, 480p_51 takes 327936 pixels and more; "
        "add a bucket of resolution 64x96, or give larger clips",
        "  1 of exactly the frames of a bucket, such as 51: strict buckets take longer ones; "
        "set data.strict_buckets=false, or give longer clips",
        "  1 pictures: no bucket has num_frames 1; add one",
    ]
    with pytest.raises(ValueError, match="given twice: 480p_51"):
        BucketTable([Bucket(resolution="480p", num_frames=51, batch_size=1)] * 2)


@pytest.mark.parametrize("strict", [True, False])
def test_the_remedies_for_clips_that_fit_nowhere_let_them_in(strict: bool) -> None:
    remedies = [
        (ClipSize(40, 480, 854), {"resolution": "480p", "num_frames": 40 - strict}),
        (ClipSize(90, 64, 96), {"resolution": "64x96", "num_frames": 51}),
        (ClipSize(1, 480, 854), {"resolution": "480p", "num_frames": 1}),
    ]
    for clip, settings in remedies:
        table = BucketTable([Bucket(resolution="480p", num_frames=51, batch_size=1)], strict=strict)
        assert table.misfits([clip])[0] == 1
        assert BucketTable([*table.buckets, Bucket(batch_size=1, **settings)], strict=strict).misfits([clip]) == (0, [])


def test_clips_that_fit_nowhere_are_counted_where_others_do(caplog: pytest.LogCaptureFixture) -> None:
    pictures = BucketTable([Bucket(resolution="16x24", num_frames=1, batch_size=1)])
    BucketPlan(pictures, CLIPS, seed=0)
    assert "16 of 18 clips fit no bucket and are left out" in caplog.text
    assert "16 videos: all buckets that are used are for pictures" in caplog.text
    caplog.clear()
    BucketPlan(simple_table(), CLIPS, seed=0)
    assert not caplog.records
