"""Which rows are measured, and that memory is flat in the number of frames."""

from __future__ import annotations

import argparse
import json
import mmap
from pathlib import Path

import pytest

from benchmarks import vae_decode as bench
from tests.pipelines import tiny_model as tiny


def test_rows_are_all_combinations_without_tiles_that_hold_the_frame() -> None:
    rows = [
        (c.num_frames, c.chunk, c.micro_batch, c.tile)
        for c in bench.cases([(17, 64, 96), (34, 256, 64)], [17, 9], [4], [None, 96, 128])
    ]
    assert rows == [
        (17, 17, 4, None),
        (17, 9, 4, None),
        (34, 17, 4, None),
        (34, 17, 4, 96),
        (34, 17, 4, 128),
        (34, 9, 4, None),
        (34, 9, 4, 96),
        (34, 9, 4, 128),
    ]


def test_sizes_and_tiles_are_read_or_refused() -> None:
    assert bench.parse_size("51x256x128") == (51, 256, 128)
    assert (bench.parse_tile("none"), bench.parse_tile("64")) == (None, 64)
    for wrong in ("17x128", "0x8x8", "axbxc"):
        with pytest.raises(argparse.ArgumentTypeError, match="FRAMESxHEIGHTxWIDTH"):
            bench.parse_size(wrong)
    with pytest.raises(argparse.ArgumentTypeError, match="pixels or none"):
        bench.parse_tile("big")


def test_the_peak_holds_what_was_there_for_a_moment() -> None:
    before = bench.resident_mib("VmHWM")
    idle = bench.resident_mib("VmRSS")
    block = mmap.mmap(-1, 64 * bench.MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # past any allocator
    for page in range(0, len(block), mmap.PAGESIZE):
        block[page] = 1
    held = bench.resident_mib("VmRSS")
    block.close()
    assert held - idle == pytest.approx(64, abs=8)
    assert bench.resident_mib("VmHWM") >= max(before, held) - 1


@pytest.mark.slow
def test_memory_of_a_stream_is_flat_in_the_number_of_frames(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.make_tiny_model(tmp_path / "tiny")
    options = ["--size", "51x128x128", "--size", "408x128x128", "--threads", "1", "--blend-frames", "2"]
    bench.main(["--model", str(folder), *options, "--json", str(tmp_path / "out.json")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[1:]] == ["size", "---", "51x128x128", "408x128x128"]
    few, many = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert few["peak_mib"] > few["idle_mib"] > 50
    assert few["seconds"] > 0
    # 357 more frames would weigh 67 MiB; their latents weigh 0.5.
    assert many["peak_mib"] - many["idle_mib"] < few["peak_mib"] - few["idle_mib"] + 15
