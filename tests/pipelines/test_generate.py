from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from arlon.checkpoint import ModelFolder
from arlon.data.video_io import probe, read_video
from arlon.film.container import read_film_record
from arlon.film.geometry import read_geometry
from arlon.film.prepare import make_settings
from arlon.film.schedule import film_requests
from arlon.film.settings import Settings
from arlon.film.storyboard import UsageError, parse_storyboard, storyboard_from_prompts
from pipelines.deliver.paths import output_paths, slug
from pipelines.runs.generate import FilmProgress, FilmResult, generate
from pipelines.runs.prepare import prepare
from pipelines.store.run_folder import CODES_NAME, RunFolder, hash_bytes
from tests.pipelines.films import SHOTS, assert_same_film, prepared_film


@pytest.fixture(scope="module")
def film(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> FilmResult:
    return generate(prepared_film(tiny_model, tmp_path_factory.mktemp("out") / "film.mp4"))


def test_film_plays_and_has_the_planned_length(film: FilmResult) -> None:
    info = probe(film.film)
    assert (info.num_frames, info.fps, info.width, info.height) == (136, 8.0, 48, 32)
    assert film.duration_s == 17.0
    assert film.film_hash == hash_bytes(film.film.read_bytes())
    assert not film.film.with_name("film.partial.mp4").exists()


def test_film_and_sidecar_say_what_it_was_made_from_but_not_where(film: FilmResult, tiny_model: Path) -> None:
    sidecar = json.loads(film.sidecar.read_text())
    assert read_film_record(film.film) == sidecar
    assert sidecar["model"]["name"] == "tiny"
    assert sidecar["storyboard"]["seed"] == 7
    assert [shot["start_frame"] for shot in sidecar["timeline"]["shots"]] == [0, 51, 85]
    again = parse_storyboard(sidecar["storyboard"])
    assert [shot.prompt for shot in again.shots] == [shot["prompt"] for shot in SHOTS]
    for text in (film.sidecar.read_text(), film.film.read_bytes().decode("latin-1")):
        assert str(tiny_model.parent) not in text
        assert str(film.film.parent) not in text
        assert os.path.expanduser("~") + "/" not in text


def test_run_folder_holds_every_part(film: FilmResult) -> None:
    folder = RunFolder(film.run_dir)
    assert {f.name for f in film.run_dir.iterdir()} == {
        "run.json",
        "codes.safetensors",
        "segments",
        "events.jsonl",
    }
    run = folder.read_run()
    assert run["storyboard"]["seed"] == 7
    assert run["versions"]["torch"]
    assert {take: tuple(c.shape) for take, c in folder.read_codes().items()} == {
        0: (1, 13, 2, 3),
        1: (1, 8, 2, 3),
    }
    records = [folder.read_segment(index) for index in range(3)]
    assert [r.inputs["prompt"] for r in records] == [shot["prompt"] for shot in SHOTS]
    assert [r.inputs["overlap"] is None for r in records] == [True, False, True]
    assert folder.read_latent(1).shape == (1, 4, 10, 4, 6)


def test_film_is_its_fragments_in_a_row(film: FilmResult) -> None:
    frames = read_video(film.film)
    parts = [read_video(RunFolder(film.run_dir).segment_dir(index) / "fragment.mp4") for index in range(3)]
    np.testing.assert_array_equal(frames, np.concatenate(parts))


def test_same_seed_gives_the_same_bytes_and_another_does_not(
    film: FilmResult, tiny_model: Path, tmp_path: Path
) -> None:
    same = generate(prepared_film(tiny_model, tmp_path / "same"))
    assert same.film == tmp_path / "same" / "film.mp4"
    assert_same_film(same.film, film.film)
    other = generate(prepared_film(tiny_model, tmp_path / "other", seed=8))
    assert other.film_hash != film.film_hash


def test_a_later_shot_does_not_change_an_earlier_one(film: FilmResult, tiny_model: Path, tmp_path: Path) -> None:
    shots = [*SHOTS[:2], {**SHOTS[2], "prompt": "a red square"}]
    other = generate(prepared_film(tiny_model, tmp_path / "a.mp4", *shots))
    before, after = (
        [RunFolder(run).read_segment(i).outputs["latents.safetensors"] for i in range(3)]
        for run in (film.run_dir, other.run_dir)
    )
    assert before[:2] == after[:2]
    assert before[2] != after[2]


def test_a_seed_is_drawn_and_stored_where_none_is_given(tiny_model: Path, tmp_path: Path) -> None:
    first, second = (prepared_film(tiny_model, tmp_path / n, seed=-1) for n in ("a", "b"))
    assert first.plan.storyboard.seed is not None
    assert first.plan.storyboard.seed != second.plan.storyboard.seed
    assert first.record["storyboard"]["seed"] == first.plan.storyboard.seed


def test_codes_are_written_as_far_as_the_next_segment_needs(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the time to the first segment does not depend on the length of the film."""
    stored: list[tuple[Any, ...]] = []
    append, commit = RunFolder.append_codes, RunFolder.commit_segment

    def append_codes(self: RunFolder, take: int, start: int, codes: Tensor) -> None:
        stored.append(("codes", take, start + codes.shape[1]))
        append(self, take, start, codes)

    def commit_segment(self: RunFolder, index: int, **values: Any) -> Any:
        stored.append(("segment", index))
        return commit(self, index, **values)

    monkeypatch.setattr(RunFolder, "append_codes", append_codes)
    monkeypatch.setattr(RunFolder, "commit_segment", commit_segment)
    made = generate(prepared_film(tiny_model, tmp_path / "a.mp4"))
    assert stored == [
        *(("codes", 0, 10), ("segment", 0)),
        *(("codes", 0, 13), ("segment", 1)),
        *(("codes", 1, 8), ("segment", 2)),
    ]
    assert (made.run_dir / CODES_NAME).exists()
    assert not RunFolder(made.run_dir).has_logged_codes()


def test_progress_is_told_after_every_segment(tiny_model: Path, tmp_path: Path) -> None:
    told: list[FilmProgress] = []
    prepared = prepared_film(tiny_model, tmp_path / "a.mp4")
    partial_frames: list[int] = []

    def on_progress(progress: FilmProgress) -> None:
        told.append(progress)
        partial_frames.append(probe(prepared.paths.partial).num_frames)

    generate(prepared, on_progress=on_progress)
    assert [(p.done, p.total) for p in told] == [(1, 3), (2, 3), (3, 3)]
    assert partial_frames == [51, 85, 136]
    assert told[0].left_s > 0
    assert told[-1].left_s == 0


def test_what_was_made_before_an_interruption_stays(tiny_model: Path, tmp_path: Path) -> None:
    prepared = prepared_film(tiny_model, tmp_path / "a.mp4")

    def interrupt(progress: FilmProgress) -> None:
        if progress.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(prepared, on_progress=interrupt)
    assert not prepared.paths.film.exists()
    assert probe(prepared.paths.partial).num_frames == 85
    assert [RunFolder(prepared.paths.run_dir).has_segment(i) for i in range(3)] == [True, True, False]
    with pytest.raises(UsageError, match="holds another run"):
        prepared_film(tiny_model, tmp_path / "a.mp4")


@pytest.mark.parametrize("worker", ["TextWorker", "CodeWorker"])
def test_a_failure_before_anything_is_stored_leaves_nothing(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worker: str
) -> None:
    monkeypatch.setattr(f"arlon.film.workers.{worker}.run", broken)
    with pytest.raises(RuntimeError, match="broken"):
        generate(prepared_film(tiny_model, tmp_path / "a.mp4"))
    assert list(tmp_path.iterdir()) == []


def test_codes_stay_when_the_first_segment_fails(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arlon.film.workers.RefineWorker.run", broken)
    with pytest.raises(RuntimeError, match="broken"):
        generate(prepared_film(tiny_model, tmp_path / "a.mp4"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.run"]
    codes = RunFolder(tmp_path / "a.run").read_codes()
    assert {take: stored.shape[1] for take, stored in codes.items()} == {0: 10}


def test_without_metadata_nothing_is_said(film: FilmResult, tiny_model: Path, tmp_path: Path) -> None:
    board = parse_storyboard({"seed": 7, "shots": list(SHOTS)})
    prepared = prepare(
        board, model=str(tiny_model), output=tmp_path / "a.mp4", settings={"num_threads": 1}, metadata=False
    )
    made = generate(prepared)
    assert made.sidecar is None
    assert {path.name for path in tmp_path.iterdir()} == {"a.mp4", "a.run"}
    assert b"red circle" not in made.film.read_bytes()
    np.testing.assert_array_equal(read_video(made.film), read_video(film.film))


def broken(*_: object) -> None:
    raise RuntimeError("broken")


def test_existing_files_are_not_replaced_unasked(tiny_model: Path, tmp_path: Path) -> None:
    for name in ("a.mp4", "a.json"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(UsageError, match=f"{name}' exists: .* --overwrite"):
            prepared_film(tiny_model, tmp_path / "a.mp4")
        (tmp_path / name).unlink()
    for name in ("b.mp4", "b.json", "b.partial.mp4"):
        (tmp_path / name).mkdir()
        with pytest.raises(UsageError, match=f"{name}' is a folder"):
            prepared_film(tiny_model, tmp_path / "b.mp4")
        (tmp_path / name).rmdir()


def test_a_run_of_another_program_is_never_replaced(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "segments").mkdir()
    for name in ("run.json", "segments/mine.txt"):
        (tmp_path / name).write_text("{}")
    film = parse_storyboard({"shots": ["a"]})
    with pytest.raises(UsageError, match="will not replace"):
        prepare(film, model=str(tiny_model), output=tmp_path, overwrite=True)
    assert (tmp_path / "segments" / "mine.txt").exists()


def test_a_place_that_cannot_be_written_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write to .*file' is not a folder"):
        prepared_film(tiny_model, tmp_path / "file" / "a.mp4")
    with pytest.raises(UsageError, match="the output is empty"):
        prepare(parse_storyboard({"shots": ["a"]}), model=str(tiny_model), output="")


def test_preparing_creates_nothing(tiny_model: Path, tmp_path: Path) -> None:
    prepared_film(tiny_model, tmp_path / "new" / "folder" / "a.mp4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crf": 99}, "crf must be between 0 and 51, got 99"),
        ({"num_threads": 0}, "num_threads must be between 1 and 512, got 0"),
        ({"num_threads": 100_000}, "num_threads must be between 1 and 512"),
        ({"preset": "warp"}, "preset must be one of ultrafast"),
        ({"ar_temperature": math.nan}, "ar_temperature must be a finite number, got nan"),
        ({"ar_guidance_scale": math.inf}, "ar_guidance_scale must be a finite number"),
        ({"device": "meta"}, "cannot compute on device 'meta'"),
        ({"ar_top_p": 1.5}, "top_p"),
        ({"device": "toaster"}, "cannot compute on device 'toaster', try 'cpu'"),
        ({"dtype": "float8"}, "dtype"),
        ({"text_dtype": "float16"}, "text_dtype"),
        ({"crff": 3}, "crff"),
        (
            {"vae_blend_frames": 8},
            "vae_blend_frames must be between 0 and 7 with the chunks of this model's VAE, got 8",
        ),
        ({"vae_blend_frames": -1}, "vae_blend_frames must be 0 or more, got -1"),
        ({"vae_tile": 24}, "vae_tile must be a multiple of 8 pixels and at least 32, got 24"),
        ({"vae_micro_batch": 0}, "vae_micro_batch must be 1 frame or more, got 0"),
        ({"vae_micro_batch": 1.5}, "vae_micro_batch"),
        ({"vae_tile": 36}, "vae_tile must be a multiple of 8 pixels and at least 32, got 36"),
    ],
)
def test_wrong_settings_are_refused(
    tiny_model: Path, tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        prepared_film(tiny_model, tmp_path / "a.mp4", settings=settings)


def test_blended_frames_are_told_where_there_are_any(tiny_model: Path, tmp_path: Path) -> None:
    plain, blended = (prepared_film(tiny_model, tmp_path / "a.mp4", settings={"vae_blend_frames": n}) for n in (0, 2))
    assert "vae_blend_frames" not in plain.record["settings"]  # films of before it have the same bytes
    assert blended.record["settings"]["vae_blend_frames"] == 2
    inputs = [next(film_requests(film.job)).write.inputs.to_plain() for film in (plain, blended)]
    assert [values.get("vae_blend_frames") for values in inputs] == [None, 2]
    decodes = [[(d.lead, d.held) for d in (r.decode for r in film_requests(film.job))] for film in (plain, blended)]
    assert decodes == [[(0, 0)] * 3, [(0, 2), (2, 0), (0, 0)]]
    assert [[values.get(name) for name in ("lead", "held")] for values in inputs] == [[None, None], [None, 2]]


def test_tiles_are_told_where_there_are_any(tiny_model: Path, tmp_path: Path) -> None:
    plain, tiled = (prepared_film(tiny_model, tmp_path / "a.mp4", settings={"vae_tile": n}) for n in (None, 32))
    assert "vae_tile" not in plain.record["settings"]
    assert tiled.record["settings"]["vae_tile"] == 32
    assert next(film_requests(tiled.job)).write.inputs.vae_tile == 32


@pytest.mark.parametrize(
    ("name", "default", "other"), [("vae_micro_batch", None, 1), ("text_dtype", "float32", "bfloat16")]
)
def test_newer_settings_are_told_where_they_are_not_at_their_default(
    tiny_model: Path, tmp_path: Path, name: str, default: object, other: object
) -> None:
    films = [prepared_film(tiny_model, tmp_path / "a.mp4", settings={name: value}) for value in (default, other)]
    records = [film.record["settings"] for film in films]
    inputs = [next(film_requests(film.job)).write.inputs.to_plain() for film in films]
    for plain, chosen in (records, inputs):
        assert name not in plain
        assert chosen[name] == other
    assert [Settings.from_plain(film.record["settings"]) for film in films] == [film.job.settings for film in films]


def test_a_model_says_how_many_frames_are_blended(tiny_model: Path) -> None:
    geometry = read_geometry(ModelFolder.open(tiny_model))
    of_model = replace(geometry, defaults=replace(geometry.defaults, vae_blend_frames=3))
    assert make_settings(of_model, {}).vae_blend_frames == 3
    assert make_settings(of_model, {"vae_blend_frames": 0}).vae_blend_frames == 0
    with pytest.raises(UsageError, match="vae_blend_frames must be between 0 and 2"):
        make_settings(replace(of_model, max_blend_frames=2), {})


def test_unknown_model_solver_and_executor_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'shapes'"):
        prepare(storyboard_from_prompts(["a"]), model="shape", output=tmp_path / "a.mp4")
    with pytest.raises(UsageError, match=r"euller.*euler"):
        prepared_film(tiny_model, tmp_path / "a.mp4", solver="euller")
    with pytest.raises(UsageError, match="unknown executor 'cloud'"):
        generate(prepared_film(tiny_model, tmp_path / "a.mp4"), executor="cloud")


def test_where_things_go() -> None:
    film = parse_storyboard({"seed": 3, "shots": ["A Red/Circle: moves, left & " + "x" * 90]})
    assert output_paths(None, film).film == Path("outputs") / "a-red-circle-moves-left-xxxxxxxxxxxxxxxx-3" / "film.mp4"
    named = output_paths("clips/a.mp4", film)
    assert (named.run_dir, named.sidecar) == (Path("clips/a.run"), Path("clips/a.json"))
    assert output_paths("clips/a", film).film == Path("clips/a/film.mp4")
    with pytest.raises(UsageError, match=r"name the output 'a\.mp4'"):
        output_paths("a.avi", film)
    assert slug("赤い円") == "film"


@pytest.mark.parametrize("name", ["film.mp4", "film.partial.mp4", "film.json"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_pipe_in_the_place_of_a_file_is_refused_at_once(
    tiny_model: Path, tmp_path: Path, name: str, overwrite: bool
) -> None:
    """Opening it would wait for a reader forever."""
    os.mkfifo(tmp_path / name)
    with pytest.raises(UsageError, match=f"{name}' is a device or a pipe"):
        prepare(
            parse_storyboard({"seed": 7, "shots": list(SHOTS)}),
            model=str(tiny_model),
            output=tmp_path / "film.mp4",
            overwrite=overwrite,
        )
    assert [path.name for path in tmp_path.iterdir()] == [name]
