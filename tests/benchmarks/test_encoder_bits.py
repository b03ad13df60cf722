"""Counting of encodings that differ: the arithmetic, and a short run on the packaged model."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import encoder_bits as bench
from benchmarks.encoder_bits import DECODER, Counts, Input, count_differing, merge, report


def counts(decoded: int, slips: int) -> Counts:
    """A process that saw two clips; `slips` of the ten encodings of clip 1 with x264's own options were others."""
    return Counts(
        {
            Input(DECODER, 0): Counter(frames=decoded),
            Input("", 0): Counter(a=10),
            Input("", 1): Counter(b=10 - slips, c=slips),
            Input("safe", 0): Counter(d=10),
            Input("safe", 1): Counter(e=10),
        },
        {"": 2.0, "safe": 3.0},
    )


def test_results_that_are_not_the_most_frequent_one_of_their_clip_differ() -> None:
    results = counts(3, slips=2).results
    assert count_differing(results, "") == (2, 20)
    assert count_differing(results, "safe") == (0, 20)
    assert count_differing(results, DECODER) == (0, 3)


def test_a_process_that_always_gets_another_result_is_noticed() -> None:
    """Within each of two processes all results are the same; over both, the results of the second are others."""
    total = merge([counts(3, slips=0), counts(4, slips=10)])
    assert count_differing(total.results, "") == (10, 40)
    assert count_differing(total.results, DECODER) == (0, 7)
    assert total.seconds == {"": 4.0, "safe": 6.0}


def test_the_report_names_counts_and_relative_cost() -> None:
    decoder, own, safe = report(counts(3, slips=2))
    assert decoder == "decoder: 0 of 3 differ"
    assert "2 of 20 differ" in own
    assert "1.000 of the time" in own
    assert safe.startswith("safe: 0 of 20 differ")
    assert "1.500 of the time" in safe


def test_sizes_are_read_or_refused() -> None:
    assert bench.parse_size("240x426") == (240, 426)
    for wrong in ("64", "0x64", "axb"):
        with pytest.raises(argparse.ArgumentTypeError, match="HEIGHTxWIDTH"):
            bench.parse_size(wrong)
    with pytest.raises(SystemExit):
        bench.main(["--threads", "0"])


@pytest.mark.slow
def test_a_short_run_finds_no_slip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--options", "cpu-independent=1", "--size", "16x16", "--threads", "1", "--seconds", "0", "--fill"]
    bench.main([*options, "--json", str(tmp_path / "out.json")])
    decoder, encoder = capsys.readouterr().out.splitlines()
    decodings = 2 * bench.NUM_CLIPS  # by two processes
    assert decoder == f"decoder: 0 of {decodings} differ"
    assert encoder.startswith(f"cpu-independent=1: 0 of {decodings * bench.REPEATS} differ")
    saved = json.loads((tmp_path / "out.json").read_text())
    assert sum(sum(entry["results"].values()) for entry in saved["counts"]) == decodings * (1 + bench.REPEATS)
