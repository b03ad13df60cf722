"""Video files are made here, written to disk and read back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from arlon.data.video_io import (
    Fragment,
    VideoError,
    VideoWriter,
    encode_fragment,
    hash_frames,
    probe,
    read_tags,
    read_video,
)
from arlon.files import hash_bytes
from tests.arlon.data.clips import CRF, HEIGHT, WIDTH, frame_numbers, make_clip, write_clip


@pytest.mark.parametrize("fps", [8, 24, 29.97, 23.976])
def test_chunks_come_back_as_one_evenly_timed_video(tmp_path: Path, fps: float) -> None:
    path = write_clip(tmp_path / "a.mp4", 17, 34, 1, 5, fps=fps)
    info = probe(path)
    assert (info.width, info.height, info.num_frames, info.codec) == (WIDTH, HEIGHT, 57, "h264")
    assert info.fps == pytest.approx(fps, rel=1e-4)
    assert info.duration_s == pytest.approx(57 / fps, rel=1e-4)
    with av.open(str(path)) as container:
        pts = [frame.pts for frame in container.decode(video=0)]
    assert len(pts) == 57
    assert len(set(np.diff(pts))) == 1


def test_colours_survive_the_round_trip(tmp_path: Path) -> None:
    frames = make_clip(9)
    read = read_video(write_clip(tmp_path / "a.mp4", 9))
    error = np.abs(read[:, 4:-4, 4:20].astype(int) - frames[:, 4:-4, 4:20].astype(int))
    assert read.dtype == np.uint8
    assert error.max() <= 4  # 8-bit yuv420p, away from the colour edge


def test_start_and_num_frames_select(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", 30)
    assert frame_numbers(read_video(path, start=7, num_frames=4)) == [7, 8, 9, 10]
    assert frame_numbers(read_video(path, start=27)) == [27, 28, 29]


@pytest.mark.parametrize(("fps", "start", "count"), [(8, 0, 10), (8, 4, 5), (12, 3, 9), (5, 2, 4), (30, 7, 20)])
def test_resampling_shows_the_picture_on_screen(tmp_path: Path, fps: int, start: int, count: int) -> None:
    path = write_clip(tmp_path / "a.mp4", 17, 17, 14, fps=24)
    expected = [i * 24 // fps for i in range(start, start + count)]
    assert frame_numbers(read_video(path, start=start, num_frames=count, fps=fps)) == expected


def test_resampling_keeps_the_length(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", 48, fps=24)
    assert len(read_video(path, fps=8)) == 16
    assert len(read_video(path, fps=24)) == 48
    assert len(read_video(path, fps=48)) == 96


def test_growing_film_plays_after_every_chunk(tmp_path: Path) -> None:
    path = tmp_path / "film.partial.mp4"
    with VideoWriter(path, fps=8, crf=CRF) as writer:
        for done in (17, 34, 51):
            writer.append(make_clip(17, done - 17))
            assert frame_numbers(read_video(path)) == list(range(done))


def test_film_is_the_same_from_stored_fragments(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", fps=8, crf=CRF) as writer:
        fragments = [writer.append(make_clip(n)) for n in (17, 34)]
    with VideoWriter(tmp_path / "b.mp4", fps=8, crf=CRF) as writer:
        for fragment in fragments:
            writer.append_fragment(fragment)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_fragment_does_not_depend_on_its_place_and_plays_alone(tmp_path: Path) -> None:
    alone = encode_fragment(make_clip(17), fps=8, crf=CRF)
    with VideoWriter(tmp_path / "a.mp4", fps=8, crf=CRF) as writer:
        writer.append(make_clip(34))
        assert writer.append(make_clip(17)).data == alone.data
    (tmp_path / "alone.mp4").write_bytes(alone.data)
    assert frame_numbers(read_video(tmp_path / "alone.mp4")) == list(range(17))


def make_noise(height: int, width: int, num_frames: int = 34) -> np.ndarray:
    """Coarse blocks that move sideways under noise: frames whose blocks are worth different numbers of bits."""
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 180, (height // 8, width // 8, 3)).repeat(8, axis=0).repeat(8, axis=1)
    frames = np.stack([np.roll(blocks, 3 * number, axis=1) for number in range(num_frames)])
    return (frames + rng.normal(20, 8, frames.shape)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 64), (128, 128), (64, 208)])
def test_bytes_do_not_depend_on_the_processor(height: int, width: int) -> None:
    """x264 writes the same without any code for special processors; rows are of 2, 4, 8 and 13 blocks."""
    frames = make_noise(height, width)
    expected = encode_fragment(frames, fps=8, crf=16, x264_params="asm=0")
    assert encode_fragment(frames, fps=8, crf=16).data == expected.data


PRINT_HASH = """
from arlon.data.video_io import encode_fragment
from arlon.files import hash_bytes
from tests.arlon.data.test_video_io import make_noise
print(hash_bytes(encode_fragment(make_noise(240, 208, 9), fps=8, crf=16).data))
"""


def test_bytes_do_not_depend_on_what_memory_held_before() -> None:
    """A process in which glibc fills new memory: an encoder that reads it before writing it gives other bytes there."""
    expected = hash_bytes(encode_fragment(make_noise(240, 208, 9), fps=8, crf=16).data)
    done = subprocess.run(
        [sys.executable, "-c", PRINT_HASH],
        env={**os.environ, "MALLOC_PERTURB_": "1"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        check=True,
        text=True,
    )
    assert done.stdout.strip() == expected


def test_still_pictures_have_the_bytes_of_films_before_the_encoder_was_made_repeatable() -> None:
    frames = np.zeros((17, 64, 128, 3), np.uint8)
    frames[:, 16:48, 32:80] = (200, 60, 30)
    assert encode_fragment(frames, fps=8, crf=16).data == encode_fragment(frames, fps=8, crf=16, x264_params="").data


def test_the_hash_of_frames_tells_content_and_shape() -> None:
    frames = make_clip(3)
    assert hash_frames(frames) == hash_frames(np.asfortranarray(frames.copy()))
    assert hash_frames(frames) != hash_frames(frames.reshape(3, WIDTH, HEIGHT, 3))
    changed = frames.copy()
    changed[1, 2, 3, 0] += 1
    assert hash_frames(changed) != hash_frames(frames)


def test_interrupted_film_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """The stored bytes of the first two chunks, then two new chunks in a new process's writer."""
    tags = {"title": "eins"}
    with VideoWriter(tmp_path / "whole.mp4", fps=24, crf=CRF, tags=tags) as writer:
        stored = [writer.append(make_clip(n, writer.num_frames)).data for n in (17, 1, 34, 5)]
    with VideoWriter(tmp_path / "resumed.mp4", fps=24, crf=CRF, tags=tags) as writer:
        for data in stored[:2]:
            writer.append_fragment(Fragment(data=data))
        assert writer.num_frames == 18
        writer.append(make_clip(34, 18))
        writer.append(make_clip(5, 52))
    assert (tmp_path / "resumed.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_fragment_serves_films_with_other_tags(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", fps=8, crf=CRF, tags={"title": "a"}) as writer:
        fragment = writer.append(make_clip(17))
    with VideoWriter(tmp_path / "b.mp4", fps=8, crf=CRF, tags={"title": "b", "more": "c"}) as writer:
        writer.append_fragment(fragment)
    assert read_tags(tmp_path / "a.mp4")["title"] == "a"
    assert {"title": "b", "more": "c"}.items() <= read_tags(tmp_path / "b.mp4").items()
    assert b"Lavf" not in (tmp_path / "b.mp4").read_bytes()


