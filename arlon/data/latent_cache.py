"""Caches of the outputs of frozen networks on the training data: latents, codes, features of captions.

A cache is a folder of shards. Shard 7 is `00007.npy` (an array, read by memory map) and `00007.json` (what
belongs to its rows). Both are written atomically and the JSON file last: it is the commit, so an
interrupted build continues where it stopped and a finished shard is never made again. The folder's name is a
hash of everything that decides the content (data set, VAE weights, sizes, format): other inputs mean another
folder, so nothing stale is ever read.

    root/latents/KEY/   array (n, C, T, H, W) float16    json: captions and frame rate of each take
    root/codes/KEY/     array (n, cT, cH, cW) int16      json: nothing
    root/text/KEY/      array (n, E) float16, real tokens of many captions    json: captions, lengths
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from arlon.data.datasets import CaptionSpan, TakeSource
from arlon.files import atomic_file, hash_bytes, make_folder, write_bytes

CACHE_FORMAT = 1
ProgressCallback = Callable[[int, int], None]
"""Called with (rows done, rows in all) after every batch of a build."""


class Features(Protocol):
    """Output of a text encoder: tokens (B, L, E) and mask (B, L), True = real token."""

    @property
    def tokens(self) -> Tensor: ...

    @property
    def mask(self) -> Tensor: ...


def content_key(identity: Mapping[str, Any]) -> str:
    """Hash of everything that decides a cache's content: 16 hex digits of SHA-256 over canonical JSON.

    Raises:
        TypeError: If `identity` holds something that JSON does not know.
    """
    text = json.dumps({"format": CACHE_FORMAT, **identity}, sort_keys=True, separators=(",", ":"))
    return hash_bytes(text.encode())[:16]


class ArrayShards:
    """A long array in shards of `shard_size` rows, memory-mapped for reading, with one JSON record a row.

    Only the last shard may be shorter, and it is made again when the array grows.
    """

    def __init__(self, folder: str | Path, shard_size: int) -> None:
        if shard_size < 1:
            raise ValueError(f"shard_size must be at least 1, got {shard_size}")
        self.folder, self.shard_size = Path(folder), shard_size
        self._maps: dict[int, np.ndarray] = {}

    def missing(self, num_rows: int) -> Iterator[tuple[int, range]]:
        """Shards that are not complete yet for an array of `num_rows` rows, with the rows of each."""
        for shard, start in enumerate(range(0, num_rows, self.shard_size)):
            rows = range(start, min(start + self.shard_size, num_rows))
            if self._finished_rows(shard) < len(rows):
                yield shard, rows

    def write(self, shard: int, array: np.ndarray, records: Sequence[Any]) -> None:
        """Store one shard: the array first, then the records, each by rename."""
        make_folder(self.folder)
        self._maps.pop(shard, None)
        write_array(self.folder / f"{shard:05d}.npy", array)
        write_bytes(self.folder / f"{shard:05d}.json", json.dumps(list(records)).encode())

    def row(self, index: int) -> np.ndarray:
        """Row `index` as a view into its memory map."""
        shard, offset = divmod(index, self.shard_size)
        if shard not in self._maps:
            self._maps[shard] = np.load(self.folder / f"{shard:05d}.npy", mmap_mode="r")
        return self._maps[shard][offset]

    def records(self, num_rows: int) -> list[Any]:
        """The records of rows 0..num_rows - 1, read from disk."""
        found: list[Any] = []
        for shard in range(-(-num_rows // self.shard_size)):
            found += json.loads((self.folder / f"{shard:05d}.json").read_text())
        return found[:num_rows]

    def _finished_rows(self, shard: int) -> int:
        path = self.folder / f"{shard:05d}.json"
        return len(json.loads(path.read_text())) if path.exists() else 0


class LatentCache:
    """Latents of `len(cache)` takes with their captions; made by `build_latent_cache`."""

    def __init__(self, shards: ArrayShards, num_takes: int, identity: Mapping[str, Any]) -> None:
        self._shards, self._num_takes = shards, num_takes
        self.identity = dict(identity)
        self._records = shards.records(num_takes)
        self.latent_shape: tuple[int, int, int, int] = tuple(shards.row(0).shape)

    def __len__(self) -> int:
        return self._num_takes

    @property
    def key(self) -> str:
        """Hash of what decided the content."""
        return content_key(self.identity)

    def latent(self, index: int, frames: slice = slice(None)) -> Tensor:
        """Latent frames `frames` of take `index`, (C, T, H, W) float32."""
        return torch.from_numpy(np.array(self._shards.row(index)[:, frames], dtype=np.float32))

    def spans(self, index: int) -> tuple[CaptionSpan, ...]:
        """Captions of take `index`, with the video frame from which each holds."""
        return tuple(
            CaptionSpan(start_frame=start, captions=tuple(texts)) for start, texts in self._records[index]["spans"]
        )

    def fps(self, index: int) -> float:
        """Frame rate of take `index`."""
        return float(self._records[index]["fps"])

    def all_captions(self) -> list[str]:
        """Every caption once, in order of first use."""
        return list(dict.fromkeys(t for r in self._records for _, texts in r["spans"] for t in texts))


class JoinedLatents(LatentCache):
    """The takes of several caches of one latent shape, one after the other."""

    def __init__(self, parts: Sequence[LatentCache]) -> None:
        """Join `parts`, at least one.

        Raises:
            ValueError: If their latents have different shapes.
        """
        shapes = [part.latent_shape for part in parts]
        if len(set(shapes)) != 1:
            raise ValueError(f"takes that are trained on together must have one latent shape, got {shapes}")
        self._parts = [(part, index) for part in parts for index in range(len(part))]
        self.identity = {"kind": "joined", "parts": [part.identity for part in parts]}
        self.latent_shape = shapes[0]
        self._captions = [caption for part in parts for caption in part.all_captions()]

    def __len__(self) -> int:
        return len(self._parts)

    def latent(self, index: int, frames: slice = slice(None)) -> Tensor:
        part, place = self._parts[index]
        return part.latent(place, frames)

    def spans(self, index: int) -> tuple[CaptionSpan, ...]:
        part, place = self._parts[index]
        return part.spans(place)

    def fps(self, index: int) -> float:
        part, place = self._parts[index]
        return part.fps(place)

    def all_captions(self) -> list[str]:
        return list(dict.fromkeys(self._captions))


class CodeCache:
    """Codes of the takes of a latent cache under one VQ-VAE; made by `build_code_cache`."""

    def __init__(self, shards: ArrayShards, num_takes: int) -> None:
        self._shards, self._num_takes = shards, num_takes
        self.code_shape: tuple[int, int, int] = tuple(shards.row(0).shape)

    def __len__(self) -> int:
        return self._num_takes

    def codes(self, index: int, frames: slice = slice(None)) -> Tensor:
        """Code frames `frames` of take `index`, (cT, cH, cW) int64."""
        return torch.from_numpy(np.array(self._shards.row(index)[frames], dtype=np.int64))


class TextCache:
    """Text features by caption, stored once for all data sets of one text encoder; grown by `add`."""

    def __init__(self, root: str | Path, encoder_key: str, *, max_length: int) -> None:
        identity = {"kind": "text", "encoder": encoder_key, "max_length": max_length}
        self.folder = Path(root) / "text" / content_key(identity)
        self.max_length = max_length
        self._where: dict[str, tuple[str, int, int]] = {}
        self._maps: dict[str, np.ndarray] = {}
        for path in sorted(self.folder.glob("*.json")):
            self._index(path.stem, json.loads(path.read_text()))

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, caption: str) -> bool:
        return caption in self._where

    def add(
        self,
        captions: Iterable[str],
        encode: Callable[[list[str]], Features],
        *,
        shard_size: int = 1024,
        batch_size: int = 32,
        progress: ProgressCallback | None = None,
    ) -> None:
        """Encode the captions that are not stored yet; every finished shard of `shard_size` captions is kept.

        Raises: ValueError: If the encoder's sequence length is not `max_length`, or its masks are not
            right-padded.
        """
        wanted = [caption for caption in dict.fromkeys(captions) if caption not in self._where]
        for start in range(0, len(wanted), shard_size):
            chunk = wanted[start : start + shard_size]
            rows: list[np.ndarray] = []
            for low in range(0, len(chunk), batch_size):
                rows += self._real_tokens(encode(chunk[low : low + batch_size]))
                if progress is not None:
                    progress(start + len(rows), len(wanted))
            self._write(chunk, rows)

    def features(self, caption: str) -> tuple[Tensor, Tensor]:
        """Tokens (L, E) float32, zero where padded, and mask (L,) of a caption.

        Raises:
            KeyError: If the caption was never added.
        """
        if caption not in self._where:
            raise KeyError(f"caption {caption!r} is not in the text cache {str(self.folder)!r}; add it first")
        name, start, length = self._where[caption]
        if name not in self._maps:
            self._maps[name] = np.load(self.folder / f"{name}.npy", mmap_mode="r")
        real = torch.from_numpy(np.array(self._maps[name][start : start + length], dtype=np.float32))
        tokens = real.new_zeros(self.max_length, real.shape[1])
        tokens[:length] = real
        return tokens, torch.arange(self.max_length) < length

    def _real_tokens(self, features: Features) -> list[np.ndarray]:
        mask = features.mask.bool()
        lengths = mask.sum(dim=1)
        expected = torch.arange(mask.shape[1]) < lengths[:, None]
        if mask.shape[1] != self.max_length or not torch.equal(mask.cpu(), expected.cpu()):
            raise ValueError(
                f"the text cache expects right-padded captions of {self.max_length} tokens, got masks "
                f"{tuple(mask.shape)}; give the encoder max_length={self.max_length} and right padding"
            )
        tokens = features.tokens.detach().to(torch.float16).cpu().numpy()
        return [row[:length] for row, length in zip(tokens, lengths.tolist(), strict=True)]

    def _write(self, captions: list[str], rows: list[np.ndarray]) -> None:
        name = hash_bytes("\n".join(captions).encode())[:16]
        record: dict[str, list[Any]] = {"captions": captions, "lengths": [len(row) for row in rows]}
        make_folder(self.folder)
        write_array(self.folder / f"{name}.npy", np.concatenate(rows))
        write_bytes(self.folder / f"{name}.json", json.dumps(record).encode())
        self._index(name, record)

    def _index(self, name: str, record: Mapping[str, list[Any]]) -> None:
        start = 0
        for caption, length in zip(record["captions"], record["lengths"], strict=True):
            self._where[caption] = (name, start, length)
            start += length


def build_latent_cache(
    source: TakeSource,
    encode: Callable[[Tensor], Tensor],
    *,
    root: str | Path,
    encoder_key: str,
    num_takes: int | None = None,
    shard_size: int = 256,
    batch_size: int = 8,
    progress: ProgressCallback | None = None,
) -> LatentCache:
    """Encode the first `num_takes` takes of a source, or read them if they are there.

    Args:
        source: Takes; `source.identity` says what they are.
        encode: video (B, 3, pT, pH, pW) in [-1, 1] -> normalised latent (B, C, T, H, W): the posterior mean.
        root: Folder of all caches.
        encoder_key: Content hash of the VAE.
        num_takes: Default: the whole source.
        shard_size: Takes a shard; an interruption costs at most one shard.
        batch_size: Takes encoded at a time.
        progress: Called with (takes done, takes in all).

    Raises:
        ValueError: If `num_takes` is not in 1..len(source), or a latent is not finite.
    """
    total = len(source) if num_takes is None else num_takes
    if not 1 <= total <= len(source):
        raise ValueError(f"num_takes must be in 1..{len(source)} (the takes of the source), got {total}")
    identity = {
        "kind": "latents",
        "source": source.identity,
        "encoder": encoder_key,
        "shard_size": shard_size,
    }
    shards = ArrayShards(Path(root) / "latents" / content_key(identity), shard_size)
    for shard, rows in shards.missing(total):
        arrays, records = [], []
        for start in range(rows.start, rows.stop, batch_size):
            takes = [source.take(i) for i in range(start, min(start + batch_size, rows.stop))]
            arrays.append(_to_float16(encode(torch.stack([take.video for take in takes])), start))
            records += [
                {"spans": [[s.start_frame, list(s.captions)] for s in take.spans], "fps": take.fps} for take in takes
            ]
            if progress is not None:
                progress(start + len(takes), total)
        shards.write(shard, np.concatenate(arrays), records)
    write_bytes(shards.folder / "cache.json", json.dumps(identity, indent=2).encode())
    return LatentCache(shards, total, identity)


def build_code_cache(
    cache: LatentCache,
    encode: Callable[[Tensor], Tensor],
    *,
    root: str | Path,
    encoder_key: str,
    shard_size: int = 1024,
    batch_size: int = 64,
    progress: ProgressCallback | None = None,
) -> CodeCache:
    """Codes of every take of a latent cache, or read them if they are there.

    Args:
        cache: Latents of takes.
        encode: latent (B, C, T, H, W) -> codes (B, cT, cH, cW) int64 below 32768.
        root: Folder of all caches.
        encoder_key: Content hash of the VQ-VAE.
        shard_size: Takes a shard.
        batch_size: Takes encoded at a time.
        progress: Called with (takes done, takes in all).
    """
    identity = {"kind": "codes", "latents": cache.key, "encoder": encoder_key, "shard_size": shard_size}
    shards = ArrayShards(Path(root) / "codes" / content_key(identity), shard_size)
    for shard, rows in shards.missing(len(cache)):
        arrays = []
        for start in range(rows.start, rows.stop, batch_size):
            stop = min(start + batch_size, rows.stop)
            arrays.append(_to_int16(encode(torch.stack([cache.latent(i) for i in range(start, stop)]))))
            if progress is not None:
                progress(stop, len(cache))
        shards.write(shard, np.concatenate(arrays), [None] * len(rows))
    return CodeCache(shards, len(cache))


def write_array(path: Path, array: np.ndarray) -> None:
    """Write an `.npy` file atomically."""
    with atomic_file(path) as temporary, temporary.open("wb") as file:  # a name alone would be given the suffix .npy
        np.save(file, np.ascontiguousarray(array))


def _to_float16(latent: Tensor, first: int) -> np.ndarray:
    half = latent.detach().to(torch.float16)
    if not torch.isfinite(half).all():
        raise ValueError(
            f"the VAE made latents that are not finite in float16, takes {first}..{first + len(half) - 1}; "
            "its weights or its shift and scale are broken"
        )
    return half.cpu().numpy()


def _to_int16(codes: Tensor) -> np.ndarray:
    if int(codes.max()) > np.iinfo(np.int16).max:
        raise ValueError(f"the code cache holds codes below 32768, got {int(codes.max())}: use a smaller codebook")
    return codes.detach().to(torch.int16).cpu().numpy()
