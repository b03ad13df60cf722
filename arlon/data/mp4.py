"""Boxes of MP4 files (ISO/IEC 14496-12), as far as a film of one H.264 track needs them; nothing is encoded here.

A film has two layouts, with the same encoded frames:

    growing     ftyp, moov (tags, no frames), then moof + mdat for every fragment: plays while it grows or if cut off
    finished    ftyp, moov (tags and the place of every frame), one mdat: starts fast, seeks, plays everywhere

`flatten` turns a growing film into a finished one. It keeps some bytes for each frame in memory, never the frames.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import BinaryIO

from arlon.errors import VideoError

_CONTAINERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl")
_FINISHED_BRANDS = b"isom" + (512).to_bytes(4, "big") + b"isomiso2avc1mp41"
_MAX_UINT32 = 0xFFFFFFFF
_MAX_NARROW = _MAX_UINT32 // 2  # bytes of frames that 32-bit places surely reach, whatever comes before them
_COPY_BYTES = 1 << 20
_NOT_A_KEYFRAME = 0x00010000  # in the flags of a sample
_TEXT = 1  # type of a metadata value: UTF-8

Edit = Callable[[bytes], bytes]
"""Function from the content of a box to the boxes that replace it."""


def box(kind: bytes, *content: bytes | bytearray) -> bytes:
    """Bytes of a box: its size, its kind (four letters) and its content, given in parts."""
    return struct.pack(">I4s", 8 + sum(map(len, content)), kind) + b"".join(content)


def boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Split bytes into the boxes they consist of, as pairs (kind, content).

    Raises:
        VideoError: If the bytes do not end with a box.
    """
    start = 0
    while start < len(data):
        size = int.from_bytes(data[start : start + 4], "big")
        if size < 8 or start + size > len(data):
            raise VideoError("a part of it is damaged or cut off")
        yield data[start + 4 : start + 8], data[start + 8 : start + size]
        start += size


def with_tags(head: bytes, tags: Mapping[str, str]) -> bytes:
    """Replace the text tags in the head of a film (ftyp, moov)."""
    kinds = dict(boxes(head))
    moov = _rewritten(kinds[b"moov"], {b"udta": _dropped})
    return box(b"ftyp", kinds[b"ftyp"]) + box(b"moov", moov, _tag_box(tags))


def _tag_box(tags: Mapping[str, str]) -> bytes:
    """Bytes of the box of tags with names of free choice; none if there are no tags."""
    if not tags:
        return b""
    keys = [box(b"mdta", name.encode()) for name in tags]
    values = [box(b"data", struct.pack(">II", _TEXT, 0), text.encode()) for text in tags.values()]
    meta = (
        box(b"hdlr", bytes(8), b"mdta", bytes(13)),
        box(b"keys", struct.pack(">II", 0, len(keys)), *keys),
        box(b"ilst", *(box(number.to_bytes(4, "big"), value) for number, value in enumerate(values, start=1))),
    )
    return box(b"udta", box(b"meta", bytes(4), *meta))


def _rewritten(data: bytes, edits: Mapping[bytes, Edit]) -> bytes:
    """Boxes of `data` after the edits of their kinds, which reach into containers too."""
    parts = []
    for kind, content in boxes(data):
        if kind in edits:
            parts.append(edits[kind](content))
        else:
            parts.append(box(kind, _rewritten(content, edits) if kind in _CONTAINERS else content))
    return b"".join(parts)


def _dropped(_: bytes) -> bytes:
    return b""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Sizes, durations and kinds of the frames of one fragment."""

    sizes: tuple[int, ...]
    """Size of each frame in bytes."""
    durations: tuple[int, ...]
    """Duration of each frame in ticks of the track's clock."""
    keyframes: tuple[int, ...]
    """Indices of the frames that can be decoded without others."""


def read_samples(moof: bytes) -> Samples:
    """Read the content of a moof box that has one track, with frames in the order in which they are shown.

    Raises:
        VideoError: If the bytes are something else.
    """
    try:
        track = dict(boxes(dict(boxes(moof))[b"traf"]))
        defaults = _read_tfhd(track[b"tfhd"])
        return _read_trun(track[b"trun"], defaults)
    except (KeyError, IndexError, StopIteration, struct.error):
        raise VideoError("it holds a fragment of another kind than this program writes") from None


def _read_tfhd(content: bytes) -> dict[int, int]:
    """Defaults for values that a trun leaves out (duration, size, flags), by the bit that marks them in a trun."""
    flags, words = _flags_and_words(content)
    present = iter(words[1:])  # the first word is the number of the track
    if flags & 0x3:
        raise KeyError("places of frames are not counted from the moof")
    return {bit << 5: next(present) for bit in (0x08, 0x10, 0x20) if flags & bit}


