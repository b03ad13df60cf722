"""What the seams are measured on, and that the figures are those of the packaged VAE."""

from __future__ import annotations

import json
import math
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import vae_seams as bench
from tests.pipelines import tiny_model as tiny


def moving(num_frames: int, jump_at: int | None = None) -> Tensor:
    """(1, 3, pT, 4, 4): brightness rises by 0.01 a frame, and by 0.03 more at `jump_at`."""
    steps = torch.full((num_frames,), 0.01)
    if jump_at is not None:
        steps[jump_at] += 0.03
    return steps.cumsum(0).view(1, 1, -1, 1, 1).expand(1, 3, -1, 4, 4)


def test_a_jump_at_the_border_is_measured_there_alone() -> None:
    clip = moving(34)
    made = moving(34, jump_at=17)
    figures = bench.measure_seams(made, clip, [17])
    assert figures.seam == pytest.approx(4.0, rel=1e-4)
    # Half of the frames, and half of those near the border, are off by 0.03 in a range of 2.
    expected = 10 * math.log10(4 / (0.03**2 / 2))
    assert (figures.psnr, figures.psnr_borders) == pytest.approx((expected, expected), abs=1e-3)
    assert bench.measure_seams(clip, clip, [17]).seam == pytest.approx(1.0, rel=1e-4)


def test_a_border_at_the_end_of_a_clip_has_fewer_frames_near_it() -> None:
    clip, made = moving(18), moving(18, jump_at=17)
    assert bench.chunk_borders(18, 17) == [17]
    expected = 10 * math.log10(4 / (0.03**2 / 3))
    assert bench.measure_seams(made, clip, [17]).psnr_borders == pytest.approx(expected, abs=1e-3)


def test_takes_keep_still_at_borders_unless_they_move() -> None:
    clips = bench.shapes_clips(2, 51, 32, 48)
    assert clips.shape == (2, 3, 51, 32, 48)
    assert bench.measure_seams(clips, clips, [17, 34]).seam == pytest.approx(1.0, abs=0.25)


def test_video_files_are_measured_from_their_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (20, 32, 48, 3), dtype=np.uint8)
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "bgr0"
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    clips = bench.file_clips([path], 19, 32, 48)
    torch.testing.assert_close((clips[0].permute(1, 2, 3, 0) + 1) * 127.5, torch.from_numpy(frames[:19]).float())
    folder = tiny.make_tiny_model(tmp_path / "tiny")
    size = ["--frames", "19", "--height", "32", "--width", "48", "--blend-frames", "0", "2"]
    bench.main(["--model", str(folder), "--video", str(path), *size, "--json", str(tmp_path / "out.json")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 video files, 19x32x48, tile none, model tiny"
    assert [line.split("|")[1].strip() for line in lines[3:]] == ["clips", "blend 0", "blend 2"]
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]
    assert figures["blend 0"]["seam"] != figures["blend 2"]["seam"]


def test_clips_of_one_chunk_end_in_one_line() -> None:
    with pytest.raises(SystemExit, match=r"frames.*chunk"):
        bench.main(["--takes", "1", "--frames", "17"])


@pytest.mark.slow
def test_blending_takes_the_seams_of_the_packaged_vae_away() -> None:
    vae = bench.load_component(bench.VideoVAE, bench.find_model("shapes") / "vae").eval()
    figures = bench.measure(vae, bench.shapes_clips(4, 51, 64, 64), [0, 2])
    assert figures["blend 0"].seam > 1.2
    assert 0.8 < figures["blend 2"].seam <= 1.1
    assert figures["blend 2"].psnr > figures["blend 0"].psnr - 0.3
