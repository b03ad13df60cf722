"""Clips in buckets: what a sample shows is what the file holds, and nothing is encoded twice."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from arlon.data.bucketed_clips import BucketedClips, ClipLatents, FixedClips
from arlon.data.buckets import Bucket
from arlon.data.latent_cache import TextCache
from arlon.data.manifest import Clip
from arlon.data.samples import Shard
from arlon.data.video_io import VideoWriter

BUCKETS = (
    Bucket(resolution="16x24", num_frames=34, length_prob=0.5, batch_size=2),
    Bucket(resolution="16x24", num_frames=17, batch_size=4),
    Bucket(resolution="18x18", num_frames=1, batch_size=2),
)


def grey(frame: int) -> int:
    """Grey level of a frame of a test video."""
    return 30 + 5 * frame


class Encoder:
    """Keeps frames 0, 4, 8, 12, 16 of each chunk at a quarter of the size; counts its calls."""

    calls = 0

    def __call__(self, video: Tensor) -> Tensor:
        self.calls += 1
        kept = [f for f in range(video.shape[2]) if f % 17 % 4 == 0]
        return F.avg_pool3d(video[:, :, kept], (1, 4, 4))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Clip]:
    """Four videos of 40 frames, four of 17, and two pictures; the caption tells the number."""
    folder, found = tmp_path_factory.mktemp("clips"), []
    for number in range(8):
        frames = 40 if number < 4 else 17
        levels = np.array([grey(frame) for frame in range(frames)], np.uint8)
        path = folder / f"{number}.mp4"
        with VideoWriter(path, fps=24, crf=4, preset="ultrafast") as writer:
            writer.append(np.broadcast_to(levels[:, None, None, None], (frames, 20, 30, 3)).copy())
        found.append(Clip(path=path, text=f"clip {number}", num_frames=frames, height=20, width=30, fps=24.0))
    for number in (8, 9):
        path = folder / f"{number}.png"
        Image.fromarray(np.full((20, 20, 3), 20 * number, np.uint8)).save(path)
        found.append(Clip(path=path, text=f"clip {number}", num_frames=1, height=20, width=20, fps=25.0))
    return found


def encode_words(captions: list[str]) -> SimpleNamespace:
    """Features (B, 2, 1): the number in the caption, twice."""
    numbers = torch.tensor([[float(caption.split()[1])] * 2 for caption in captions])
    return SimpleNamespace(tokens=numbers[..., None], mask=torch.ones(len(captions), 2, dtype=torch.bool))


def make(
    clips: list[Clip], root: Path, *, encoder: Encoder | None = None, keep: bool = True, fps: float | None = None
) -> BucketedClips:
    texts = TextCache(root, "words", max_length=2)
    texts.add([clip.text for clip in clips], encode_words)
    return BucketedClips(
        clips,
        BUCKETS,
        latents=ClipLatents(encoder or Encoder(), encoder_key="e", root=root if keep else None),
        texts=texts,
        seed=5,
        size_multiple=4,
        strict=False,
        fps=fps,
        mask_sampler=lambda frames, generator: torch.rand(frames, generator=generator) < 0.5,
    )


def test_samples_show_their_clip_at_the_size_and_length_of_their_bucket(clips: list[Clip], tmp_path: Path) -> None:
    data = make(clips, tmp_path)
    shapes, starts = {0: (3, 10, 4, 6), 1: (3, 5, 4, 6), 2: (3, 1, 4, 4)}, set()
    for number in range(40):
        batch = data.batch(number)
        place = int(batch["bucket"][0])
        bucket = data.table.buckets[place]
        assert bucket == BUCKETS[{"18x18": 2, "16x24": 0}[bucket.resolution] + (bucket.num_frames == 17)]
        for row in range(bucket.batch_size):
            index = int(batch["text"][row, 0, 0])
            latent = batch["latent"][row]
            assert latent.shape == shapes[BUCKETS.index(bucket)]
            level = (latent.mean(dim=(0, 2, 3)) + 1) * 127.5
            if bucket.num_frames == 1:
                assert index >= 8
                assert float(level) == pytest.approx(20 * index, abs=1.5)
                assert (float(batch["fps"][row]), float(batch["height"][row])) == (120.0, 16.0)
                continue
            start = round((float(level[0]) - 30) / 5)
            kept = [start + f for f in range(bucket.num_frames) if f % 17 % 4 == 0]
            torch.testing.assert_close(level, torch.tensor([float(grey(f)) for f in kept]), rtol=0, atol=2.4)
            assert (float(batch["fps"][row]), float(batch["width"][row])) == (24.0, 24.0)
            starts.add((bucket.num_frames, start))
    assert starts == {(34, 0), (17, 0), (17, 17)}, "pieces lie side by side"


def test_a_piece_is_encoded_once_and_the_same_again(clips: list[Clip], tmp_path: Path) -> None:
    encoder = Encoder()
    first = [make(clips, tmp_path, encoder=encoder).batch(number) for number in range(30)]
    pieces = encoder.calls
    assert pieces <= 4 * 3 + 4 + 2, "at most the pieces there are"
    again = [make(clips, tmp_path, encoder=encoder).batch(number) for number in range(30)]
    assert encoder.calls == pieces
    fresh = make(clips, tmp_path / "fresh", encoder=encoder, keep=False)
    for number in range(30):
        assert all(torch.equal(first[number][name], again[number][name]) for name in first[number])
    encoder.calls = 0
    assert torch.equal(fresh.batch(7)["latent"], first[7]["latent"])
    assert torch.equal(fresh.batch(7)["latent"], first[7]["latent"])
    assert encoder.calls == 2 * len(first[7]["latent"])


def test_processes_share_the_rows_of_one_batch(clips: list[Clip], tmp_path: Path) -> None:
    data, other = make(clips, tmp_path), make(clips, tmp_path)
    for number in range(10):
        parts = [source.batch(number, Shard(rank, 2)) for rank, source in enumerate((data, other))]
        bucket = data.table.buckets[int(parts[0]["bucket"][0])]
        assert [len(part["latent"]) for part in parts] == [bucket.batch_size] * 2
        assert torch.equal(parts[0]["bucket"], parts[1]["bucket"])
        assert not torch.equal(parts[0]["frame_mask"], parts[1]["frame_mask"]) or bucket.num_frames == 1


def test_clips_are_brought_to_a_common_rate(clips: list[Clip], tmp_path: Path) -> None:
    """40 frames at 24 a second are 20 at 12, one piece of 17; 17 frames are 8, too short for any bucket."""
    data = make(clips, tmp_path, fps=12.0)
    seen = set()
    for number in range(20):
        batch = data.batch(number)
        seen |= {int(index) for index in batch["text"][:, 0, 0]}
        if batch["latent"].shape[2] > 1:
            assert batch["fps"].tolist() == [12.0] * 4
            level = (batch["latent"][0].mean(dim=(0, 2, 3)) + 1) * 127.5
            expected = torch.tensor([float(grey(2 * f)) for f in (0, 4, 8, 12, 16)])
            torch.testing.assert_close(level, expected, rtol=0, atol=2.4)
    assert seen == {0, 1, 2, 3, 8, 9}


def test_validation_shows_every_bucket_alike_each_time(clips: list[Clip], tmp_path: Path) -> None:
    batches = FixedClips(make(clips, tmp_path), 2)
    first, second = list(batches), list(batches)
    assert [int(batch["bucket"][0]) for batch in first] == [0, 0, 1, 1, 2]
    assert [len(batch["latent"]) for batch in first] == [2, 2, 4, 4, 2]
    for ours, again in zip(first, second, strict=True):
        assert all(torch.equal(ours[name], again[name]) for name in ours)
