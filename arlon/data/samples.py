"""Training samples of the stages: windows of takes, addressed by their number in an endless stream.

Sample n of a stream depends on (seed, n) only: on epoch n // N a permutation picks the take, and a generator
of its own draws the window, the phrasing and the mask. Batch k holds samples k B to (k + 1) B - 1, so a
training that resumes at step k needs no other state than k; W processes share a batch of W B samples.

Dimension key: C latent channels, T H W latent grid of a window, cH cW code grid, S codes of a window, L text
tokens, E text width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from arlon.data.datasets import CaptionSpan, TakeSource
from arlon.data.latent_cache import CodeCache, LatentCache, TextCache
from arlon.data.pictures import IMAGE_FPS
from arlon.grids import CHUNK_FRAMES, num_latent_frames

Sample = dict[str, Tensor]


class SampleSet(Protocol):
    """Anything with samples addressed by their number."""

    def sample(self, number: int) -> Sample: ...


class Shard(NamedTuple):
    """Rank and world size: each process takes its own rows of every batch."""

    rank: int = 0
    world: int = 1


WHOLE = Shard()


class BatchSet(Protocol):
    """Anything with batches addressed by their number, of which each process gets its rows."""

    def batch(self, number: int, shard: Shard = WHOLE) -> Sample: ...


class FixedBatches:
    """Batches of `batch_size` samples a process: batch k of W processes holds samples k W B to (k + 1) W B - 1."""

    def __init__(self, samples: SampleSet, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.samples, self.batch_size = samples, batch_size

    def batch(self, number: int, shard: Shard = WHOLE) -> Sample:
        """The rows of batch `number` that belong to a process, stacked."""
        first = (number * shard.world + shard.rank) * self.batch_size
        return stack_samples([self.samples.sample(first + i) for i in range(self.batch_size)])


class MixedBatches:
    """Batches of several sets: batch k comes from set i with probability `shares[i]`, drawn from (seed, k)."""

    def __init__(self, sets: Sequence[BatchSet], shares: Sequence[float], seed: int) -> None:
        if len(sets) != len(shares) or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"a share for each of the {len(sets)} sets, 1 in all, is needed, got {list(shares)}")
        self._sets, self._shares, self._seed = list(sets), torch.tensor(shares), seed

    def batch(self, number: int, shard: Shard = WHOLE) -> Sample:
        """The rows of batch `number` that belong to a process; all processes draw from the same set."""
        generator = sample_generator(self._seed, "mix", number)
        chosen = int(torch.multinomial(self._shares, 1, generator=generator))
        return self._sets[chosen].batch(number, shard)


class BatchStream:
    """Addressed batches in order: endless from a given step on, or the same few each time.

    Args:
        batches: The batches.
        first_batch: Called when an iteration starts; the number of the first batch. Default: 0.
        num_batches: Batches of one iteration; None is endless.
        shard: Called when an iteration starts; whose rows are wanted. Default: all.
    """

    def __init__(
        self,
        batches: BatchSet,
        *,
        first_batch: Callable[[], int] = lambda: 0,
        num_batches: int | None = None,
        shard: Callable[[], Shard] = Shard,
    ) -> None:
        self._batches, self._first_batch = batches, first_batch
        self._num_batches, self._shard = num_batches, shard

    def __iter__(self) -> Iterator[Sample]:
        number, shard = self._first_batch(), self._shard()
        stop = None if self._num_batches is None else number + self._num_batches
        while stop is None or number < stop:
            yield self._batches.batch(number, shard)
            number += 1


def stack_samples(rows: Sequence[Sample]) -> Sample:
    """One batch of samples that have the same tensors."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class VideoWindows:
    """Windows of `num_frames` frames for the VAE, {"video": (3, pT, pH, pW)}.

    Whole chunks start at multiples of 17, other lengths anywhere.
    """

    def __init__(self, source: TakeSource, *, num_frames: int, seed: int) -> None:
        self._source, self._num_frames, self._seed = source, num_frames, seed

    def sample(self, number: int) -> Sample:
        """Sample `number` of the stream."""
        video = self._source.take(shuffled(number, len(self._source), self._seed)).video
        if video.shape[1] < self._num_frames:
            raise ValueError(f"a window of {self._num_frames} frames does not fit a take of {video.shape[1]} frames")
        # The VAE codes whole chunks, so windows of whole chunks start at borders of chunks.
        step = 1 if self._num_frames % CHUNK_FRAMES else CHUNK_FRAMES
        starts = range(0, video.shape[1] - self._num_frames + 1, step)
        start = starts[_draw(len(starts), sample_generator(self._seed, "video", number))]
        return {"video": video[:, start : start + self._num_frames]}


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """How a sample of the DiT stages is cut from a take, and which of its frames are given clean."""

    latent_frames: int = 15
    """Latent frames of a window: one segment."""
    overlap: int = 5
    """Latent frames a segment carries over; windows start at multiples of it. 0: nothing is carried over, and windows
    start at a VAE chunk. Windows of one frame are pictures."""
    carry_prob: float = 0.5
    """Probability that the first `overlap` frames are given clean if the caption does not force it."""
    mask_ratios: dict[str, float] = field(default_factory=lambda: {"image_head": 0.05})
    """Open-Sora's mask modes with their probabilities, for windows whose first frames are not given."""

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.latent_frames:
            raise ValueError(
                f"overlap ({self.overlap}) must be in 0..{self.latent_frames - 1} (latent_frames is "
                f"{self.latent_frames})"
            )
        if not 0 <= self.carry_prob <= 1:
            raise ValueError(f"carry_prob must be in [0, 1], got {self.carry_prob}")


