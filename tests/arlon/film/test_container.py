"""Films get their record and their finished shape; FFmpeg reads what comes of it."""

from __future__ import annotations

import json
from pathlib import Path

import av
import pytest

from arlon.data.video_io import Fragment, VideoError, VideoWriter, probe, read_video
from arlon.files import hash_bytes
from arlon.film import container
from arlon.film.container import finalise, read_film_record
from arlon.film.record import RECORD_FORMAT, film_tags
from tests.arlon.data.clips import CRF, frame_numbers, make_clip

RECORD = {
    "format": RECORD_FORMAT,
    "storyboard": {"seed": 7, "shots": [{"prompt": 'ein "Käse"\n\\ 🧀', "duration": "51f"}]},
    "model": {"name": "shapes", "hash": "abc"},
}
LENGTHS = (17, 34, 5)


def growing_film(path: Path, tags: dict[str, str] | None = None) -> list[Fragment]:
    tags = film_tags(RECORD, "Käse") if tags is None else tags
    with VideoWriter(path, fps=8, crf=CRF, tags=tags) as writer:
        return [writer.append(make_clip(length, writer.num_frames)) for length in LENGTHS]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_film_says_what_it_was_made_from_at_every_age(tmp_path: Path) -> None:
    partial, film, cut = (tmp_path / name for name in ("film.partial.mp4", "film.mp4", "cut.mp4"))
    growing_film(partial)
    assert read_film_record(partial) == RECORD
    cut.write_bytes(partial.read_bytes()[:-3000])
    assert read_film_record(cut) == RECORD
    finalise(partial, film, num_frames=sum(LENGTHS))
    assert read_film_record(film) == RECORD
    cut.write_bytes(film.read_bytes()[: film.stat().st_size // 2])
    assert read_film_record(cut) == RECORD


@pytest.mark.parametrize("name", ["copy.mp4", "copy.mkv", "copy.mov"])
def test_record_survives_other_programs(tmp_path: Path, name: str) -> None:
    """FFmpeg copies the film into another container, with its defaults."""
    growing_film(tmp_path / "film.mp4")
    with av.open(str(tmp_path / "film.mp4")) as source, av.open(str(tmp_path / name), "w") as copy:
        copy.metadata.update(source.metadata)
        stream = copy.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                copy.mux(packet)
    assert read_film_record(tmp_path / name) == RECORD


def test_finished_film_is_the_growing_one_in_another_shape(tmp_path: Path) -> None:
    partial, film = tmp_path / "film.partial.mp4", tmp_path / "film.mp4"
    growing_film(partial)
    film_hash = finalise(partial, film, num_frames=sum(LENGTHS))
    assert names(tmp_path) == {"film.mp4"}
    assert film_hash == hash_bytes(film.read_bytes())
    assert frame_numbers(read_video(film)) == list(range(sum(LENGTHS)))
    assert probe(film).tags["title"] == "Käse"
    growing_film(partial)
    assert finalise(partial, film, num_frames=sum(LENGTHS)) == film_hash


def test_film_holds_no_path_and_without_metadata_no_word(tmp_path: Path) -> None:
    growing_film(tmp_path / "a.mp4")
    growing_film(tmp_path / "b.mp4", tags={})
    for name in ("a", "b"):
        finalise(tmp_path / f"{name}.mp4", tmp_path / f"{name}-film.mp4", num_frames=sum(LENGTHS))
        assert str(tmp_path).encode() not in (tmp_path / f"{name}-film.mp4").read_bytes()
    assert b"seed" not in (tmp_path / "b-film.mp4").read_bytes()
    with pytest.raises(VideoError, match="does not say what it was made from"):
        read_film_record(tmp_path / "b-film.mp4")


def test_film_without_record_is_known_by_its_sidecar(tmp_path: Path) -> None:
    growing_film(tmp_path / "film.mp4", tags={"comment": "made on holiday"})
    (tmp_path / "film.json").write_text(json.dumps(RECORD), encoding="utf-8")
    assert read_film_record(tmp_path / "film.mp4") == RECORD


@pytest.mark.parametrize("comment", ["[" * 100_000, "[1]", '"storyboard"', "{", '{"format": 1}'])
def test_other_comments_are_no_record(tmp_path: Path, comment: str) -> None:
    growing_film(tmp_path / "film.mp4", tags={"comment": comment})
    with pytest.raises(VideoError, match="does not say what it was made from"):
        read_film_record(tmp_path / "film.mp4")


def test_record_of_another_version_is_refused(tmp_path: Path) -> None:
    growing_film(tmp_path / "film.mp4", tags=film_tags(RECORD | {"format": 99}, "later"))
    with pytest.raises(VideoError, match=f"its record has format 99, this version reads {RECORD_FORMAT}"):
        read_film_record(tmp_path / "film.mp4")


@pytest.mark.parametrize(("kept", "num_frames", "message"), [(None, 57, "has 56 frames, but 57"), (-9, 56, "cut off")])
def test_incomplete_film_is_not_finished(tmp_path: Path, kept: int | None, num_frames: int, message: str) -> None:
    partial, film = tmp_path / "film.partial.mp4", tmp_path / "film.mp4"
    growing_film(partial)
    partial.write_bytes(data := partial.read_bytes()[:kept])
    film.write_bytes(b"an earlier film")
    with pytest.raises((RuntimeError, VideoError), match=message):
        finalise(partial, film, num_frames=num_frames)
    assert names(tmp_path) == {"film.partial.mp4", "film.mp4"}
    assert (partial.read_bytes(), film.read_bytes()) == (data, b"an earlier film")


def test_interrupted_finish_leaves_the_growing_film(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial, film = tmp_path / "film.partial.mp4", tmp_path / "film.mp4"
    growing_film(partial)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(container, "publish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finalise(partial, film, num_frames=sum(LENGTHS))
    assert names(tmp_path) == {"film.partial.mp4"}
    assert frame_numbers(read_video(partial)) == list(range(sum(LENGTHS)))
