from __future__ import annotations

import pytest

from benchmarks import crash


def test_every_file_of_a_film_has_its_write_points() -> None:
    points = list(crash.write_points(2))
    assert len(points) == len(set(points)) == 3 * 3 + 2 + 2 * (3 * 3 + 2 * 2)
    assert "segment.json:renamed:2" in points


@pytest.mark.slow
def test_two_kills_change_nothing() -> None:
    outcomes = crash.run(2, None, 0, "local", lambda outcome: None)
    assert [outcome.identical for outcome in outcomes] == [True, True]
    assert [outcome.twice for outcome in outcomes] == [0, 0]