MaskSampler = Callable[[int, torch.Generator], Tensor]
"""(T, generator) -> frame mask (T,) bool, True = noisy."""


class LatentWindows:
    """Windows of latents with caption and frame mask: one training sample of `vqvae`, `dit` and `inject`.

    A window starts at a multiple of `overlap` latent frames, or of a VAE chunk if that is 0. All of it behind the
    first `overlap` frames has one caption, which is the caption of the sample. If another caption holds in those first
    frames the window goes over a prompt switch: they are given clean, as the pipeline does. A sample holds

        latent (C, T, H, W)   frame_mask (T,) bool, True = noisy   fps ()   height ()   width ()   start ()
        text (L, E)   text_mask (L,) bool

    with height and width in pixels, and, for each of `codes`, the codes of the whole take as `codes_NAME`
    (cT, cH, cW). Without a text cache there is no text.
    """

    def __init__(
        self,
        cache: LatentCache,
        *,
        config: WindowConfig,
        seed: int,
        size: tuple[int, int],
        texts: TextCache | None = None,
        codes: Mapping[str, CodeCache] | None = None,
        mask_sampler: MaskSampler | None = None,
    ) -> None:
        self._cache, self._config, self._seed = cache, config, seed
        self._height, self._width = (float(side) for side in size)
        self._texts, self._codes, self._mask_sampler = texts, dict(codes or {}), mask_sampler
        starts = [window_starts(cache.spans(i), cache.latent_shape[1], config) for i in range(len(cache))]
        self._usable = [(index, found) for index, found in enumerate(starts) if found]
        if not self._usable:
            raise ValueError(
                f"no take of {cache.latent_shape[1]} latent frames holds a window of {config.latent_frames} "
                f"with one caption behind its first {config.overlap}; make takes longer or switches rarer"
            )

    def sample(self, number: int) -> Sample:
        """Sample `number` of the stream."""
        generator = sample_generator(self._seed, "latent", number)
        index, starts = self._usable[shuffled(number, len(self._usable), self._seed)]
        start = starts[_draw(len(starts), generator)]
        before, after = self._spans_at(index, start)
        sample: Sample = {
            "latent": self._cache.latent(index, slice(start, start + self._config.latent_frames)),
            "frame_mask": self._frame_mask(generator, forced=before is not after),
            "fps": torch.tensor(IMAGE_FPS if self._config.latent_frames == 1 else self._cache.fps(index)),
            "height": torch.tensor(self._height),
            "width": torch.tensor(self._width),
            "start": torch.tensor(start),
        }
        if self._texts is not None:
            sample |= _text_of(self._texts, after, generator)
        return sample | {f"codes_{name}": cache.codes(index) for name, cache in self._codes.items()}

    def _spans_at(self, index: int, start: int) -> tuple[CaptionSpan, CaptionSpan]:
        spans = self._cache.spans(index)
        return span_at(spans, start), span_at(spans, start + self._config.overlap)

    def _frame_mask(self, generator: torch.Generator, *, forced: bool) -> Tensor:
        config = self._config
        mask = torch.ones(config.latent_frames, dtype=torch.bool)
        carried = float(torch.rand((), generator=generator)) < config.carry_prob
        if forced or carried:
            mask[: config.overlap] = False
        elif self._mask_sampler is not None:
            mask = self._mask_sampler(config.latent_frames, generator)
        return mask


