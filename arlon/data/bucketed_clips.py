"""Clips of many sizes and lengths as batches of latents: each batch is one slot of the buckets.

A clip is decoded, brought to the size of its slot and encoded when it is first asked for. The latents are kept on disk,
because the VAE costs as much as a training step or more and a set of one's own clips is seen many times; building all
latents ahead would encode every clip at sizes and lengths that it may never be drawn for. A set that is seen once or
twice is better not kept.

A sample holds what `LatentWindows` gives, and the number of its bucket:

    latent (C, T, H, W)   frame_mask (T,) bool, True = noisy   fps ()   height ()   width ()   bucket () int64
    text (L, E)   text_mask (L,) bool
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from arlon.data.buckets import Bucket, BucketPlan, BucketTable, ClipSize, Slot, nearest_slot
from arlon.data.latent_cache import TextCache, content_key, write_array
from arlon.data.manifest import Clip
from arlon.data.pictures import IMAGE_FPS
from arlon.data.samples import WHOLE, MaskSampler, Sample, Shard, sample_generator, stack_samples
from arlon.data.transforms import resize_and_crop


class ClipLatents:
    """Latents of pieces of clips, encoded when first asked for and kept in a folder.

    Two processes that encode the same piece write the same file, each by rename.
    """

    def __init__(self, encode: Callable[[Tensor], Tensor], *, encoder_key: str, root: str | Path | None) -> None:
        """Set up the encoding.

        Args:
            encode: video (B, 3, pT, pH, pW) in [-1, 1] -> normalised latent (B, C, T, H, W): the posterior mean.
            encoder_key: Content hash of the VAE.
            root: Folder of all caches; None keeps nothing.
        """
        self._encode, self._key = encode, encoder_key
        self._folder = None if root is None else Path(root) / "clips" / content_key({"encoder": encoder_key})

    def latent(self, clip: Clip, *, start: int, num_frames: int, size: tuple[int, int], fps: float | None) -> Tensor:
        """Frames [start, start + num_frames) of a clip at `size` (height, width) in pixels, (C, T, H, W) float32.

        Args:
            clip: The clip.
            start: First frame, counted at the output rate.
            num_frames: Frames.
            size: Height and width in pixels; the clip is scaled to cover it and cut at the centre.
            fps: Output rate; None takes the frames of the file.

        Raises:
            ValueError: If the file cannot be read, or the latents are not finite.
        """
        path = None if self._folder is None else self._path(clip, start, num_frames, size, fps)
        if path is not None and path.exists():
            return torch.from_numpy(np.load(path).astype(np.float32))
        frames = clip.read(start=start, num_frames=num_frames, fps=fps)
        video = resize_and_crop(frames, height=size[0], width=size[1], filter=clip.filter)
        with torch.no_grad():
            latent = self._encode(video.unsqueeze(0))[0].to(torch.float16).cpu()
        if not torch.isfinite(latent).all():
            raise ValueError(
                f"the VAE made latents of '{clip.path}' that are not finite in float16; its weights or its shift and "
                "scale are broken"
            )
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_array(path, latent.numpy())
        return latent.float()

    def _path(self, clip: Clip, start: int, num_frames: int, size: tuple[int, int], fps: float | None) -> Path:
        """File of a piece. Clips are known by path, size on disk and modification time, not by content."""
        assert self._folder is not None
        status = clip.path.stat()
        piece = [str(clip.path), status.st_size, status.st_mtime_ns, start, num_frames, *size, fps]
        if clip.is_picture_file:
            piece.append(clip.filter)
        digest = hashlib.sha256(json.dumps(piece).encode()).hexdigest()[:24]
        return self._folder / digest[:2] / f"{digest}.npy"


class BucketedClips:
    """Batches of clips in buckets. Batch k depends on (seed, k), the clips and the number of processes only."""

    def __init__(
        self,
        clips: Sequence[Clip],
        buckets: Sequence[Bucket],
        *,
        latents: ClipLatents,
        texts: TextCache,
        seed: int,
        size_multiple: int,
        strict: bool = True,
        fps: float | None = None,
        mask_sampler: MaskSampler | None = None,
    ) -> None:
        """Sort the clips.

        Args:
            clips: Clips of a manifest; a clip of one frame is a picture.
            buckets: Which sizes and lengths are trained on.
            latents: Encodes them.
            texts: Features of their captions.
            seed: Seed of everything that is drawn.
            size_multiple: Sizes are rounded down to multiples of it: pixels of a latent row or column.
            strict: Clips must have more frames than their bucket, not just as many.
            fps: Frames a second that all clips are brought to; None leaves each at its own.
            mask_sampler: Draws which frames are given; none if None.

        Raises:
            ValueError: If no clip fits a bucket.
        """
        self._clips, self._latents, self._texts, self._seed = tuple(clips), latents, texts, seed
        self._multiple, self._fps, self._mask_sampler = size_multiple, fps, mask_sampler
        self.table = BucketTable(buckets, strict=strict)
        self._sizes = [ClipSize(self._num_frames(clip), clip.height, clip.width) for clip in clips]
        self._plan = BucketPlan(self.table, self._sizes, seed)

    def batch(self, number: int, shard: Shard = WHOLE) -> Sample:
        """The rows of batch `number` that belong to a process."""
        slot, clips = self._plan.batch(number, shard.world)
        per_process = len(clips) // shard.world
        rows = range(shard.rank * per_process, (shard.rank + 1) * per_process)
        return stack_samples([self._sample(slot, clips[row], f"clip of batch {number}", row) for row in rows])

    def fixed_batches(self, limit: int) -> Iterator[Sample]:
        """At most `limit` batches of every bucket that is used, of all clips that fit it, the same ones each time."""
        for bucket in self.table.used:
            fitting: dict[Slot, list[int]] = {}
            for index, size in enumerate(self._sizes):
                if self.table.holds(bucket, size):
                    fitting.setdefault(nearest_slot(bucket, size), []).append(index)
            step = bucket.batch_size or 1  # every bucket that is used has one
            chunks = ((slot, rows[i : i + step]) for slot, rows in fitting.items() for i in range(0, len(rows), step))
            for slot, chunk in islice(chunks, limit):
                yield stack_samples([self._sample(slot, index, f"fixed {bucket.name}", index) for index in chunk])

    def examples(self, count: int) -> Sample:
        """The first `count` clips, at most, that fit the smallest bucket with any, for pictures."""
        for bucket in reversed(self.table.used):
            rows = [index for index, size in enumerate(self._sizes) if self.table.holds(bucket, size)]
            if rows:
                slot = nearest_slot(bucket, self._sizes[rows[0]])
                return stack_samples([self._sample(slot, index, "example", index) for index in rows[:count]])
        raise AssertionError("the plan has found a bucket for some clip")

    def _sample(self, slot: Slot, index: int, role: str, number: int) -> Sample:
        generator = sample_generator(self._seed, role, number)
        clip, frames = self._clips[index], slot.bucket.num_frames
        height, width = (side // self._multiple * self._multiple for side in slot.size)
        # Pieces lie side by side, so that a clip has few of them to encode and keep.
        piece = int(torch.randint(self._sizes[index].num_frames // frames, (), generator=generator))
        is_picture = frames == 1
        latent = self._latents.latent(
            clip,
            start=piece * frames,
            num_frames=frames,
            size=(height, width),
            fps=None if is_picture else self._fps,
        )
        all_noisy = torch.ones(latent.shape[1], dtype=torch.bool)
        text, text_mask = self._texts.features(clip.text)
        return {
            "latent": latent,
            "frame_mask": self._mask_sampler(latent.shape[1], generator) if self._mask_sampler else all_noisy,
            "fps": torch.tensor(IMAGE_FPS if is_picture else self._fps or clip.fps),
            "height": torch.tensor(float(height)),
            "width": torch.tensor(float(width)),
            "bucket": torch.tensor(self.table.buckets.index(slot.bucket)),
            "text": text,
            "text_mask": text_mask,
        }

    def _num_frames(self, clip: Clip) -> int:
        """Frames of a clip at the output rate; the small term keeps an exact fit in spite of rounding."""
        if self._fps is None or clip.num_frames == 1:
            return clip.num_frames
        return int(clip.num_frames / clip.fps * self._fps + 1e-6)


class FixedClips:
    """The batches of a validation: `fixed_batches` of a set of clips, again at every iteration."""

    def __init__(self, clips: BucketedClips, limit: int) -> None:
        self._clips, self._limit = clips, limit

    def __iter__(self) -> Iterator[Sample]:
        return self._clips.fixed_batches(self._limit)
