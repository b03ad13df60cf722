"""Caches are built once, go on after an interruption, and never serve what belongs to other inputs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from arlon.data import samples as windows
from arlon.data.datasets import CaptionSpan, ShapesTakes, ShapesTakesConfig, Take
from arlon.data.latent_cache import TextCache, build_code_cache, build_latent_cache
from arlon.data.samples import (
    BatchStream,
    CodeWindows,
    FixedBatches,
    LatentWindows,
    Shard,
    VideoWindows,
    WindowConfig,
)


class NumberedTakes:
    """Take i is a video whose every frame f has the value i / 100 + f / 1000; counts what is asked for."""

    def __init__(self, num_takes: int, spans: tuple[CaptionSpan, ...], *, num_frames: int = 85) -> None:
        self.num_takes, self.spans, self.num_frames = num_takes, spans, num_frames
        self.asked: list[int] = []

    identity = {"kind": "numbered"}  # noqa: RUF012

    def __len__(self) -> int:
        return self.num_takes

    def take(self, index: int) -> Take:
        self.asked.append(index)
        frames = index / 100 + torch.arange(self.num_frames) / 1000
        return Take(video=frames.view(1, -1, 1, 1).expand(3, -1, 4, 6), spans=self.spans, fps=8.0)


def encode(video: Tensor) -> Tensor:
    """A VAE that keeps the frames 0, 4, 8, 12, 16 of each chunk: (B, 3, pT, 4, 6) -> (B, 3, T, 2, 3)."""
    kept = [17 * chunk + frame for chunk in range(video.shape[2] // 17) for frame in (0, 4, 8, 12, 16)]
    return F.avg_pool3d(video[:, :, kept], (1, 2, 2))


def spans(*starts: int) -> tuple[CaptionSpan, ...]:
    return tuple(CaptionSpan(start_frame=s, captions=(f"from {s}", f"since {s}")) for s in starts)


def encode_words(captions: list[str]) -> SimpleNamespace:
    """Features (B, 5, 2): word number and length of each word."""
    tokens, mask = torch.zeros(len(captions), 5, 2), torch.zeros(len(captions), 5, dtype=torch.bool)
    for row, caption in enumerate(captions):
        for place, word in enumerate(caption.split()):
            tokens[row, place] = torch.tensor([float(place), float(len(word))])
            mask[row, place] = True
    return SimpleNamespace(tokens=tokens, mask=mask)


def texts_for(cache: object, root: Path) -> TextCache:
    texts = TextCache(root, "words", max_length=5)
    texts.add(cache.all_captions(), encode_words)
    return texts


def test_cached_latents_are_what_the_encoder_made(tmp_path: Path) -> None:
    source = NumberedTakes(5, spans(0, 34))
    cache = build_latent_cache(source, encode, root=tmp_path, encoder_key="a", shard_size=2, batch_size=2)
    assert (len(cache), cache.latent_shape) == (5, (3, 25, 2, 3))
    for index in range(5):
        expected = encode(source.take(index).video[None])[0]
        torch.testing.assert_close(cache.latent(index), expected.half().float(), rtol=0, atol=0)
        assert cache.spans(index) == source.spans
        assert cache.fps(index) == 8.0
    torch.testing.assert_close(cache.latent(3, slice(5, 8)), cache.latent(3)[:, 5:8], rtol=0, atol=0)
    assert cache.all_captions() == ["from 0", "since 0", "from 34", "since 34"]


def test_interrupted_build_goes_on_at_the_first_unfinished_shard(tmp_path: Path) -> None:
    calls = 0

    def failing(video: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return encode(video)

    source = NumberedTakes(7, spans(0))
    with pytest.raises(KeyboardInterrupt):
        build_latent_cache(source, failing, root=tmp_path, encoder_key="a", shard_size=2, batch_size=1)
    assert not list(tmp_path.rglob("*.tmp"))
    again = NumberedTakes(7, spans(0))
    build_latent_cache(again, encode, root=tmp_path, encoder_key="a", shard_size=2, batch_size=1)
    assert again.asked == [2, 3, 4, 5, 6]
    third = NumberedTakes(7, spans(0))
    build_latent_cache(third, encode, root=tmp_path, encoder_key="a", shard_size=2)
    assert third.asked == []


def test_array_without_its_record_is_made_again(tmp_path: Path) -> None:
    cache = build_latent_cache(NumberedTakes(4, spans(0)), encode, root=tmp_path, encoder_key="a", shard_size=2)
    folder = tmp_path / "latents" / cache.key
    np.save(folder / "00001.npy", np.zeros(3))
    (folder / "00001.json").unlink()
    again = NumberedTakes(4, spans(0))
    repaired = build_latent_cache(again, encode, root=tmp_path, encoder_key="a", shard_size=2)
    assert again.asked == [2, 3]
    torch.testing.assert_close(repaired.latent(3), cache.latent(3), rtol=0, atol=0)


def test_grown_set_keeps_its_finished_shards(tmp_path: Path) -> None:
    build_latent_cache(NumberedTakes(3, spans(0)), encode, root=tmp_path, encoder_key="a", shard_size=2)
    source = NumberedTakes(6, spans(0))
    cache = build_latent_cache(source, encode, root=tmp_path, encoder_key="a", shard_size=2)
    assert source.asked == [2, 3, 4, 5]
    assert len(cache) == 6


@pytest.mark.parametrize("change", ["encoder", "source"])
def test_other_inputs_are_other_caches(change: str, tmp_path: Path) -> None:
    first = build_latent_cache(NumberedTakes(2, spans(0)), encode, root=tmp_path, encoder_key="a")
    source = NumberedTakes(2, spans(0))
    if change == "source":
        source.identity = {"kind": "numbered", "seed": 1}
    key = "b" if change == "encoder" else "a"
    second = build_latent_cache(source, lambda v: encode(v) + 1, root=tmp_path, encoder_key=key)
    assert source.asked == [0, 1]
    assert float((second.latent(0) - first.latent(0)).mean()) == pytest.approx(1, abs=1e-2)


def test_broken_latents_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not finite in float16, takes 0\.\.1"):
        build_latent_cache(NumberedTakes(2, spans(0)), lambda v: encode(v) / 0, root=tmp_path, encoder_key="a")
    with pytest.raises(ValueError, match=r"num_takes must be in 1\.\.2"):
        build_latent_cache(NumberedTakes(2, spans(0)), encode, root=tmp_path, encoder_key="a", num_takes=3)


def test_text_features_come_back_and_are_encoded_once(tmp_path: Path) -> None:
    asked: list[str] = []

    def counting(captions: list[str]) -> SimpleNamespace:
        asked.extend(captions)
        return encode_words(captions)

    captions = ["a red square", "rises", "a red square", "two words"]
    TextCache(tmp_path, "words", max_length=5).add(captions[:2], counting, shard_size=1)
    texts = TextCache(tmp_path, "words", max_length=5)
    texts.add(captions, counting, shard_size=2, batch_size=1)
    assert asked == ["a red square", "rises", "two words"]
    for caption in captions:
        expected = encode_words([caption])
        tokens, mask = texts.features(caption)
        torch.testing.assert_close(tokens, expected.tokens[0])
        assert torch.equal(mask, expected.mask[0])
    with pytest.raises(KeyError, match="is not in the text cache"):
        texts.features("never seen")


def test_codes_come_back(tmp_path: Path) -> None:
    cache = build_latent_cache(NumberedTakes(3, spans(0)), encode, root=tmp_path, encoder_key="a")

    def quantise(latent: Tensor) -> Tensor:
        return (latent[:, 0] * 1000).round().long()

    codes = build_code_cache(cache, quantise, root=tmp_path, encoder_key="v", shard_size=2)
    for index in range(3):
        assert torch.equal(codes.codes(index), quantise(cache.latent(index)[None])[0])
    with pytest.raises(ValueError, match="below 32768"):
        build_code_cache(cache, lambda z: z[:, 0].long() + 40000, root=tmp_path, encoder_key="w")


def test_windows_go_over_a_switch_only_in_the_carried_frames(tmp_path: Path) -> None:
    """Against a reading frame by frame: new frames have one caption, a switch forces clean ones."""
    source = NumberedTakes(3, spans(0, 34))
    cache = build_latent_cache(source, encode, root=tmp_path, encoder_key="a")
    texts = texts_for(cache, tmp_path)
    samples = LatentWindows(cache, config=WindowConfig(carry_prob=0.3), seed=0, size=(4, 6), texts=texts)
    seen = set()
    for number in range(60):
        sample = samples.sample(number)
        start = int(sample["start"])
        caption_of = [0 if 17 * (f // 5) < 34 else 34 for f in range(start, start + 15)]
        assert len(set(caption_of[5:])) == 1
        forced = caption_of[0] != caption_of[5]
        carried = not bool(sample["frame_mask"][0])
        assert sample["frame_mask"].tolist() == ([False] * 5 if carried else [True] * 5) + [True] * 10
        assert carried or not forced
        words = {tuple(texts.features(t)[0].flatten().tolist()) for t in cache.spans(0)[caption_of[5] > 0].captions}
        assert tuple(sample["text"].flatten().tolist()) in words
        seen.add((start, carried))
    assert seen == {(5, True), (10, True), (10, False)} | {(5, True)}


@pytest.mark.parametrize("latent_frames", [1, 5])
def test_windows_that_carry_nothing_start_at_chunks_under_one_caption(latent_frames: int, tmp_path: Path) -> None:
    """Against a reading frame by frame. A picture is the first latent frame of a chunk, and says so by its rate."""
    cache = build_latent_cache(NumberedTakes(3, spans(0, 34)), encode, root=tmp_path, encoder_key="a")
    texts = texts_for(cache, tmp_path)
    config = WindowConfig(latent_frames=latent_frames, overlap=0, mask_ratios={})
    samples, seen = LatentWindows(cache, config=config, seed=0, size=(4, 6), texts=texts), set()
    for number in range(60):
        sample = samples.sample(number)
        start = int(sample["start"])
        index = next(i for i in range(3) if torch.equal(cache.latent(i)[:, start], sample["latent"][:, 0]))
        torch.testing.assert_close(sample["latent"], cache.latent(index)[:, start : start + latent_frames])
        assert bool(sample["frame_mask"].all()), "nothing is carried over, nothing is given"
        assert float(sample["fps"]) == (120.0 if latent_frames == 1 else 8.0)
        span = cache.spans(index)[start >= 10]  # the caption changes at frame 34, latent frame 10
        assert any(torch.equal(sample["text"], texts.features(caption)[0]) for caption in span.captions)
        seen.add(start)
    assert seen == {0, 5, 10, 15, 20}


def test_code_windows_learn_the_codes_under_their_caption_only(tmp_path: Path) -> None:
    cache = build_latent_cache(NumberedTakes(4, spans(0, 34, 68)), encode, root=tmp_path, encoder_key="a")
    numbers = torch.arange(13).view(1, 13, 1, 1).expand(4, 13, 1, 2)
    codes = build_code_cache(cache, lambda z: numbers[: len(z)], root=tmp_path, encoder_key="v")
    texts = texts_for(cache, tmp_path)
    samples = CodeWindows(cache, codes, texts=texts, num_frames=6, time_ratio=2, seed=0)
    starts, captions = [], set()
    for number in range(120):
        sample = samples.sample(number)
        frames = sample["codes"].view(6, 2)[:, 0].tolist()
        length = next((i for i in range(1, 6) if frames[i] != frames[0] + i), 6)
        span_of = [sum(2 * f >= border for border in (10, 20)) for f in frames[:length]]
        learned = [span == span_of[-1] for span in span_of] + [False] * (6 - length)
        learned[0] = learned[0] and frames[0] == 0  # without context only the start of a take is learned
        assert sample["loss_mask"].view(6, 2).tolist() == [[x, x] for x in learned]
        assert any(learned)
        words = [texts.features(t)[0] for t in cache.spans(0)[span_of[-1]].captions]
        assert any(torch.equal(sample["text"], w) for w in words)
        assert frames[length - 1] <= 11, "the last code frame is half padding and is left out"
        starts.append(frames[0])
        captions.add(span_of[-1])
    assert 0.4 < starts.count(0) / len(starts) < 0.75
    assert set(starts) >= set(range(9))
    assert captions == {0, 1, 2}


def test_stream_started_late_equals_the_tail_of_the_whole(tmp_path: Path) -> None:
    cache = build_latent_cache(NumberedTakes(5, spans(0, 34)), encode, root=tmp_path, encoder_key="a")
    samples = LatentWindows(cache, config=WindowConfig(), seed=3, size=(4, 6), texts=texts_for(cache, tmp_path))
    batches = FixedBatches(samples, 3)
    whole = [batch for batch, _ in zip(BatchStream(batches), range(6), strict=False)]
    tail = BatchStream(batches, first_batch=lambda: 4, num_batches=2)
    for ours, expected in zip(tail, whole[4:], strict=True):
        assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_processes_share_the_rows_of_a_larger_batch(tmp_path: Path) -> None:
    cache = build_latent_cache(NumberedTakes(5, spans(0)), encode, root=tmp_path, encoder_key="a")
    samples = LatentWindows(cache, config=WindowConfig(), seed=3, size=(4, 6))
    whole = [batch for batch, _ in zip(BatchStream(FixedBatches(samples, 6)), range(3), strict=False)]
    for rank in range(2):
        stream = BatchStream(FixedBatches(samples, 3), num_batches=3, shard=lambda: Shard(rank, 2))  # noqa: B023
        for ours, expected in zip(stream, whole, strict=True):
            assert all(torch.equal(ours[name], expected[name][3 * rank : 3 * rank + 3]) for name in expected)


def test_an_epoch_shows_every_take_once() -> None:
    for epoch in range(3):
        assert sorted(windows.shuffled(epoch * 7 + i, 7, seed=1) for i in range(7)) == list(range(7))
    first, second = ([windows.shuffled(7 * e + i, 7, 1) for i in range(7)] for e in (0, 1))
    assert first != second


def test_video_windows_are_chunks_of_takes() -> None:
    source = NumberedTakes(2, spans(0))
    starts = set()
    for number in range(30):
        video = VideoWindows(source, num_frames=17, seed=0).sample(number)["video"]
        index = source.asked[-1]
        start = round((float(video[0, 0, 0, 0]) - index / 100) * 1000)
        torch.testing.assert_close(video, source.take(index).video[:, start : start + 17])
        starts.add(start)
    assert starts == {0, 17, 34, 51, 68}
    anywhere = VideoWindows(source, num_frames=80, seed=0)
    firsts = {round(1000 * float(anywhere.sample(n)["video"][0, 0, 0, 0])) % 10 for n in range(40)}
    assert firsts == {0, 1, 2, 3, 4, 5}


def test_shapes_takes_are_the_same_whenever_asked() -> None:
    config = ShapesTakesConfig(num_takes=4, num_frames=68, height=12, width=16, switch_prob=0.7)
    one, two = ShapesTakes(config), ShapesTakes(config)
    for index in (3, 0, 2):
        a, b = one.take(index), two.take(index)
        assert torch.equal(a.video, b.video)
        assert a.spans == b.spans
        assert a.video.shape == (3, 68, 12, 16)
        starts = [span.start_frame for span in a.spans]
        assert starts[0] == 0
        assert all(s % 17 == 0 for s in starts)
        ends = [*starts[1:], 68]
        assert all(end - start >= 34 for start, end in zip(starts, ends, strict=True) if start)
    assert one.identity == two.identity


def test_fingerprint_notices_another_renderer(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ShapesTakesConfig(num_takes=4, num_frames=17, height=12, width=16)
    before = ShapesTakes(config).identity
    monkeypatch.setitem(__import__("arlon.shapes.world", fromlist=["COLOURS"]).SIZES, "small", 0.2)
    assert ShapesTakes(config).identity != before


def test_settings_of_takes_are_checked_together() -> None:
    with pytest.raises(ValueError, match=r"num_frames \(50\).*\nunknown split 'test'"):
        ShapesTakesConfig(num_frames=50, split="test")