def test_stored_bytes_that_are_no_whole_fragment_are_refused(tmp_path: Path) -> None:
    data = encode_fragment(make_clip(5), fps=8, crf=CRF).data
    with VideoWriter(tmp_path / "a.mp4", fps=8) as writer:
        for damaged in (data[:-1], data[:500], data + data, b"no video", b""):
            with pytest.raises(VideoError, match=r"cut off|not one whole fragment"):
                writer.append_fragment(Fragment(data=damaged))
    assert not (tmp_path / "a.mp4").read_bytes()


def test_tags_are_stored(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", 5, tags={"arlon": '{"seed": 7, "prompt": "ein Käse"}'})
    assert probe(path).tags["arlon"] == '{"seed": 7, "prompt": "ein Käse"}'


def test_cut_off_film_plays_up_to_its_last_whole_fragment(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", 17, 17, 17)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - 100])
    assert frame_numbers(read_video(path, num_frames=34)) == list(range(34))
    with pytest.raises(VideoError, match="cut off"):
        read_video(path)


def test_film_cut_off_anywhere_plays_its_whole_fragments(tmp_path: Path) -> None:
    path, whole_at = tmp_path / "a.mp4", {}
    with VideoWriter(path, fps=8, crf=CRF, tags={"title": "cut"}) as writer:
        for length in (17, 1, 9, 12):
            writer.append(make_clip(length, writer.num_frames))
            whole_at[path.stat().st_size] = writer.num_frames
    data, first = path.read_bytes(), min(whole_at)
    moof = {size + step for size in whole_at if size < len(data) for step in range(0, 130, 9)}
    around = {size + step for size in whole_at for step in (-1, 0, 1, 8)} | moof
    for cut in sorted({*range(first, len(data), 211), *around}):
        path.write_bytes(data[:cut])
        whole = max((frames for size, frames in whole_at.items() if size <= cut), default=0)
        assert read_tags(path)["title"] == "cut"
        if whole:
            assert frame_numbers(read_video(path, num_frames=whole)) == list(range(whole))


def test_rotated_file_is_read_upright(tmp_path: Path) -> None:
    """A phone stores landscape frames and a matrix in `tkhd` (here: a quarter turn) that players obey."""
    path = write_clip(tmp_path / "a.mp4", 3)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    quarter_turn = (0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000)  # clockwise on screen
    data[matrix : matrix + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in quarter_turn)
    path.write_bytes(data)
    info, frames = probe(path), read_video(path)
    assert (info.width, info.height) == (HEIGHT, WIDTH)
    assert frames.shape == (3, WIDTH, HEIGHT, 3)
    assert frames[0, 4, 16, 1] > 150  # the green left half is now on top
    assert frames[0, -4, 16, 1] < 50


@pytest.mark.parametrize("content", [b"", b"just text", bytes(4096)])
def test_other_files_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.mp4"
    path.write_bytes(content)
    for read in (probe, read_video):
        with pytest.raises(VideoError, match=r"cannot read '.*x\.mp4' as video"):
            read(path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such video file"):
        probe(tmp_path / "none.mp4")


def test_sound_without_pictures_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(VideoError, match=r"no video stream \(streams: audio\)"):
        probe(path)


def test_a_frame_that_the_decoder_makes_up_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    frames = np.random.default_rng(0).integers(0, 256, (6, 32, 48, 3), dtype=np.uint8)
    with VideoWriter(path, fps=8, crf=20) as writer:
        writer.append(frames)
    data = bytearray(path.read_bytes())
    hole = slice(len(data) * 6 // 10, len(data) * 65 // 100)
    data[hole] = b"\xff" * len(data[hole])
    path.write_bytes(data)
    with pytest.raises(VideoError, match="frame 3 is damaged"):
        read_video(path)
    assert len(read_video(path, num_frames=3)) == 3


def test_too_short_a_file_says_how_many_frames_it_has(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", 5)
    with pytest.raises(VideoError, match=r"8 frames.*frame 2.*3"):
        read_video(path, start=2, num_frames=8)


@pytest.mark.parametrize("arguments", [{"start": -1}, {"num_frames": 0}, {"fps": 0.0}, {"fps": float("nan")}])
def test_bad_ranges_are_refused(tmp_path: Path, arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="read_video needs"):
        read_video(tmp_path / "a.mp4", **arguments)


def test_odd_sizes_and_wrong_types_are_refused() -> None:
    with pytest.raises(VideoError, match="even height and width"):
        encode_fragment(np.zeros((2, 31, 48, 3), np.uint8), fps=8, crf=CRF)
    with pytest.raises(VideoError, match=r"uint8 of shape \(pT, pH, pW, 3\)"):
        encode_fragment(np.zeros((2, 32, 48, 3), np.float32), fps=8, crf=CRF)


def test_fragment_of_another_size_is_refused(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", fps=8, crf=CRF) as writer:
        writer.append(make_clip(3))
        with pytest.raises(VideoError, match="other settings"):
            writer.append(np.zeros((3, 64, 64, 3), np.uint8))
