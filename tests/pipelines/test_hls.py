"""A film is watched while it grows: the playlist by the rules of RFC 8216, the stream by FFmpeg's HLS demuxer."""

from __future__ import annotations

import os
import re
from pathlib import Path

import av
import numpy as np
import pytest
from typer.testing import CliRunner

from arlon.data.video_io import VideoWriter, read_video
from arlon.film.storyboard import Storyboard, UsageError, parse_storyboard
from pipelines.cli import app
from pipelines.deliver import hls
from pipelines.deliver.hls import HlsFolder
from pipelines.runs.edit import begin_change, change_run, with_shot_changed, with_shots_added
from pipelines.runs.generate import FilmProgress, FilmResult, generate
from pipelines.runs.prepare import Prepared, prepare
from pipelines.runs.resume import Run, continue_run, open_run
from tests.arlon.data.clips import CRF, frame_numbers, make_clip
from tests.pipelines.films import SHOTS

LENGTHS = (17, 34, 5)
FPS = 8


class Playlist:
    """A media playlist, read by the rules: what is wrong with it raises."""

    def __init__(self, path: Path) -> None:
        lines = path.read_text().splitlines()
        assert lines[0] == "#EXTM3U"
        assert int(self.tag(lines, "VERSION")) >= 6  # EXT-X-MAP beside media that are not I-frames only
        assert lines.count("#EXT-X-INDEPENDENT-SEGMENTS") == 1
        self.type, self.target_s = self.tag(lines, "PLAYLIST-TYPE"), int(self.tag(lines, "TARGETDURATION"))
        self.is_ended = "#EXT-X-ENDLIST" in lines
        assert not self.is_ended or lines[-1] == "#EXT-X-ENDLIST"
        uri, size, start = re.fullmatch(r'URI="(.+)",BYTERANGE="(\d+)@(\d+)"', self.tag(lines, "MAP")).groups()
        folder = path.parent
        self.parts = [(folder / uri, int(start), int(size))]
        self.seconds: list[float] = []
        duration, span = None, None
        for line in lines:
            if found := re.fullmatch(r"#EXTINF:([\d.]+),", line):
                duration = float(found[1])
            elif found := re.fullmatch(r"#EXT-X-BYTERANGE:(\d+)@(\d+)", line):
                span = int(found[2]), int(found[1])
            elif not line.startswith("#"):
                assert duration is not None
                assert span is not None
                assert round(duration) <= self.target_s
                self.seconds.append(duration)
                self.parts.append((folder / line, *span))
                duration = span = None

    @staticmethod
    def tag(lines: list[str], name: str) -> str:
        (line,) = [line for line in lines if line.startswith(f"#EXT-X-{name}:")]
        return line.split(":", 1)[1]

    def data(self) -> bytes:
        """What a player downloads; all of it is there."""
        pieces = [path.read_bytes()[start : start + size] for path, start, size in self.parts]
        assert [len(piece) for piece in pieces] == [size for *_, size in self.parts]
        return b"".join(pieces)


