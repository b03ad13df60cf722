"""The file server of the benchmark by plain HTTP; the browser itself where there is one."""

from __future__ import annotations

import json
import shutil
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from arlon.data.video_io import VideoWriter
from arlon.film.container import finalise
from benchmarks import play_film
from tests.arlon.data.clips import make_clip

NO_BROWSER = not any(map(shutil.which, play_film.BROWSERS))


def fetch(url: str, byte_range: str | None = None) -> tuple[int, dict[str, str], bytes]:
    request = urllib.request.Request(url, headers={"Range": byte_range} if byte_range else {})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.status, dict(answer.headers), answer.read()


def test_server_gives_the_first_part_of_a_film_by_ranges(tmp_path: Path) -> None:
    data = bytes(range(256)) * 4
    film = tmp_path / "a film.mp4"
    film.write_bytes(data)
    (tmp_path / "other.mp4").write_bytes(data)
    with play_film.served(film, 400) as page:
        url = page.replace(play_film.PAGE_NAME, "a%20film.mp4")
        assert b'src="a%20film.mp4"' in fetch(page)[2]
        assert fetch(url)[2] == data[:400]
        for byte_range, first, stop in (("bytes=100-199", 100, 200), ("bytes=350-", 350, 400), ("bytes=-30", 370, 400)):
            status, headers, content = fetch(url, byte_range)
            assert (status, headers["Content-Range"], content) == (
                206,
                f"bytes {first}-{stop - 1}/400",
                data[first:stop],
            )
        assert fetch(url, "bytes=390-1000")[2] == data[390:400]
        for missing, number in ((url, 416), (url.replace("film", "none"), 404)):
            with pytest.raises(urllib.error.HTTPError) as refusal:
                fetch(missing, "bytes=400-")
            assert refusal.value.code == number
        assert fetch(page.replace(play_film.PAGE_NAME, "other.mp4"))[2] == data


def test_server_stays_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "a.mp4").write_bytes(b"film")
    with play_film.served(tmp_path / "films" / "a.mp4", 4) as page, pytest.raises(urllib.error.HTTPError):
        fetch(page.replace(play_film.PAGE_NAME, "..%2Fsecret.mp4"))


def test_missing_browser_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with VideoWriter(tmp_path / "a.mp4", fps=8) as writer:
        writer.append(make_clip(3))
    monkeypatch.setattr(play_film, "BROWSERS", ("no-such-browser",))
    with pytest.raises(SystemExit, match=r"no-such-browser.*Chromium") as end:
        play_film.main([str(tmp_path / "a.mp4")])
    assert "\n" not in str(end.value)


def test_program_that_is_no_browser_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "browser"
    path.write_text("#!/bin/sh\necho 'cannot open display' >&2\nexit 3\n")
    path.chmod(0o755)
    with play_film.Browser(str(path)) as browser, pytest.raises(RuntimeError, match="ended: cannot open display"):
        browser.version()


@pytest.mark.slow
@pytest.mark.skipif(NO_BROWSER, reason="no Chromium or Chrome is installed")
def test_browser_plays_a_film_whole_and_cut_off(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "film.partial.mp4", fps=8) as writer:
        for length in (17, 34, 34):
            writer.append(make_clip(length))
    finalise(tmp_path / "film.partial.mp4", tmp_path / "film.mp4", num_frames=85)
    out = tmp_path / "figures.json"
    options = ["--rate", "4", "--screenshot", str(tmp_path / "shot.png"), "--json", str(out)]
    play_film.main([str(tmp_path / "film.mp4"), *options])
    whole, cut = json.loads(out.read_text())["playbacks"]
    assert whole["duration_s"] == pytest.approx(85 / 8, abs=0.01)
    assert whole["ended"]
    assert whole["num_frames"] == 85
    assert whole["num_steps"] > 5
    assert 0.5 < cut["reached_s"] < 0.8 * whole["reached_s"]
    assert (tmp_path / "shot.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "shot.cut40.png").exists()
