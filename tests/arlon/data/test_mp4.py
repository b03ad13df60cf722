"""Films change their shape; FFmpeg, which knows nothing of this code, reads them back."""

from __future__ import annotations

import errno
import io
import tracemalloc
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
import pytest

from arlon.data import mp4
from arlon.data.mp4 import VideoError, flatten
from arlon.data.video_io import VideoWriter, encode_fragment, read_tags
from tests.arlon.data.clips import CRF, frame_numbers, make_clip, write_clip

LENGTHS = (17, 34, 34, 1, 5)


def finished(path: Path) -> bytes:
    target = io.BytesIO()
    with path.open("rb") as source:
        flatten(source, target)
    return target.getvalue()


def packets(film: bytes) -> list[tuple[bytes, Fraction, Fraction, bool]]:
    """Encoded frames with their times (s), durations (s) and whether one can start there, as FFmpeg reads them."""
    with av.open(io.BytesIO(film)) as container:
        stored = [p for p in container.demux(video=0) if p.size]
        return [(bytes(p), p.pts * p.time_base, p.duration * p.time_base, p.is_keyframe) for p in stored]


def decoded(film: bytes) -> list[int]:
    """Which frames of `make_clip` a film shows; as many as can be decoded."""
    numbers = []
    with av.open(io.BytesIO(film)) as container, suppress(av.error.FFmpegError):
        for frame in container.decode(video=0):
            numbers += frame_numbers(frame.to_ndarray(format="rgb24")[None])
    return numbers


@pytest.mark.parametrize("fps", [8, 24, 29.97])
def test_finished_film_has_the_same_frames_at_the_same_times(tmp_path: Path, fps: float) -> None:
    path = write_clip(tmp_path / "a.mp4", *LENGTHS, fps=fps)
    film = finished(path)
    assert packets(film) == packets(path.read_bytes())
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(io.BytesIO(film)) as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.average_rate) == (sum(LENGTHS), rate)
        assert stream.duration * stream.time_base == sum(LENGTHS) / rate
        assert container.duration / 1e6 == pytest.approx(float(sum(LENGTHS) / rate), abs=2e-3)
    assert decoded(film) == [n % 64 for n in range(sum(LENGTHS))]


def test_finished_film_begins_with_its_index(tmp_path: Path) -> None:
    kinds = [kind for kind, _ in mp4.boxes(finished(write_clip(tmp_path / "a.mp4", 17, 5)))]
    assert kinds == [b"ftyp", b"moov", b"mdat"]


def test_finished_film_can_be_sought_in(tmp_path: Path) -> None:
    film = finished(write_clip(tmp_path / "a.mp4", *LENGTHS))
    starts = [round(time * 8) for _, time, _, is_keyframe in packets(film) if is_keyframe]
    assert set(starts) >= {0, 17, 51, 85, 86}
    with av.open(io.BytesIO(film)) as container:
        stream = container.streams.video[0]
        for wanted in (90, 0, 16, 17, 18, 50, 51, 84, 85, 86):
            container.seek(int(wanted / 8 / stream.time_base), stream=stream)
            first = next(container.decode(stream))
            assert round(first.time * 8) == max(start for start in starts if start <= wanted)


def test_places_beyond_four_gigabytes_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_clip(tmp_path / "a.mp4", *LENGTHS)
    narrow = finished(path)
    monkeypatch.setattr(mp4, "_MAX_NARROW", 1000)
    wide = finished(path)
    assert b"co64" in wide
    assert b"co64" not in narrow
    assert packets(wide) == packets(narrow)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_finished_film_cut_off_plays_what_is_there(tmp_path: Path, share: float) -> None:
    film = finished(write_clip(tmp_path / "a.mp4", *LENGTHS))
    cut = film[: int(share * len(film))]
    sizes = [len(data) for data, *_ in packets(film)]
    whole = int((len(film) - sum(sizes) + np.cumsum(sizes) <= len(cut)).sum())
    assert 0 < whole < len(sizes)
    assert decoded(cut)[: whole - 1] == [n % 64 for n in range(whole - 1)]  # decoders hold one frame back at an error