def played(folder: Path) -> list[tuple[float, np.ndarray]]:
    """Time and picture of every frame FFmpeg decodes. Of a stream that grows it would wait for more: as ended."""
    copy = folder / "seen.m3u8"
    text = (folder / "film.m3u8").read_text()
    copy.write_text(text if "ENDLIST" in text else text + "#EXT-X-ENDLIST\n")
    with av.open(str(copy), options={"allowed_extensions": "ALL"}) as container:
        assert container.format.name == "hls"
        frames = [(float(frame.time), frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    copy.unlink()
    return frames


def grow(writer: VideoWriter, stream: HlsFolder, length: int, *, is_whole: bool = False) -> None:
    writer.append(make_clip(length, writer.num_frames))
    stream.add(length, head_bytes=writer.head_bytes, end=writer.num_bytes)
    stream.publish(is_whole=is_whole)


@pytest.mark.parametrize("has_links", [True, False])
def test_stream_plays_at_every_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool) -> None:
    def no_links(*_: object) -> None:
        raise OSError("no hard links here")

    if not has_links:
        monkeypatch.setattr(os, "link", no_links)
    folder, partial = tmp_path / "film.hls", tmp_path / "film.partial.mp4"
    stream, lines = HlsFolder(folder, partial, fps=FPS, longest_s=34 / FPS), []
    with VideoWriter(partial, fps=FPS, crf=CRF, tags={"title": "a"}) as writer:
        for number, length in enumerate(LENGTHS, start=1):
            grow(writer, stream, length, is_whole=number == len(LENGTHS))
            playlist = Playlist(folder / "film.m3u8")
            assert (playlist.type, playlist.target_s, playlist.is_ended) == ("EVENT", 5, number == 3)
            assert playlist.seconds == [length / FPS for length in LENGTHS[:number]]
            assert playlist.data() == partial.read_bytes()
            frames = played(folder)
            assert frame_numbers(np.stack([rgb for _, rgb in frames])) == list(range(sum(LENGTHS[:number])))
            assert [round(time * FPS, 3) for time, _ in frames] == list(range(sum(LENGTHS[:number])))
            before, lines = lines, (folder / "film.m3u8").read_text().splitlines()
            assert lines[: len(before)] == before  # an EVENT playlist only ever gets longer
    assert (folder / "stream.mp4").samefile(partial) == has_links
    assert {path.name for path in folder.iterdir()} == {"film.m3u8", "stream.mp4"}


def test_stream_without_a_fragment_is_not_there(tmp_path: Path) -> None:
    HlsFolder(tmp_path / "a", tmp_path / "b", fps=8, longest_s=1).publish(is_whole=False)
    assert not (tmp_path / "a").exists()


def streamed_film(model: Path, output: Path, *shots: object, **options: object) -> Prepared:
    board = parse_storyboard({"seed": 7, "shots": list(shots or SHOTS)})
    return prepare(board, model=str(model), output=output, settings={"num_threads": 1}, hls=True, **options)


def assert_streamed(film: FilmResult) -> None:
    """The stream is complete and has the pictures of the film."""
    folder = film.film.with_suffix(".hls")
    playlist = Playlist(folder / "film.m3u8")
    assert playlist.is_ended
    assert sum(playlist.seconds) == pytest.approx(film.duration_s)
    assert np.array_equal(np.stack([rgb for _, rgb in played(folder)]), read_video(film.film))


def change(old: Run, board: Storyboard) -> FilmResult:
    new = change_run(old, board)
    return generate(new.prepared, begin=lambda _, executor: begin_change(old, new, executor))


@pytest.mark.slow
def test_film_is_streamed_while_it_grows_and_after_every_change(tiny_model: Path, tmp_path: Path) -> None:
    prepared = streamed_film(tiny_model, tmp_path / "film.mp4")
    folder, seen = tmp_path / "film.hls", []

    def look(progress: FilmProgress) -> None:
        playlist = Playlist(folder / "film.m3u8")
        assert len(played(folder)) == round(sum(playlist.seconds) * FPS)
        seen.append((len(playlist.seconds), playlist.is_ended))
        if progress.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(prepared, on_progress=look)
    growing = (folder / "film.m3u8").read_text()
    run = open_run(prepared.paths.run_dir)
    film = generate(run.prepared, begin=lambda *_: continue_run(run))
    assert seen == [(1, False), (2, False)]
    assert (folder / "film.m3u8").read_text().startswith(growing)  # who watched goes on watching
    assert_streamed(film)
    old = open_run(run.folder.path)
    assert_streamed(change(old, with_shot_changed(old, 1, prompt="a blue circle")))
    old = open_run(run.folder.path)
    added = parse_storyboard({"shots": [{"prompt": "a red square", "duration": "34f"}]}).shots
    assert_streamed(change(old, with_shots_added(old, added)))
    version = open_run(run.folder.path / "versions" / "0001")
    assert_streamed(generate(version.prepared, begin=lambda *_: continue_run(version)))


@pytest.mark.slow
def test_option_makes_a_stream_and_a_film_without_it_removes_that(tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "film.mp4"
    command = ["generate", "--prompt", "a red circle", "--duration", "51f", "--model", str(tiny_model), "--seed", "7"]
    command += ["--threads", "1", "--output", str(output)]
    result = CliRunner().invoke(app, [*command, "--hls"])
    assert result.exit_code == 0, result.stderr
    assert Playlist(tmp_path / "film.hls" / "film.m3u8").is_ended
    (tmp_path / "film.hls" / "mine.txt").write_text("keep")
    assert CliRunner().invoke(app, [*command, "--overwrite"]).exit_code == 0
    assert [path.name for path in (tmp_path / "film.hls").iterdir()] == ["mine.txt"]


def test_film_that_is_not_interrupted_but_replaced_takes_the_old_playlist_away_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, partial = tmp_path / "film.hls", tmp_path / "film.partial.mp4"
    for lengths in ((17,), (34,)):
        partial.unlink(missing_ok=True)
        stream, there = HlsFolder(folder, partial, fps=FPS, longest_s=5), []
        link = stream._link
        monkeypatch.setattr(stream, "_link", lambda link=link, there=there: (there.append(_has(folder)), link()))
        with VideoWriter(partial, fps=FPS, crf=CRF) as writer:
            grow(writer, stream, lengths[0], is_whole=True)
        assert there == [False]
    assert Playlist(folder / hls.PLAYLIST_NAME).seconds == [34 / FPS]


def _has(folder: Path) -> bool:
    return (folder / hls.PLAYLIST_NAME).exists()


def test_file_in_the_way_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "film.hls").write_text("mine")
    with pytest.raises(UsageError, match="is in the way of the stream"):
        streamed_film(tiny_model, tmp_path / "film.mp4")
