import json
import os
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from arlon.data.manifest import ManifestError, build_manifest, read_manifest, write_manifest
from arlon.data.transforms import cover_size, resize_and_crop
from arlon.data.video_clips import VideoClips
from arlon.data.video_io import VideoWriter

LEVELS = np.linspace(20, 230, 48).round().astype(np.uint8)
"""Grey level of each frame of the test video: tells which frame is which after a lossy codec."""


def write_video(path: Path, num_frames: int = 48, fps: float = 24.0, height: int = 36, width: int = 64) -> None:
    frames = np.broadcast_to(LEVELS[:num_frames, None, None, None], (num_frames, height, width, 3)).copy()
    frames[:, :, : width // 4] = 255  # cropped away by a square crop
    with VideoWriter(path, fps=fps, crf=4, preset="ultrafast") as writer:
        writer.append(frames)


def write_sound(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "clips").mkdir()
    for name in ("b", "a"):
        write_video(tmp_path / "clips" / f"{name}.mp4")
        (tmp_path / "clips" / f"{name}.txt").write_text(f"a grey\n video, named {name}\n")
    return tmp_path


def write_rows(file: Path, **changes: object) -> Path:
    row = {
        "path": "clips/a.mp4",
        "text": "grey",
        "num_frames": 48,
        "height": 36,
        "width": 64,
        "fps": 24,
    } | changes
    file.write_text(json.dumps({name: value for name, value in row.items() if value != "absent"}) + "\n")
    return file


@pytest.mark.parametrize("name", ["clips.jsonl", "clips.csv"])
def test_a_folder_becomes_a_manifest_and_is_read_back(folder, name):
    clips = build_manifest(folder)
    assert [clip.text for clip in clips] == ["a grey video, named a", "a grey video, named b"]
    assert (clips[0].num_frames, clips[0].height, clips[0].width, clips[0].fps) == (48, 36, 64, 24.0)
    write_manifest(clips, folder / name)
    assert str(folder) not in (folder / name).read_text()
    assert read_manifest(folder / name) == clips
    assert [p.name for p in folder.iterdir() if "partial" in p.name] == []


def test_a_missing_fps_is_taken_from_the_file_and_other_columns_are_kept(folder):
    path = write_rows(folder / "m.jsonl", fps="absent", aes=5.5)
    for check_files in (True, False):
        clip = read_manifest(path, check_files=check_files)[0]
        assert clip.fps == 24.0
        assert clip.extra == {"aes": 5.5}


def test_samples_are_the_frames_of_the_file_at_the_wanted_rate(folder):
    write_manifest(build_manifest(folder), folder / "m.csv")
    clips = VideoClips(folder / "m.csv", num_frames=7, height=18, width=18, fps=8)
    assert len(clips) == 2 * (16 // 7)
    for index, (name, start) in enumerate([("a", 0), ("a", 7), ("b", 0), ("b", 7)]):
        sample = clips[index]
        assert sample["caption"] == f"a grey video, named {name}"
        assert sample["fps"] == 8.0
        assert sample["video"].shape == (3, 7, 18, 18)
        assert sample["video"].dtype == torch.float32
        expected = torch.from_numpy(LEVELS[3 * start : 3 * (start + 7) : 3].astype(np.float32)) / 127.5 - 1
        # The right half: the white bar of the left quarter bleeds into the first columns of the crop at most.
        seen = sample["video"][:, :, :, 9:].mean((0, 2, 3))
        torch.testing.assert_close(seen, expected, rtol=0, atol=0.03)


def test_samples_collate_into_a_batch_and_identity_follows_the_captions(folder):
    clips = build_manifest(folder)
    data = VideoClips(clips, num_frames=17, height=16, width=24, fps=12)
    batch = next(iter(torch.utils.data.DataLoader(data, batch_size=2)))
    assert batch["video"].shape == (2, 3, 17, 16, 24)
    assert data.identity == VideoClips(clips, num_frames=17, height=16, width=24, fps=12).identity
    assert data.identity != VideoClips(clips[:1], num_frames=17, height=16, width=24, fps=12).identity


def test_clips_that_are_too_short_are_left_out_and_refused_if_all_are(folder, caplog):
    write_video(folder / "clips" / "c.mp4", num_frames=5)
    (folder / "clips" / "c.txt").write_text("short")
    clips = build_manifest(folder)
    assert len(VideoClips(clips, num_frames=48, height=8, width=8, fps=24)) == 2
    assert "1 of 3 clips are shorter than 2.00 s" in caplog.text
    with pytest.raises(ManifestError, match=r"3 clips.*49 frames.*24 fps"):
        VideoClips(clips, num_frames=49, height=8, width=8, fps=24)


def test_all_problems_of_a_manifest_are_listed(folder):
    write_sound(folder / "sound.mp4")
    (folder / "text.mp4").write_text("not a video")
    rows = [
        {"path": "clips/a.mp4", "text": "fine", "num_frames": 48, "height": 36, "width": 64, "fps": 24},
        {"path": "gone.mp4", "text": "x", "num_frames": 48, "height": 36, "width": 64},
        {"path": "text.mp4", "text": "x", "num_frames": 48, "height": 36, "width": 64},
        {"path": "sound.mp4", "text": "x", "num_frames": 48, "height": 36, "width": 64},
        {"path": "clips/a.mp4", "text": "  ", "num_frames": 49, "height": -3, "width": "wide"},
    ]
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ManifestError) as caught:
        read_manifest(folder / "m.jsonl")
    message = str(caught.value)
    for part in (
        "line 2: no such video file",
        "gone.mp4",
        "line 3: cannot read",
        "text.mp4",
        "line 4: cannot read",
        "no video stream (streams: audio)",
        "line 5: missing value or column 'text'",
        "line 5: num_frames is 49, but",
        "line 5: height must be a positive whole number, got -3",
        "line 5: width must be a positive whole number, got 'wide'",
    ):
        assert part in message
    assert "line 1:" not in message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.csv", "path,text,num_frames,width\n", "has no rows|lacks the columns? 'height'"),
        ("m.csv", "path,text,num_frames,height,width\n", "has no rows"),
        ("m.csv", "path,text,num_frames,height,width\na.mp4,one, two,3,4,5\n", "more values than columns"),
        ("m.jsonl", "", "has no rows"),
        ("m.jsonl", "\n{oops\n[1]\n", "2 problems:\n  line 2: not JSON.*\n  line 3: expected one object"),
        ("m.csv", "path,text,num_frames,height,width\na.mp4," + 200000 * "x" + ",3,4,5\n", "is not CSV: field larger"),
        ("m.jsonl", 100000 * "[", "line 1: not JSON: maximum recursion depth"),
        ("m.parquet", "x", "must end in .jsonl or .csv, got '.parquet'"),
    ],
)
def test_a_broken_manifest_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ManifestError, match=message):
        read_manifest(tmp_path / name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": float("nan")}, "text must be text that UTF-8 can hold, got nan"),
        ({"text": ["a"]}, r"text must be text that UTF-8 can hold, got \['a'\]"),
        ({"text": "\ud83d"}, "text must be text that UTF-8 can hold"),
        ({"path": 5}, "path must be text that UTF-8 can hold, got 5"),
        ({"path": "a" * 5000}, "File name too long"),
        ({"num_frames": float("nan")}, r"1 problem:\n  line 1: num_frames must be a positive whole number, got nan"),
        ({"num_frames": 10**400}, "num_frames must be a positive whole number"),
        ({"num_frames": True}, "num_frames must be a positive whole number, got True"),
        ({"fps": 1e-9}, "fps must be a number from 0.01 to 1000, got 1e-09"),
        ({"fps": 1e9}, "fps must be a number from 0.01 to 1000"),
        ({"fps": 240}, "fps is 240, but .*a.mp4' has 24"),
    ],
)
def test_absurd_values_are_one_problem_each(folder, changes, message):
    with pytest.raises(ManifestError, match=message) as caught:
        read_manifest(write_rows(folder / "m.jsonl", **changes))
    assert "has 1 problem:" in str(caught.value)