def _read_trun(content: bytes, defaults: Mapping[int, int]) -> Samples:
    flags, words = _flags_and_words(content)
    count, rest = words[0], list(words[1:])
    if not count or flags & 0x800:
        raise KeyError("no frames, or frames out of order")
    if flags & 0x1:  # place of the first frame, which is always at the start of the mdat
        rest.pop(0)
    first_flags = [rest.pop(0)] if flags & 0x4 else []
    columns = [bit for bit in (0x100, 0x200, 0x400) if flags & bit]
    if len(rest) != count * len(columns):
        raise KeyError("the table has another length")
    durations, sizes, sample_flags = (
        rest[columns.index(bit) :: len(columns)] if bit in columns else [defaults[bit]] * count
        for bit in (0x100, 0x200, 0x400)
    )
    sample_flags[: len(first_flags)] = first_flags
    keyframes = tuple(i for i, value in enumerate(sample_flags) if not value & _NOT_A_KEYFRAME)
    return Samples(sizes=tuple(sizes), durations=tuple(durations), keyframes=keyframes)


def _flags_and_words(content: bytes) -> tuple[int, tuple[int, ...]]:
    first, *words = struct.unpack(f">{len(content) // 4}I", content)
    return first & 0xFFFFFF, tuple(words)


def placed(moof: bytes, *, number: int, start: int) -> bytes:
    """Bytes of a moof box with this content as fragment `number` of a film, its first frame at tick `start`."""
    data = bytearray(moof)
    mfhd, tfdt = moof.index(b"mfhd") + 4, moof.index(b"tfdt") + 4  # a version and flags follow the name
    data[mfhd + 4 : mfhd + 8] = number.to_bytes(4, "big")
    width = 8 if moof[tfdt] == 1 else 4
    data[tfdt + 4 : tfdt + 4 + width] = start.to_bytes(width, "big")
    return box(b"moof", data)


def append_fragment(film: BinaryIO, fragment: bytes) -> None:
    """Add a fragment (moof, mdat) at the end of a growing film.

    Players open a film that ends inside an mdat, but many refuse one that ends inside a moof. So the moof is marked as
    free space until its frames are written: wherever the writing ends, the film plays.
    """
    start = film.seek(0, 2)
    film.write(fragment[:4] + b"free" + fragment[8:])
    film.flush()
    film.seek(start + 4)
    film.write(fragment[4:8])
    film.flush()


def whole_length(film: BinaryIO) -> int:
    """Length in bytes of the whole boxes at the start of a file; what follows them was cut off."""
    end = 0
    with suppress(VideoError):
        for _, start, size in _stored_boxes(film):
            end = start + size
    return end


@dataclass(kw_only=True)
class _Index:
    """Places, sizes and durations of all frames of a film, in chunks of one fragment each."""

    sizes: array = field(default_factory=lambda: array("I"))
    keyframes: array = field(default_factory=lambda: array("I"))  # counted from 1, as in the file
    durations: list[list[int]] = field(default_factory=list)  # runs [frames, ticks]
    chunk_frames: list[int] = field(default_factory=list)
    chunk_places: list[tuple[int, int]] = field(default_factory=list)  # (first byte, bytes) in the growing film

    def add(self, samples: Samples, place: tuple[int, int]) -> None:
        self.keyframes.extend(len(self.sizes) + 1 + i for i in samples.keyframes)
        self.sizes.extend(samples.sizes)
        for ticks in samples.durations:
            if not self.durations or self.durations[-1][1] != ticks:
                self.durations.append([0, ticks])
            self.durations[-1][0] += 1
        self.chunk_frames.append(len(samples.sizes))
        self.chunk_places.append(place)

    @property
    def num_bytes(self) -> int:
        return sum(size for _, size in self.chunk_places)

    @property
    def ticks(self) -> int:
        return sum(frames * ticks for frames, ticks in self.durations)

    def tables(self, data_start: int, *, wide: bool) -> bytes:
        """Bytes of the boxes of the index.

        Args:
            data_start: Place of the first frame in the finished film, in bytes.
            wide: Store places in 64 bits instead of 32.
        """
        runs = []
        for frames, group in groupby(enumerate(self.chunk_frames, start=1), key=lambda chunk: chunk[1]):
            runs.append((next(group)[0], frames, 1))
        places, place = array("Q"), data_start
        for _, size in self.chunk_places:
            places.append(place)
            place += size
        tables = (
            _table(b"stts", len(self.durations), _words(chain.from_iterable(self.durations))),
            _table(b"stss", len(self.keyframes), _big_endian(self.keyframes)),
            _table(b"stsc", len(runs), _words(chain.from_iterable(runs))),
            box(b"stsz", _words((0, 0, len(self.sizes))), _big_endian(self.sizes)),
            _table(b"co64" if wide else b"stco", len(places), _big_endian(places) if wide else _words(places)),
        )
        return b"".join(tables)


def _table(kind: bytes, count: int, rows: bytes) -> bytes:
    return box(kind, _words((0, count)), rows)


def _words(values: Iterable[int]) -> bytes:
    return _big_endian(array("I", values))


def _big_endian(values: array) -> bytes:
    if sys.byteorder == "little":
        values = values[:]
        values.byteswap()
    return values.tobytes()


def flatten(source: BinaryIO, target: BinaryIO) -> int:
    """Write a growing film as a finished one, with its index before its frames, without encoding anything.

    Args:
        source: The growing film, a file that can be read from any place.
        target: File that the finished film is written to.

    Returns:
        The number of frames.

    Raises:
        VideoError: If the source is cut off or is no growing film.
    """
    moov, index = _read_growing(source)
    ftyp = box(b"ftyp", _FINISHED_BRANDS)
    wide = index.num_bytes > _MAX_NARROW
    mdat = _mdat_header(index.num_bytes, wide=wide)
    # the index is as long whatever places it holds: one with wrong places tells where the frames begin
    data_start = len(ftyp) + len(_finished_moov(moov, index, 0, wide=wide)) + len(mdat)
    target.write(ftyp + _finished_moov(moov, index, data_start, wide=wide) + mdat)
    for start, size in index.chunk_places:
        source.seek(start)
        _copy(source, target, size)
    return len(index.sizes)


def _mdat_header(num_bytes: int, *, wide: bool) -> bytes:
    if wide:
        return struct.pack(">I4sQ", 1, b"mdat", 16 + num_bytes)
    return struct.pack(">I4s", 8 + num_bytes, b"mdat")


def _read_growing(source: BinaryIO) -> tuple[bytes, _Index]:
    """Content of the moov of a growing film, and the index of its frames."""
    moov, samples, index = None, None, _Index()
    source.seek(0)
    for kind, start, size in _stored_boxes(source):
        if kind == b"moov":
            moov = source.read(size)
        elif kind == b"moof":
            samples = read_samples(source.read(size))
        elif kind == b"mdat":
            if samples is None or size != sum(samples.sizes):
                raise VideoError("its frames do not fit its index")
            index.add(samples, (start, size))
            samples = None
    if moov is None or samples is not None or not index.sizes:
        raise VideoError("it is cut off, or was not made by this program")
    return moov, index


def _stored_boxes(source: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Triples (kind, place of the content, its length in bytes) of the boxes of a file, left at each content."""
    end, start = source.seek(0, 2), 0
    while start < end:
        source.seek(start)
        size, kind = struct.unpack(">I4s", source.read(8).ljust(8, b"\0"))
        if size < 8 or start + size > end:
            raise VideoError("it is cut off, or was not made by this program")
        yield kind, start + 8, size - 8
        start += size


def _finished_moov(moov: bytes, index: _Index, data_start: int, *, wide: bool) -> bytes:
    clock = int.from_bytes(_inside(moov, b"trak", b"mdia", b"mdhd")[12:16], "big")
    film_clock = int.from_bytes(_inside(moov, b"mvhd")[12:16], "big")
    duration = -(-index.ticks * film_clock // clock)
    edits: dict[bytes, Edit] = {
        b"mvhd": lambda content: box(b"mvhd", _with_duration(content, 16, duration)),
        b"tkhd": lambda content: box(b"tkhd", _with_duration(content, 20, duration)),
        b"mdhd": lambda content: box(b"mdhd", _with_duration(content, 16, index.ticks)),
        b"stts": lambda _: index.tables(data_start, wide=wide),
    }
    edits |= dict.fromkeys((b"stsc", b"stsz", b"stco", b"mvex"), _dropped)  # the edit of stts adds all tables
    return box(b"moov", _rewritten(moov, edits))


def _inside(data: bytes, *path: bytes) -> bytes:
    """Content of a box inside other boxes, found by the kinds of all of them from outside in."""
    for kind in path:
        data = dict(boxes(data)).get(kind, b"")
    if not data:
        raise VideoError("it was not made by this program")
    return data


def _with_duration(content: bytes, place: int, duration: int) -> bytes:
    """Header with a duration at a place; one too long for 32 bits is marked unknown, and players count the frames."""
    return content[:place] + min(duration, _MAX_UINT32).to_bytes(4, "big") + content[place + 4 :]


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    while size:
        data = source.read(min(size, _COPY_BYTES))
        if not data:
            raise VideoError("it was cut off while it was read")
        target.write(data)
        size -= len(data)
