"""The arithmetic of `benchmarks/overlap.py`, on timelines made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.overlap import COLOURS, Timeline, draw, hidden_share, measure, read_timeline, report, union


def events(started_s: float = 1000.0) -> list[dict]:
    """Codes 2-3 and 3-5, refine 3-7 and 7-11, decode 7-8 and 11-12, write 8-8.5 and 12-12.5; film at 13."""
    found = [{"time": started_s + 1, "event": "start"}]
    for index, ends in enumerate(({"code": 3, "refine": 7, "decode": 8, "write": 8.5}, None)):
        ends = ends or {"code": 5, "refine": 11, "decode": 12, "write": 12.5}
        seconds = {"code": 1 + index, "refine": 4, "decode": 1, "write": 0.5}
        for role, end in ends.items():
            step = {"event": "step", "segment": index, "role": role, "seconds": seconds[role], "ended": started_s + end}
            found.append({"time": started_s + ends["write"], **step})
        found.append({"time": started_s + ends["write"], "event": "commit", "segment": index})
    return [*found, {"time": started_s + 13, "event": "film"}]


def test_union_and_shares() -> None:
    assert union([(3, 4), (0, 1), (0.5, 2), (2, 2.5), (9, 9)]) == [(0, 2.5), (3, 4)]
    assert hidden_share([(0, 2), (4, 6)], [(1, 5), (1, 3)]) == 0.5
    assert hidden_share([(0, 1), (0, 1), (2, 3)], [(0, 1)]) == 0.5  # two at once count once
    assert hidden_share([], [(0, 1)]) == 0


def test_figures_of_a_known_timeline() -> None:
    figures = measure(timeline := read_timeline(events(), 1000.0))
    assert timeline.steps["refine"] == ((3, 7), (7, 11))
    assert figures.work_s == 11
    assert figures.hidden == pytest.approx({"code": 2 / 3, "decode": 1 / 2})
    assert figures.busy_s == {"code": 3, "refine": 8, "decode": 2, "write": 1}
    parts = {"checks": 1, "load": 1, "codes": 1, "refine": 4, "decode": 1, "write": 0.5, "waits": 0}
    assert figures.first_second_s == pytest.approx(parts)
    lines = report({"local": measure(read_timeline(events(), 1000.0)), "ray": figures})
    assert lines[-1] == "overhead of Ray: +0.0 %"
    slow = replace(figures, work_s=33.0)
    lines = report({"local": replace(figures, work_s=12.0), "ray": figures, "base, local": slow})
    assert lines[-1] == "the base alone takes 3.00 times as long"


def test_run_that_did_not_end_is_refused() -> None:
    with pytest.raises(ValueError, match="not made to its end: it has commit, start"):
        read_timeline(events()[:-1], 1000.0)


def test_picture_has_every_step_where_it_was(tmp_path: Path) -> None:
    timeline = read_timeline(events(), 1000.0)
    assert isinstance(timeline, Timeline)
    draw({"local": timeline}, tmp_path / "a.png", width=1430, row=30)  # 100 pixels a second
    pixels = np.asarray(Image.open(tmp_path / "a.png"))
    colour = tuple(int(COLOURS["refine"][i : i + 2], 16) for i in (1, 3, 5))
    columns = np.flatnonzero((pixels == colour).all(-1).any(0))
    assert abs(columns.min() - (110 + 300)) <= 2
    assert abs(columns.max() - (110 + 1100)) <= 2