def test_rows_that_repeat_a_file_and_its_caption_are_left_out_and_counted(folder, caplog):
    rows = [
        {"path": path, "text": text, "num_frames": 48, "height": 36, "width": 64}
        for path in ("clips/b.mp4", "clips/a.mp4", str(folder / "clips" / "b.mp4"), "clips/../clips/a.mp4")
        for text in ("grey", "a ramp")
    ]
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [(clip.path.name, clip.text) for clip in read_manifest(folder / "m.jsonl")]
    assert found == [(name, text) for name in ("b.mp4", "a.mp4") for text in ("grey", "a ramp")]
    assert "4 of 8 rows of" in caplog.text


def test_a_file_name_that_is_not_utf8_is_refused_or_left_out(folder):
    odd = os.fsencode(folder / "clips") + b"/\xff"
    try:
        shutil.copy(folder / "clips" / "a.mp4", odd + b".mp4")
    except OSError:
        pytest.skip("the file system takes names in UTF-8 only")
    Path(os.fsdecode(odd + b".txt")).write_text("odd")
    with pytest.raises(ManifestError, match="has a name that is not UTF-8: rename it"):
        build_manifest(folder)
    write_manifest(build_manifest(folder, skip_bad=True), folder / "m.jsonl")
    assert len(read_manifest(folder / "m.jsonl")) == 2


def test_a_manifest_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "m.csv").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ManifestError, match="not UTF-8"):
        read_manifest(tmp_path / "m.csv")
    with pytest.raises(FileNotFoundError, match="no such manifest"):
        read_manifest(tmp_path / "none.csv")


def test_a_folder_with_bad_files_is_refused_or_cleared_of_them(folder, caplog):
    (folder / "bad.mp4").write_text("not a video")
    (folder / "bad.txt").write_text("a caption")
    write_video(folder / "silent.mp4", num_frames=2)
    with pytest.raises(ManifestError, match=r"(?s)2 problems:.*bad.mp4.*silent.mp4' has no caption.*silent.txt"):
        build_manifest(folder)
    assert len(build_manifest(folder, skip_bad=True)) == 2
    assert "bad.mp4" in caplog.text
    (folder / "empty").mkdir()
    with pytest.raises(ManifestError, match="holds no usable video or picture"):
        build_manifest(folder / "empty")


