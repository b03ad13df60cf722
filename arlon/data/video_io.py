"""Reading and writing video files with PyAV.

Frames are uint8 arrays (pT, pH, pW, 3), RGB, 0..255. Films are written as fragmented H.264 MP4: one self-contained
fragment per chunk of frames, each with its own encoder run. So a chunk encodes to the same bytes anywhere in a film, a
film that is still growing or was cut off plays up to its last whole fragment, and a film can be assembled again from
stored fragments without encoding anything.

A fragment consists of ftyp and moov (the head, equal for equal settings), then moof and mdat (the frames). A film has
the head once, with the film's tags; each moof gets its number and its start time. See `arlon.data.mp4` for the boxes,
and for the layout of a film that is complete.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import numpy as np

from arlon.data import mp4
from arlon.errors import VideoError

MAX_FPS = 1000
"""Highest frame rate that is read or written, frames a second."""
_FRAGMENT_FLAGS = "frag_custom+empty_moov+default_base_moof"
_BT709 = 1  # the number ITU-T H.273 gives to BT.709 primaries, transfer and matrix alike
_LIMITED_RANGE = 1
REPEATABLE = "cpu-independent=1"
"""Options of x264 with which the same YUV frames give the same bytes in every process and on every processor.

To distribute bits, x264 sums up how much later frames rely on each macroblock. Its AVX-512 code for that handles eight
macroblocks at a time; unless their number in a row is a multiple of eight, it also reads memory behind the row that was
never written, and the bytes of the film depend on what happens to be there. With this option x264 does that one sum in
portable code and everything else as before.
"""
_ONE_GOP = 1_000_000  # frames between keyframes: never inside a chunk, every chunk starts with one


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """Size, rate, length, codec and tags of a video file."""

    width: int
    """Width in pixels, after the rotation the file asks for."""
    height: int
    """Height in pixels, after the rotation the file asks for."""
    fps: float
    """Average frame rate, frames a second."""
    num_frames: int
    """Number of frames, counted in the file; headers may claim another."""
    duration_s: float
    """Length in seconds, `num_frames / fps`."""
    codec: str
    """Name of the video codec, such as `h264`."""
    tags: dict[str, str] = field(default_factory=dict)
    """Text tags of the container, by name."""


def probe(path: str | Path) -> VideoInfo:
    """Describe a video file without decoding more than its first frame.

    Raises:
        FileNotFoundError: If there is no such file.
        VideoError: If the file is not a readable video.
    """
    with _open_video(path) as container:
        stream = container.streams.video[0]
        tags = dict(container.metadata)
        first = next(container.decode(stream), None)
        if first is None:
            raise VideoError("it holds no frame")
        container.seek(0)
        num_frames = sum(packet.size > 0 for packet in container.demux(stream))
        fps = _stream_fps(stream)
        width, height = first.width, first.height
        if first.rotation % 180:
            width, height = height, width
        codec = stream.codec_context.name
    return VideoInfo(
        width=width,
        height=height,
        fps=fps,
        num_frames=num_frames,
        duration_s=num_frames / fps,
        codec=codec,
        tags=tags,
    )


def read_tags(path: str | Path) -> dict[str, str]:
    """Read the text tags of a video file, which may still grow or be cut off.

    Raises:
        FileNotFoundError: If there is no such file.
        VideoError: If the file is not a readable video.
    """
    with _open_video(path) as container:
        return dict(container.metadata)


def read_video(
    path: str | Path, *, start: int = 0, num_frames: int | None = None, fps: float | None = None
) -> np.ndarray:
    """Decode frames of a video file.

    With `fps`, output frame i is the picture on screen at time i / fps: a file of 24 fps read at 8 fps gives every
    third frame, and a file of uneven timing is read by the clock. Without `fps`, frames come as they are stored.

    Args:
        path: The file.
        start: First frame wanted, counted at the output rate.
        num_frames: Frames wanted, or None for all the rest.
        fps: Output rate in frames a second, or None for the file's own frames.

    Returns:
        Frames (pT, pH, pW, 3), uint8 RGB.

    Raises:
        FileNotFoundError: If there is no such file.
        VideoError: If the file is not a readable video, is damaged before the last wanted frame, or is too short.
        ValueError: If an argument is out of range.
    """
    if start < 0 or (num_frames is not None and num_frames < 1):
        raise ValueError(f"read_video needs start >= 0 and num_frames >= 1, got {start} and {num_frames}")
    if fps is not None and not 0 < fps <= MAX_FPS:
        raise ValueError(f"read_video needs 0 < fps <= {MAX_FPS}, got {fps}")
    stop = None if num_frames is None else start + num_frames
    with _open_video(path) as container:
        pictures = _stored_frames(container) if fps is None else _frames_by_clock(container, fps, start)
        frames = []
        for index, frame in pictures:
            if frame.is_corrupt:  # a decoder makes up what it cannot read
                raise VideoError(f"frame {index} is damaged")
            if index >= start:
                frames.append(_to_rgb(frame))
            if stop is not None and index + 1 >= stop:
                break
        if not frames or (num_frames is not None and len(frames) < num_frames):
            wanted = f"{num_frames or 'any'} frames from frame {start} on"
            raise VideoError(f"{wanted} were asked for, but it has {len(frames)} of them")
        return np.stack(frames)


@contextmanager
def _open_video(path: str | Path) -> Iterator[av.container.InputContainer]:
    """Open a file for reading, and turn every error of the `with` block into one VideoError that names the file."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such video file: '{path}'")
    try:
        with _open_container(path) as container:
            if not container.streams.video:
                kinds = ", ".join(sorted({stream.type for stream in container.streams}))
                raise VideoError(f"no video stream (streams: {kinds or 'none'})")
            container.streams.video[0].codec_context.thread_count = 1
            yield container
    except VideoError as error:
        raise VideoError(f"cannot read '{path}' as video: {error}") from None
    except (av.error.FFmpegError, OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise VideoError(
            f"cannot read '{path}' as video: {reason.lower()} (not a video, damaged or cut off)"
        ) from error


def _open_container(path: Path) -> av.container.InputContainer:
    """Open a file; if FFmpeg refuses it because it was cut off inside a moof, open the whole boxes before that."""
    try:
        return av.open(str(path))
    except av.error.FFmpegError:
        with path.open("rb") as file:
            end = mp4.whole_length(file)
        if not 0 < end < path.stat().st_size:
            raise
        return av.open(f"subfile,,start,0,end,{end},,:{path}")


def _stream_fps(stream: av.video.stream.VideoStream) -> float:
    rate = stream.average_rate or stream.guessed_rate or stream.base_rate
    if not rate:
        raise VideoError("its frame rate is unknown")
    return float(rate)


def _stored_frames(container: av.container.InputContainer) -> Iterator[tuple[int, av.VideoFrame]]:
    yield from enumerate(container.decode(container.streams.video[0]))


def _frames_by_clock(
    container: av.container.InputContainer, fps: float, start: int
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Pairs (output index, picture on screen at index / fps), from index `start` on."""
    stream = container.streams.video[0]
    if not stream.time_base:
        raise VideoError("its clock is unknown")
    begin_s = float((stream.start_time or 0) * stream.time_base)
    if start:
        container.seek(int((begin_s + start / fps) / stream.time_base), stream=stream)
    index, shown, end_s = start, None, 0.0
    tolerance_s = float(stream.time_base)  # time stamps are rounded to the time base
    for frame in container.decode(stream):
        time_s = float(frame.time or 0.0) - begin_s
        while shown is not None and index / fps < time_s - tolerance_s:
            yield index, shown
            index += 1
        shown, end_s = frame, time_s + 1 / _stream_fps(stream)
    while shown is not None and index / fps < end_s - tolerance_s:
        yield index, shown
        index += 1


def _to_rgb(frame: av.VideoFrame) -> np.ndarray:
    rgb = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(rgb, round(frame.rotation / 90))) if frame.rotation else rgb


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """One encoded chunk of frames: a small MP4 that plays by itself.

    Its properties raise VideoError if the bytes are no such fragment or only a part of one.
    """

    data: bytes
    """Bytes of the MP4."""

    @property
    def num_frames(self) -> int:
        """Number of frames."""
        return len(self.samples.sizes)

    @property
    def num_ticks(self) -> int:
        """Length in ticks of the track's clock."""
        return sum(self.samples.durations)

    @property
    def head(self) -> bytes:
        """Bytes of the boxes ftyp and moov, equal for all fragments of a film."""
        return mp4.box(b"ftyp", self._boxes[b"ftyp"]) + mp4.box(b"moov", self._boxes[b"moov"])

    def placed(self, *, number: int, start: int) -> bytes:
        """Bytes of the boxes moof and mdat as part of a film.

        Args:
            number: Number of the fragment in the film, from 1.
            start: Time of its first frame, in ticks of the track's clock.
        """
        return mp4.placed(self._boxes[b"moof"], number=number, start=start) + mp4.box(b"mdat", self._boxes[b"mdat"])

    @cached_property
    def samples(self) -> mp4.Samples:
        """Size, duration and kind of each frame, read from the moof."""
        samples = mp4.read_samples(self._boxes[b"moof"])
        if sum(samples.sizes) != len(self._boxes[b"mdat"]):
            raise VideoError("these bytes are not a fragment: the frames do not fit their index")
        return samples

    @cached_property
    def _boxes(self) -> dict[bytes, bytes]:
        found = list(mp4.boxes(self.data))
        if [kind for kind, _ in found] != [b"ftyp", b"moov", b"moof", b"mdat"]:
            raise VideoError("these bytes are not one whole fragment (ftyp, moov, moof, mdat)")
        return dict(found)


def encode_fragment(
    frames: np.ndarray,
    *,
    fps: float,
    crf: int = 18,
    preset: str = "medium",
    num_threads: int = 1,
    x264_params: str = REPEATABLE,
) -> Fragment:
    """Encode a chunk of frames as one fragment: H.264, yuv420p, BT.709, without B-frames, a keyframe first.

    Args:
        frames: Frames (pT, pH, pW, 3), uint8 RGB; pH and pW must be even.
        fps: Frame rate, frames a second.
        crf: Constant rate factor of x264, 0 (lossless in yuv420p) to 51.
        preset: x264 preset, `ultrafast` to `veryslow`.
        num_threads: Number of threads of the encoder; the bytes depend on it.
        x264_params: Further options of x264, `NAME=VALUE` joined by colons; "" adds none.

    Raises:
        VideoError: If the frames have the wrong shape or type, or an odd size.
    """
    _check_frames(frames)
    rate = Fraction(fps).limit_denominator(1001)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"movflags": _FRAGMENT_FLAGS}) as container:
        options = {"crf": str(crf), "preset": preset, "bf": "0", "g": str(_ONE_GOP)}
        if x264_params:
            options["x264-params"] = x264_params
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        codec = stream.codec_context
        codec.thread_count = num_threads
        # without these, players guess the colour matrix by the size of the frames
        codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
        codec.color_range = _LIMITED_RANGE
        for index, rgb in enumerate(frames):
            container.mux(stream.encode(_to_yuv(rgb, index, rate)))
        container.mux(stream.encode(None))
    # FFmpeg's tags name its version, and its index of fragments holds for this file alone: neither is kept
    made = dict(mp4.boxes(buffer.getvalue()))
    head = mp4.with_tags(b"".join(mp4.box(kind, made[kind]) for kind in (b"ftyp", b"moov")), {})
    return Fragment(data=head + mp4.box(b"moof", made[b"moof"]) + mp4.box(b"mdat", made[b"mdat"]))