class CodeWindows:
    """Windows of codes with the caption they end under: one training sample of `ar`.

    A window ends where one of the captions of its take ends, so that the codes before a switch are learned as often as
    those behind it, and spans at most `num_frames` code frames. Half of the windows start where the take starts; the
    others anywhere, and then their first frame is context: without context generation writes only starts of takes, and
    where a code frame lies within its VAE chunk cannot be told from the text. Its caption is the one of its last code
    frame; only code frames under that caption are learned, earlier ones are context, as after a prompt switch. A code
    frame belongs to the caption of its first latent frame. A code frame that is partly padding (the last one of an odd
    take) is left out. A sample holds

        codes (S,) int64   loss_mask (S,) bool   is_end () bool, False   text (L, E)   text_mask (L,)

    where S = num_frames cH cW; short windows are padded at the end with code 0 outside the loss mask. No take is the
    end of a film, so `is_end` is False: the length of a film is decided by its storyboard.
    """

    def __init__(
        self,
        cache: LatentCache,
        codes: CodeCache,
        *,
        texts: TextCache,
        num_frames: int,
        time_ratio: int,
        seed: int,
    ) -> None:
        self._cache, self._codes, self._texts, self._seed = cache, codes, texts, seed
        self._ratio, self._complete = time_ratio, cache.latent_shape[1] // time_ratio
        self._num_frames = min(num_frames, self._complete)
        if self._num_frames < 2:
            raise ValueError(
                f"a window needs two complete code frames, got {self._num_frames}; a take has "
                f"{cache.latent_shape[1]} latent frames, {time_ratio} to a code frame"
            )

    def sample(self, number: int) -> Sample:
        """Sample `number` of the stream."""
        generator = sample_generator(self._seed, "codes", number)
        index = shuffled(number, len(self._cache), self._seed)
        spans = self._cache.spans(index)
        start, stop = self._window(spans, generator)
        owners = [span_at(spans, frame * self._ratio) for frame in range(start, stop)]
        codes = self._codes.codes(index, slice(start, stop))
        learned = torch.tensor([owner is owners[-1] for owner in owners])
        # The first frame of a later window has no context of its own: it is context only.
        learned[0] &= start == 0
        padding = (self._num_frames - len(owners)) * codes[0].numel()
        return {
            "codes": F.pad(codes.flatten(), (0, padding)),
            "loss_mask": F.pad(learned.repeat_interleave(codes[0].numel()), (0, padding)),
            "is_end": torch.tensor(False),
            **_text_of(self._texts, owners[-1], generator),
        }

    def _window(self, spans: tuple[CaptionSpan, ...], generator: torch.Generator) -> tuple[int, int]:
        """Code frames [start, stop) of a window, at least two of them."""
        owners = [span_at(spans, frame * self._ratio) for frame in range(self._complete)]
        last = [f for f in range(1, self._complete) if f + 1 == self._complete or owners[f + 1] is not owners[f]]
        stop = last[_draw(len(last), generator)] + 1
        # Half of the windows start with their take.
        if _draw(2, generator):
            return 0, min(stop, self._num_frames)
        start = _draw(max(1, stop - 1), generator)
        return start, min(start + self._num_frames, stop)


def window_starts(spans: tuple[CaptionSpan, ...], take_latents: int, config: WindowConfig) -> list[int]:
    """First latent frames of the windows with one caption behind their first `overlap` frames."""
    last = take_latents - config.latent_frames
    return [
        start
        for start in range(0, last + 1, config.overlap or num_latent_frames(CHUNK_FRAMES))
        if span_at(spans, start + config.overlap) is span_at(spans, start + config.latent_frames - 1)
    ]


def span_at(spans: tuple[CaptionSpan, ...], latent_frame: int) -> CaptionSpan:
    """The span that holds in a latent frame. Spans start at VAE chunk borders."""
    return [span for span in spans if _first_latent(span.start_frame) <= latent_frame][-1]


def shuffled(number: int, length: int, seed: int) -> int:
    """Row of sample `number`: element number % length of the permutation of its epoch."""
    # Each epoch is a permutation of its own, so no state has to be stored to resume.
    epoch, offset = divmod(number, length)
    return int(_permutation(length, seed, epoch)[offset])


def sample_generator(seed: int, role: str, number: int) -> torch.Generator:
    """CPU generator for the draws of sample `number` in a role, such as "mix"; see `sample_seed`."""
    return torch.Generator().manual_seed(sample_seed(seed, role, number))


def sample_seed(seed: int, role: str, number: int) -> int:
    """Seed of training sample `number` in a role: 63 bits of SHA-256.

    Films draw by `arlon.diffusion.samplers.address_seed`, which takes addresses of any length and encodes them in
    another way. Both stay: sharing one would change the batches of every training.
    """
    digest = hashlib.sha256(f"{seed}/{role}/{number}".encode()).digest()
    # 63 bits, so that the seed fits a signed integer.
    return int.from_bytes(digest[:8], "little") >> 1


@lru_cache(maxsize=8)
def _permutation(length: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(length, generator=sample_generator(seed, "epoch", epoch))


def _first_latent(frame: int) -> int:
    return num_latent_frames(frame) if frame else 0


def _text_of(texts: TextCache, span: CaptionSpan, generator: torch.Generator) -> Sample:
    tokens, mask = texts.features(span.captions[_draw(len(span.captions), generator)])
    return {"text": tokens, "text_mask": mask}


def _draw(size: int, generator: torch.Generator) -> int:
    return int(torch.randint(size, (), generator=generator))