def write_pictures(folder: Path) -> None:
    """Pictures of 12 x 20 pixels, the left half dark; two of them broken."""
    folder.mkdir()
    pixels = np.full((12, 20, 3), 200, np.uint8)
    pixels[:, :10] = 40
    picture = Image.fromarray(pixels)
    exif = picture.getexif()
    exif[0x112] = 6  # the camera was held upright
    for name in ("a.png", "b.jpg", "c.webp"):
        picture.save(folder / name, quality=95)
    picture.save(folder / "d.jpeg", quality=95, exif=exif)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:-500])
    (folder / "text.png").write_text("no picture")
    for path in list(folder.iterdir()):
        path.with_suffix(".txt").write_text(path.name)


def test_pictures_of_a_folder_are_clips_of_one_frame_and_broken_ones_are_counted(tmp_path, caplog):
    write_pictures(tmp_path / "shots")
    with pytest.raises(ManifestError, match=r"(?s)2 problems:.*'.*cut.jpg' as picture: .*'.*text.png' as picture: "):
        build_manifest(tmp_path)
    clips = build_manifest(tmp_path, skip_bad=True)
    assert [clip.text for clip in clips] == ["a.png", "b.jpg", "c.webp", "d.jpeg"]
    assert [(c.num_frames, c.height, c.width, c.fps) for c in clips] == [(1, 12, 20, 120.0)] * 3 + [(1, 20, 12, 120.0)]
    assert "2 of 6 files below" in caplog.text
    for clip in clips:
        frames = clip.read(start=0, num_frames=1, fps=None)
        dark, light = (frames[0, :9], frames[0, 11:]) if clip.height == 20 else (frames[0, :, :9], frames[0, :, 11:])
        assert (frames.shape, frames.dtype) == ((1, clip.height, clip.width, 3), np.uint8)
        assert dark.mean() == pytest.approx(40, abs=2)
        assert light.mean() == pytest.approx(200, abs=2)
    with pytest.raises(ValueError, match=r"a\.png.*picture.*17"):
        clips[0].read(start=0, num_frames=17, fps=24)


def test_rows_of_pictures_need_no_rate_and_must_fit_their_file(tmp_path):
    write_pictures(tmp_path / "shots")
    row = {"path": "shots/a.png", "num_frames": 1, "height": 12, "width": 20}
    for fps in ("absent", "", 0, "nan"):
        for check_files in (True, False):
            path = write_rows(tmp_path / "m.jsonl", **row, fps=fps)
            assert read_manifest(path, check_files=check_files)[0].fps == 120.0
    with pytest.raises(ManifestError, match=r"(?s)num_frames is 2, but .*a\.png' has 1.*height is 13, but .* has 12"):
        read_manifest(write_rows(tmp_path / "m.jsonl", **row | {"num_frames": 2, "height": 13}))
    with pytest.raises(ManifestError, match="no such picture file"):
        read_manifest(write_rows(tmp_path / "m.jsonl", **row | {"path": "gone.webp"}))


def test_pictures_are_windows_of_one_frame_only(folder):
    write_pictures(folder / "shots")
    clips = build_manifest(folder, skip_bad=True)
    assert len(VideoClips(clips, num_frames=17, height=8, width=8, fps=24)) == 4
    single = VideoClips(clips[2:4], num_frames=1, height=12, width=20, fps=24)
    assert len(single) == 2
    assert single[0]["video"].shape == (3, 1, 12, 20)
    assert float(single[0]["video"][:, :, :, 0].mean()) == pytest.approx(40 / 127.5 - 1, abs=1e-6)


def test_resize_keeps_the_aspect_and_crops_the_centre():
    ramp = np.linspace(0, 255, 40).astype(np.uint8)
    frames = np.broadcast_to(ramp[None, None, :, None], (2, 20, 40, 3))  # grows to the right
    video = resize_and_crop(frames, height=10, width=10)
    columns = video[0, 0, 5] * 127.5 + 127.5
    # Half size, then columns 5..14 of 20: mean levels of source columns 10..29, two by two.
    expected = torch.from_numpy(ramp[10:30].reshape(10, 2).mean(1)).float()
    torch.testing.assert_close(columns, expected, rtol=0, atol=1.0)
    assert cover_size((20, 40), (10, 10)) == (10, 20)
    assert cover_size((1080, 1920), (64, 128)) == (72, 128)


def test_frames_of_the_right_size_keep_their_values_exactly():
    frames = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), dtype=np.uint8)
    video = resize_and_crop(frames, height=5, width=7)
    assert torch.equal(((video + 1) * 127.5).round().byte().permute(1, 2, 3, 0), torch.from_numpy(frames))
    with pytest.raises(ValueError, match="uint8"):
        resize_and_crop(frames.astype(np.float32), height=5, width=7)
