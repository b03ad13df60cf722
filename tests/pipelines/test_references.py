"""Films that begin with, end on, or go on from what they are given."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from arlon.data.transforms import resize_and_crop
from arlon.data.video_io import VideoWriter, read_video
from arlon.models.video_vae import VideoVAE
from arlon.models.vqvae import LatentVQVAE
from pipelines.generate import Prepared, generate, prepare
from pipelines.graph import GraphConfig
from pipelines.references import check_references, encode_references
from pipelines.runs.edit_run import begin_change, change_run, fork_run, with_shot_changed, with_shots_added
from pipelines.runs.resume import continue_run, open_run
from pipelines.runs.run_folder import REFERENCES_NAME, RunFolder, RunFolderError
from pipelines.runs.verify import replay_segment, verify_run
from pipelines.storyboard import StoryboardError, load_storyboard, parse_storyboard
from tests.pipelines.tiny_model import FPS, HEIGHT, WIDTH

PROMPT = {"prompt": "a red circle moves left", "duration": "85f"}


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of the proportions of the frame, twice as large, and of random noise."""
    path = tmp_path_factory.mktemp("given") / "start here.png"
    pixels = np.random.default_rng(0).integers(0, 256, (2 * HEIGHT, 2 * WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 frames at twice the rate of the film: 20 at its own."""
    path = tmp_path_factory.mktemp("given") / "clip.mp4"
    rng = np.random.default_rng(1)
    still = rng.integers(0, 256, (1, HEIGHT, WIDTH, 3), dtype=np.uint8)
    frames = np.concatenate([np.roll(still, step, axis=2) for step in range(40)])
    with VideoWriter(path, fps=2 * FPS, crf=8) as writer:
        writer.append(frames)
    return path


def film(model: Path, output: Path, *shots: dict[str, Any], **film_values: Any) -> Prepared:
    board = parse_storyboard({"seed": 7, "shots": list(shots), **film_values})
    return prepare(board, model=str(model), output=output, settings={"num_threads": 1})


def latents(prepared: Prepared) -> list[torch.Tensor]:
    folder = RunFolder(prepared.paths.run_dir)
    return [folder.read_latent(segment.index) for segment in prepared.plan.segments]


@torch.inference_mode()
def encoded(model: Path, frames: np.ndarray) -> torch.Tensor:
    vae = VideoVAE.from_pretrained(model / "vae")
    video = resize_and_crop(frames, height=HEIGHT, width=WIDTH, filter="bicubic" if len(frames) == 1 else "bilinear")
    missing = -video.shape[1] % 17
    return vae.encode(torch.cat([video, video[:, -1:].expand(-1, missing, -1, -1)], dim=1)[None])


def test_an_image_is_the_first_latent_frame_and_another_the_last(
    tiny_model: Path, tmp_path: Path, picture: Path
) -> None:
    prepared = film(tiny_model, tmp_path / "a.mp4", PROMPT | {"image": str(picture), "end_image": str(picture)})
    generate(prepared)
    first, last = latents(prepared)
    still = encoded(tiny_model, np.array(Image.open(picture))[None])
    assert torch.equal(first[:, :, :1], still[:, :, :1])
    assert torch.equal(last[:, :, -1:], still[:, :, -1:])
    assert not torch.equal(first[:, :, -1:], still[:, :, -1:]), "only the last segment of the shot ends on it"


def test_a_picture_is_encoded_in_tiles_where_the_film_is_decoded_in_them(
    tiny_model: Path, tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    encode = VideoVAE.encode
    monkeypatch.setattr(
        VideoVAE, "encode", lambda vae, video, **options: asked.append(options) or encode(vae, video, **options)
    )
    prepared = film(tiny_model, tmp_path / "a.mp4", PROMPT | {"image": str(picture)})
    for tile in (None, 32):
        job = replace(prepared.job, settings=replace(prepared.job.settings, vae_tile=tile))
        asked.clear()
        encode_references(job, prepared.references)
        assert asked
        assert all(options == {"tile": tile} for options in asked)


def test_a_film_goes_on_from_the_last_frames_of_a_video_at_its_own_rate(
    tiny_model: Path, tmp_path: Path, clip: Path
) -> None:
    prepared = film(tiny_model, tmp_path / "a.mp4", PROMPT | {"video": str(clip)})
    (reference,) = prepared.references
    assert reference.num_frames == 20
    assert reference.describe() == (
        "shot 1 video: clip.mp4, 48 x 32, used as it is, goes on from the last 17 of 20 frames"
    )
    generate(prepared)
    expected = encoded(tiny_model, read_video(clip, fps=FPS)[-17:])
    assert torch.equal(latents(prepared)[0][:, :, :5], expected)


def test_codes_go_on_from_those_of_what_is_given(tiny_model: Path, tmp_path: Path, clip: Path, picture: Path) -> None:
    vqvae = LatentVQVAE.from_pretrained(tiny_model / "vqvae").eval()
    stills = encoded(tiny_model, np.repeat(np.array(Image.open(picture).resize((WIDTH, HEIGHT)))[None], 17, 0))
    assert stills.shape[2] == 5
    for name, key, count in (("video", clip, 2), ("image", picture, 1)):
        prepared = film(tiny_model, tmp_path / f"{name}.mp4", PROMPT | {name: str(key)})
        generate(prepared)
        given = RunFolder(prepared.paths.run_dir).read_references()
        codes = RunFolder(prepared.paths.run_dir).read_codes()[0]
        assert given["0/codes"].shape[1] == count
        assert torch.equal(codes[:, :count], given["0/codes"])
        if name == "video":
            assert torch.equal(given["0/codes"], vqvae.encode(given["0/video"])[:, :2])


def test_what_is_given_changes_what_is_made_behind_it(tiny_model: Path, tmp_path: Path, picture: Path) -> None:
    plain, with_image = (
        film(tiny_model, tmp_path / f"{i}.mp4", PROMPT | extra) for i, extra in enumerate(({}, {"image": str(picture)}))
    )
    generate(plain)
    generate(with_image)
    assert not torch.equal(latents(plain)[0][:, :, 1:], latents(with_image)[0][:, :, 1:])


def test_a_run_needs_its_files_no_more(tiny_model: Path, tmp_path: Path, picture: Path, clip: Path) -> None:
    start, end = tmp_path / "start.png", tmp_path / "end.png"
    for path in (start, end):
        path.write_bytes(picture.read_bytes())
    shots = (PROMPT | {"image": str(start)}, {"prompt": "a blue square", "duration": "34f", "end_image": str(end)})
    prepared = film(tiny_model, tmp_path / "a.mp4", *shots)
    generate(prepared)
    film_bytes = prepared.paths.film.read_bytes()
    start.unlink()
    end.unlink()
    run_dir = prepared.paths.run_dir
    RunFolder(run_dir).remove_segment(2)
    prepared.paths.film.unlink()
    run = open_run(run_dir)
    generate(run.prepared, begin=lambda _, executor: continue_run(run))
    assert prepared.paths.film.read_bytes() == film_bytes
    assert list(verify_run(open_run(run_dir))) == []
    for index in range(3):
        assert list(replay_segment(open_run(run_dir), index)) == []
    copy = fork_run(open_run(run_dir), tmp_path / "copy.mp4")
    assert (copy / REFERENCES_NAME).read_bytes() == (run_dir / REFERENCES_NAME).read_bytes()
    old = open_run(copy)
    new = change_run(old, with_shot_changed(old, 2, prompt="a green circle moves left"))
    generate(new.prepared, begin=lambda _, executor: begin_change(old, new, executor))
    again = open_run(copy)
    assert torch.equal(RunFolder(copy).read_latent(0), RunFolder(run_dir).read_latent(0))
    assert torch.equal(RunFolder(copy).read_latent(2)[:, :, -1:], RunFolder(run_dir).read_latent(2)[:, :, -1:])
    assert list(verify_run(again)) == []


def test_shots_that_are_added_may_be_given_something(tiny_model: Path, tmp_path: Path, picture: Path) -> None:
    prepared = film(tiny_model, tmp_path / "a.mp4", PROMPT | {"image": str(picture)})
    generate(prepared)
    old = open_run(prepared.paths.run_dir)
    shot = {"prompt": "a blue square", "duration": "51f", "transition": "cut", "image": str(picture)}
    added = parse_storyboard({"shots": [shot]}).shots
    new = change_run(old, with_shots_added(old, added))
    generate(new.prepared, begin=lambda _, executor: begin_change(old, new, executor))
    whole = film(tiny_model, tmp_path / "b.mp4", PROMPT | {"image": str(picture)}, shot)
    generate(whole)
    assert all(torch.equal(a, b) for a, b in zip(latents(new.prepared), latents(whole), strict=True))
    with pytest.raises(StoryboardError, match=r"shots\[2\].image 'nowhere.png': there is no such file"):
        change_run(
            open_run(prepared.paths.run_dir),
            with_shots_added(new, parse_storyboard({"shots": [shot | {"image": "nowhere.png"}]}).shots),
        )


def test_what_is_stored_of_it_cannot_be_exchanged(tiny_model: Path, tmp_path: Path, picture: Path) -> None:
    prepared = film(tiny_model, tmp_path / "a.mp4", PROMPT | {"image": str(picture)})
    generate(prepared)
    run_dir = prepared.paths.run_dir
    tensors = RunFolder(run_dir).read_references()
    RunFolder(run_dir).write_references(tensors | {"0/image": tensors["0/image"] + 1})
    assert any("other values of head" in problem for problem in verify_run(open_run(run_dir)))
    path = run_dir / REFERENCES_NAME
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(RunFolderError, match="was changed"):
        RunFolder(run_dir).read_references()


def test_no_path_of_this_machine_is_written(tiny_model: Path, tmp_path: Path, picture: Path) -> None:
    prepared = film(tiny_model, tmp_path / "a.mp4", PROMPT | {"image": str(picture)})
    generate(prepared)
    where = str(picture.parent).encode()
    for path in (prepared.paths.film, prepared.paths.sidecar):
        assert where not in path.read_bytes()
    stored = json.loads((prepared.paths.run_dir / "run.json").read_text())
    assert stored["storyboard"]["shots"][0]["image"] == picture.name


@pytest.mark.ray
def test_ray_makes_the_same_film(tiny_model: Path, tmp_path: Path, picture: Path, ray_session: Any) -> None:
    shots = (
        PROMPT | {"image": str(picture)},
        {"prompt": "a blue square", "duration": "34f", "end_image": str(picture)},
    )
    local, ray = (film(tiny_model, tmp_path / f"{name}.mp4", *shots) for name in ("local", "ray"))
    assert generate(local).film_hash == generate(ray, executor="ray", graph=GraphConfig()).film_hash


def test_pictures_are_cut_and_never_stretched(tiny_model: Path, tmp_path: Path) -> None:
    tall = tmp_path / "tall.png"
    Image.fromarray(np.zeros((200, 48, 3), dtype=np.uint8)).save(tall)
    prepared = film(tiny_model, tmp_path / "a.mp4", PROMPT | {"image": str(tall)})
    assert "cut to the centre 48 x 32 (84% lost at top and bottom)" in prepared.references[0].describe()


def test_relative_paths_start_at_the_storyboard(tiny_model: Path, tmp_path: Path, picture: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "one.png").write_bytes(picture.read_bytes())
    board = tmp_path / "film.yaml"
    board.write_text("shots:\n  - prompt: a red circle\n    image: pictures/one.png\n")
    assert load_storyboard(board).shots[0].image == str(tmp_path / "pictures" / "one.png")


def bad_shots(picture: Path, clip: Path, text: Path) -> list[tuple[list[dict[str, Any]], str]]:
    first = {"prompt": "a"}
    return [
        ([first | {"image": "none.png"}], r"shots\[0\].image 'none.png': there is no such file"),
        ([first | {"image": str(text)}], "no picture that can be read"),
        ([first | {"image": str(text.parent)}], "this is no file"),
        ([first | {"image": str(clip)}], "no picture that can be read"),
        ([first | {"video": str(text)}], r"shots\[0\].video"),
        ([first | {"image": str(picture), "video": str(clip)}], "an image and a video"),
        ([first, first | {"image": str(picture)}], r"shots\[1\].image: this shot goes on from the one before it"),
        ([first | {"end_image": str(text)}, first | {"video": "none.mp4"}], "3 problems"),
    ]


@pytest.mark.parametrize("number", range(8))
def test_what_cannot_be_used_is_refused_before_any_work(
    tiny_model: Path, tmp_path: Path, picture: Path, clip: Path, number: int
) -> None:
    text = tmp_path / "text.png"
    text.write_text("no picture")
    shots, message = bad_shots(picture, clip, text)[number]
    with pytest.raises(StoryboardError, match=message):
        film(tiny_model, tmp_path / "a.mp4", *shots)
    assert not list(tmp_path.glob("a.*"))


def test_a_picture_too_large_to_hold_is_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = tmp_path / "large.png"
    Image.new("L", (400, 300)).save(large)
    monkeypatch.setattr("pipelines.references.MAX_PIXELS", 100_000)
    with pytest.raises(StoryboardError, match="at most 100000 pixels, got 400 x 300"):
        film(tiny_model, tmp_path / "a.mp4", {"prompt": "a", "image": str(large)})


def test_check_looks_at_shots_from_one_on(tiny_model: Path, tmp_path: Path, picture: Path) -> None:
    prepared = film(tiny_model, tmp_path / "a.mp4", PROMPT | {"image": str(picture)})
    assert check_references(prepared.plan, first_shot=1) == ()
