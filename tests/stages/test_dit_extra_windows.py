"""Training of the DiT on windows of several lengths."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from arlon.data.samples import WHOLE, MixedBatches, Shard
from stages.dit import build
from stages.flow_matching import shift_for
from tests.stages.conftest import StageConfigs

PICTURES = "{latent_frames: 1, overlap: 0, carry_prob: 0.0}"
EXTRA = f"extra_windows=[{{windows: {PICTURES}, share: 0.5, batch_size: 6, shift_scale: 2.0}}]"


class Numbered:
    """Batches that tell their set, number and rank."""

    def __init__(self, name: int) -> None:
        self.name = name

    def batch(self, number: int, shard: Shard = WHOLE) -> dict[str, torch.Tensor]:
        return {"from": torch.tensor([self.name, number, shard.rank])}


def test_sets_are_drawn_by_their_shares_and_the_number_of_the_batch_alone() -> None:
    mixed = MixedBatches([Numbered(0), Numbered(1), Numbered(2)], [0.5, 0.3, 0.2], seed=1)
    drawn = [mixed.batch(number)["from"].tolist() for number in range(2000)]
    assert [number for _, number, _ in drawn] == list(range(2000))
    counts = Counter(name for name, _, _ in drawn)
    assert [counts[name] / 2000 for name in range(3)] == pytest.approx([0.5, 0.3, 0.2], abs=0.04)
    for number in (1999, 3, 700):
        other = mixed.batch(number, Shard(rank=1, world=2))["from"].tolist()
        assert other == [*drawn[number][:2], 1], "all processes take their rows from the same set"


def test_shares_must_be_a_distribution() -> None:
    for shares in ([0.5, 0.4], [1.2, -0.2], [1.0]):
        with pytest.raises(ValueError, match="share"):
            MixedBatches([Numbered(0), Numbered(1)], shares, seed=0)


@pytest.mark.slow
def test_steps_come_from_both_lengths_each_with_its_own_batch_and_shift(stage_config: StageConfigs) -> None:
    config = stage_config("dit", EXTRA)
    parts = build(config)
    shapes = {tuple(parts.train.batch(number)["latent"].shape[::2][:2]) for number in range(16)}
    assert shapes == {(4, 15), (6, 1)}
    t = torch.tensor([0.5])
    for number in range(16):
        batch = parts.train.batch(number)
        pictures = batch["latent"].shape[2] == 1
        assert set(batch["fps"].tolist()) == ({120.0} if pictures else {8.0})
        flow = config.flows[batch["latent"].shape[2]]
        assert flow.shift_scale == (2.0 if pictures else config.flow.shift_scale)
        if pictures:
            torch.testing.assert_close(shift_for(flow, batch)(t), torch.tensor([2 / 3]))
    loss = parts.stage.validate(parts.val)
    assert loss["loss"] > 0


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("extra_windows=[{share: 0.5}]", "different lengths"),
        ("extra_windows=[{windows: {latent_frames: 10}, share: 1.0}]", "share"),
        (
            "extra_windows=[{windows: {latent_frames: 10}, share: 0.6}, {windows: {latent_frames: 6}, share: 0.6}]",
            "below 1",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(stage_config: StageConfigs, override: str, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        stage_config("dit", override)