def hash_frames(frames: np.ndarray) -> str:
    """SHA-256 in hexadecimal over the type, shape and content of frames (pT, pH, pW, 3)."""
    digest = hashlib.sha256(f"{frames.dtype} {frames.shape}".encode())
    digest.update(np.ascontiguousarray(frames).data)
    return digest.hexdigest()


def _to_yuv(rgb: np.ndarray, index: int, rate: Fraction) -> av.VideoFrame:
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
    frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
    frame.pts, frame.time_base = index, 1 / rate
    return frame


def _check_frames(frames: np.ndarray) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise VideoError(
            f"frames to write must be uint8 of shape (pT, pH, pW, 3), got {frames.dtype} {tuple(frames.shape)}"
        )
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise VideoError(f"H.264 in yuv420p needs an even height and width, got {frames.shape[1:3]}")


class VideoWriter:
    """A fragmented H.264 MP4 that grows by chunks of frames.

    After every `append` the file on disk is whole and plays. The caller should write under a temporary name and rename
    the file when the film is complete. To go on with an interrupted film, start a new one and add the stored fragments
    first: it gets the bytes of a film made in one go.

    Args:
        path: The file to write; an existing one is replaced.
        fps: Frame rate, frames a second, at most `MAX_FPS`.
        crf: Constant rate factor of x264, as in `encode_fragment`.
        preset: x264 preset.
        num_threads: Number of threads of the encoder; the bytes depend on it.
        x264_params: Further options of x264, `NAME=VALUE` joined by colons; "" adds none.
        tags: Text tags of the container.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        fps: float,
        crf: int = 18,
        preset: str = "medium",
        num_threads: int = 1,
        x264_params: str = REPEATABLE,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        if not 0 < fps <= MAX_FPS:
            raise ValueError(f"a video needs 0 < fps <= {MAX_FPS}, got {fps}")
        self.num_frames = self.num_bytes = self.head_bytes = 0
        self._num_fragments = 0
        self._num_ticks = 0
        self._head = b""
        self._encode = partial(
            encode_fragment, fps=fps, crf=crf, preset=preset, num_threads=num_threads, x264_params=x264_params
        )
        self._tags = dict(tags or {})
        self._file = open(path, "wb")  # noqa: SIM115  (closed by close())

    def append(self, frames: np.ndarray) -> Fragment:
        """Encode frames (pT, pH, pW, 3), uint8 RGB, add them to the film and return the fragment."""
        fragment = self._encode(frames)
        self.append_fragment(fragment)
        return fragment

    def append_fragment(self, fragment: Fragment) -> None:
        """Add an encoded fragment to the film.

        Raises:
            VideoError: If the fragment is not whole, or was encoded with another size, rate or other settings than the
                first.
        """
        num_frames = fragment.num_frames
        placed = fragment.placed(number=self._num_fragments + 1, start=self._num_ticks)
        if not self._head:
            self._head = fragment.head
            self.head_bytes = self.num_bytes = self._file.write(mp4.with_tags(self._head, self._tags))
        elif fragment.head != self._head:
            raise VideoError("a fragment was encoded with other settings (size, fps, crf) than the first")
        mp4.append_fragment(self._file, placed)
        self.num_bytes += len(placed)
        self._num_fragments += 1
        self._num_ticks += fragment.num_ticks
        self.num_frames += num_frames

    def close(self) -> None:
        """Close the file. Nothing is added at the end, so the film may be closed after any fragment."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