class FullDisk(io.BytesIO):
    """Takes a number of bytes and no more."""

    def __init__(self, data: bytes, room: int) -> None:
        super().__init__(data)
        self.room = room

    def write(self, data: bytes) -> int:
        done = super().write(data[: max(0, self.room - self.tell())])
        if done < len(data):
            raise OSError(errno.ENOSPC, "no space left on device")
        return done


def test_growing_film_plays_wherever_its_writing_stops(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", 17)
    data, fragment = path.read_bytes(), encode_fragment(make_clip(12, 17), fps=8, crf=CRF)
    placed = fragment.placed(number=2, start=17 * 2048)
    for written in (*range(0, 160, 7), len(placed) // 2, len(placed) - 1):  # the moof, then into the frames
        room = len(data) + written
        film = FullDisk(data, room)
        with pytest.raises(OSError, match="no space"):
            mp4.append_fragment(film, placed)
        assert len(film.getvalue()) == room
        assert decoded(film.getvalue()) == list(range(17))
    film = FullDisk(data, 1_000_000)
    mp4.append_fragment(film, placed)
    assert decoded(film.getvalue()) == list(range(29))


def test_tags_go_with_the_film(tmp_path: Path) -> None:
    tags = {"title": "ein Käse", "comment": '{"seed": 7}', "long": "x" * 3_000_000}
    path = write_clip(tmp_path / "a.mp4", 5, tags=tags)
    (tmp_path / "b.mp4").write_bytes(finished(path))
    assert tags.items() <= read_tags(path).items()
    assert tags.items() <= read_tags(tmp_path / "b.mp4").items()


def test_film_without_tags_has_none(tmp_path: Path) -> None:
    film = finished(write_clip(tmp_path / "a.mp4", 5))
    with av.open(io.BytesIO(film)) as container:
        assert set(container.metadata) <= {"major_brand", "minor_version", "compatible_brands"}
    assert b"udta" not in film


@pytest.mark.parametrize("cut", [0, 5, 300, 900, -1, -100])
def test_cut_off_film_is_not_finished(tmp_path: Path, cut: int) -> None:
    data = write_clip(tmp_path / "a.mp4", 17, 5).read_bytes()
    with pytest.raises(VideoError, match="cut off"):
        flatten(io.BytesIO(data[:cut]), io.BytesIO())


def test_other_files_are_not_finished(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        container.mux(stream.encode(av.VideoFrame(32, 32, "yuv420p")))
        container.mux(stream.encode(None))
    for data in (buffer.getvalue(), b"just text, longer than a box", bytes(4096)):
        with pytest.raises(VideoError, match=r"not made by this program|cut off|do not fit"):
            flatten(io.BytesIO(data), io.BytesIO())


def test_frames_out_of_order_are_refused() -> None:
    """A film with B-frames, in fragments, as another program may write it."""
    buffer = io.BytesIO()
    with av.open(
        buffer, "w", format="mp4", options={"movflags": "frag_keyframe+empty_moov+default_base_moof"}
    ) as container:
        stream = container.add_stream("libx264", rate=8, options={"bf": "2"})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for rgb in make_clip(12):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        container.mux(stream.encode(None))
    with pytest.raises(VideoError, match="another kind than this program writes"):
        flatten(buffer, io.BytesIO())


class Sink(io.RawIOBase):
    """Keeps nothing but the count."""

    size = 0

    def write(self, data: bytes) -> int:
        self.size += len(data)
        return len(data)


def test_memory_does_not_grow_with_the_film(tmp_path: Path) -> None:
    """Noise at 30 kB a frame: 16 times the film may take some bytes a frame more, not its megabytes."""
    noise = np.random.default_rng(0).integers(0, 255, (8, 128, 192, 3), np.uint8)
    fragment = encode_fragment(noise, fps=8, crf=4, preset="ultrafast")
    path = tmp_path / "a.mp4"
    with VideoWriter(path, fps=8) as writer:
        for _ in range(4):
            writer.append_fragment(fragment)
        short = peak_memory(path.open("rb"))
        for _ in range(60):
            writer.append_fragment(fragment)
    long = peak_memory(path.open("rb"))
    assert path.stat().st_size > 16e6
    assert long < short + 100e3


def peak_memory(source: BinaryIO) -> int:
    tracemalloc.start()
    with source:
        flatten(source, Sink())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak
