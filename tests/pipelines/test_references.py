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
from arlon.diffusion.guidance import guide
from arlon.diffusion.references import parse_mask_strategy
from arlon.diffusion.samplers import draw_noise
from arlon.film.encode_media import encode_references
from arlon.film.media import check_references
from arlon.film.prepare import plan_film
from arlon.film.schedule import film_requests
from arlon.film.storyboard import StoryboardError, load_storyboard, parse_storyboard
from arlon.film.take_media import TakeMedia, take_media
from arlon.film.workers import RefineWorker
from arlon.models.stdit import STDiT3
from arlon.models.video_vae import VideoVAE
from arlon.models.vqvae import LatentVQVAE
from arlon.protocols import VideoSize
from arlon.text.encoders import load_text_encoder
from pipelines.executors.ray_graph import GraphConfig
from pipelines.runs.edit import begin_change, change_run, fork_run, with_shot_changed, with_shots_added
from pipelines.runs.generate import generate
from pipelines.runs.prepare import Prepared, prepare
from pipelines.runs.resume import continue_run, open_run
from pipelines.runs.verify import replay_segment, verify_run
from pipelines.store.media import read_media
from pipelines.store.run_folder import REFERENCES_NAME, RunFolder, RunFolderError
from tests.closeness import assert_close_to_scale
from tests.opensora_loop import sample_take
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


def test_a_picture_is_encoded_as_many_frames_at_a_time_as_a_film_is_decoded(
    tiny_model: Path, tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    encode = VideoVAE.encode
    monkeypatch.setattr(
        VideoVAE,
        "encode",
        lambda vae, video, **options: used.append(vae.config.micro_batch_size) or encode(vae, video, **options),
    )
    prepared = film(tiny_model, tmp_path / "a.mp4", PROMPT | {"image": str(picture)})
    job = replace(prepared.job, settings=replace(prepared.job.settings, vae_micro_batch=2))
    encode_references(job, prepared.references)
    assert set(used) == {2}


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_what_is_given_changes_what_is_made_behind_it(tiny_model: Path, tmp_path: Path, picture: Path) -> None:
    plain, with_image = (
        film(tiny_model, tmp_path / f"{i}.mp4", PROMPT | extra) for i, extra in enumerate(({}, {"image": str(picture)}))
    )
    generate(plain)
    generate(with_image)
    assert not torch.equal(latents(plain)[0][:, :, 1:], latents(with_image)[0][:, :, 1:])


@pytest.mark.slow
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


@pytest.mark.slow
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
    with pytest.raises(StoryboardError, match=r"shots\[2\]\.image.*nowhere\.png"):
        change_run(
            open_run(prepared.paths.run_dir),
            with_shots_added(new, parse_storyboard({"shots": [shot | {"image": "nowhere.png"}]}).shots),
        )


@pytest.mark.slow
@pytest.mark.parametrize("first_is_given", [False, True])
def test_a_film_is_extended_by_shots_with_references(
    tiny_model: Path, tmp_path: Path, picture: Path, clip: Path, first_is_given: bool
) -> None:
    first = {"prompt": "a", "duration": "1 segments"} | ({"image": str(picture)} if first_is_given else {})
    prepared = film(tiny_model, tmp_path / "a.mp4", first, use_codes=False)
    generate(prepared)
    before = latents(prepared)
    old = open_run(prepared.paths.run_dir)
    if first_is_given:  # by a change that ended before its run.json was written
        old.folder.write_references(old.folder.read_references() | {"1/codes": torch.zeros(1, 1, 1, 1)})
    shot = first | {"image": None, "transition": "cut", "references": [str(picture), str(clip)]}
    shot |= {"mask_strategy": "0;0,1,0,5,3"}
    new = change_run(old, with_shots_added(old, parse_storyboard({"shots": [shot]}).shots))
    generate(new.prepared, begin=lambda _, executor: begin_change(old, new, executor))
    kept, added = latents(new.prepared)
    assert torch.equal(kept, before[0])
    stored = RunFolder(prepared.paths.run_dir).read_references()
    assert set(stored) == {"1/references/0", "1/references/1"} | ({"0/image"} if first_is_given else set())
    assert torch.equal(added[:, :, 5:8], stored["1/references/1"][:, :, :3])
    assert list(verify_run(open_run(prepared.paths.run_dir))) == []


@pytest.mark.slow
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
    monkeypatch.setattr("arlon.data.pictures.MAX_PIXELS", 100_000)
    with pytest.raises(StoryboardError, match="at most 100000 pixels, got 400 x 300"):
        film(tiny_model, tmp_path / "a.mp4", {"prompt": "a", "image": str(large)})


def test_a_reference_too_long_to_encode_is_refused(
    tiny_model: Path, tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arlon.film.media.MAX_REFERENCE_FRAMES", 19)
    with pytest.raises(StoryboardError, match=r"reference.*19 frames.*20"):
        film(tiny_model, tmp_path / "a.mp4", PROMPT | {"references": [str(clip)]})


def test_check_looks_at_shots_from_one_on(tiny_model: Path, tmp_path: Path, picture: Path) -> None:
    prepared = film(tiny_model, tmp_path / "a.mp4", PROMPT | {"image": str(picture)})
    assert check_references(prepared.plan, first_shot=1) == ()


# --- mask strategies -------------------------------------------------------------------------------------------


def placed_film(model: Path, output: Path, picture: Path, clip: Path, strategy: str, **values: Any) -> Prepared:
    shot = PROMPT | {"references": [str(picture), str(clip)], "mask_strategy": strategy}
    return film(model, output, shot, num_inference_steps=4, **values)


def test_a_mask_strategy_films_what_the_loop_of_the_original_samples(
    tiny_model: Path, tmp_path: Path, picture: Path, clip: Path
) -> None:
    strategy = "0;0,1,0,5,3,0.6;1,1,-6,-5,2"
    prepared = placed_film(tiny_model, tmp_path / "a.mp4", picture, clip, strategy, use_codes=False)
    assert [given.describe() for given in prepared.references] == [
        "shot 1 reference 0: start here.png, 96 x 64, scaled to 48 x 32",
        "shot 1 reference 1: clip.mp4, 48 x 32, used as it is, 20 frames",
    ]
    generate(prepared)
    first, second = latents(prepared)

    board = prepared.plan.storyboard
    sources = [
        encoded(tiny_model, np.array(Image.open(picture))[None])[0, :, :1],
        encoded(tiny_model, read_video(clip, fps=FPS)[:20])[0, :, :6],
    ]
    dit = STDiT3.from_pretrained(tiny_model / "dit")
    text = load_text_encoder(tiny_model / "text_encoder").encode([board.shots[0].prompt])

    def velocity(x: torch.Tensor, t: torch.Tensor, frame_mask: torch.Tensor) -> torch.Tensor:
        guided = guide(
            dit,
            text.tokens,
            dit.null_text(text.tokens.shape[1]),
            guidance_scale=board.guidance_scale,
            text_mask=text.mask,
            frame_mask=frame_mask,
            fps=FPS,
            height=float(HEIGHT),
            width=float(WIDTH),
        )
        return guided(x, t)

    def draw(segment: int, number: int) -> torch.Tensor:
        address = () if number == 0 else ("edit", number - 1)
        return draw_noise((1, 4, 15, HEIGHT // 8, WIDTH // 8), board.seed, "dit", segment, *address)

    expected, media = [], read_media(RunFolder(prepared.paths.run_dir), prepared.plan)
    for number in range(2):  # times are shifted by the frames of a segment, which is the same for both
        request = next(r.refine for r in film_requests(prepared.job, media) if r.segment.index == number)
        size = VideoSize(height=request.height, width=request.width, fps=request.fps)
        backbone = RefineWorker(prepared.job).backbone
        times = backbone.times(request.num_inference_steps, size=size, num_frames=51)
        expected.append(times)
    assert torch.equal(*expected)
    taken = list(
        sample_take(
            lambda k: velocity,
            draw,
            expected[0],
            num_segments=2,
            references=[sources],
            placements=[parse_mask_strategy(strategy)],
            solver=board.solver,
        )
    )
    assert_close_to_scale(first, taken[0])
    assert_close_to_scale(second, taken[1])
    assert torch.equal(first[:, :, :1], sources[0][None])
    assert not torch.equal(first[:, :, 5:8], sources[1][None, :, :3]), "an edit ratio of 0.6 changes them"
    assert torch.equal(second[:, :, 5:7], sources[1][None, :, 0:2]), "-6 is snapped to the first frame, -5 is a chunk"


@pytest.mark.slow
def test_a_film_with_a_mask_strategy_goes_on_is_verified_and_names_its_references(
    tiny_model: Path, tmp_path: Path, picture: Path, clip: Path
) -> None:
    prepared = placed_film(tiny_model, tmp_path / "a.mp4", picture, clip, "0,1,0,0,5;1,0,0,10,1,0.5")
    generate(prepared)
    run = open_run(prepared.paths.run_dir)
    assert not list(verify_run(run))
    assert [list(replay_segment(run, index)) for index in (0, 1)] == [[], []]
    stored = run.folder.read_references()
    assert set(stored) == {"0/references/0", "0/references/1", "0/codes"}
    vqvae = LatentVQVAE.from_pretrained(tiny_model / "vqvae").eval()
    with torch.inference_mode():
        assert torch.equal(stored["0/codes"], vqvae.encode(stored["0/references/1"][:, :, :5])[:, :2])
    assert run.plan.storyboard.shots[0].references == ("start here.png", "clip.mp4")


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("0,2", "names reference 2, but there are 2"),
        ("2", "names segment 2, but the take that the shot starts has 2"),
        ("0,0,0,15", "target start 15 of the mask strategy is outside of 15"),
        ("0,1,6", "reference start 6 of the mask strategy is outside of 6"),
        ("0,1,0,0,5;0,1,0,5,5;0,1,0,10,5", "nothing is left to make"),
        ("", r"shots\[0\].references\[1\] is placed nowhere"),
    ],
)
def test_a_mask_strategy_that_cannot_be_is_refused_before_any_work(
    tiny_model: Path, tmp_path: Path, picture: Path, clip: Path, strategy: str, message: str
) -> None:
    with pytest.raises(StoryboardError, match=message):
        placed_film(tiny_model, tmp_path / "a.mp4", picture, clip, strategy)


@pytest.mark.slow
def test_a_picture_at_the_head_is_the_same_film_by_either_key(tiny_model: Path, tmp_path: Path, picture: Path) -> None:
    by_image = film(tiny_model, tmp_path / "a.mp4", PROMPT | {"image": str(picture)})
    by_strategy = film(tiny_model, tmp_path / "b.mp4", PROMPT | {"references": [str(picture)]})
    changed = film(
        tiny_model, tmp_path / "c.mp4", PROMPT | {"references": [str(picture)], "mask_strategy": "0,0,0,0,1,0.5"}
    )
    assert generate(by_image).num_frames == generate(by_strategy).num_frames
    assert all(torch.equal(a, b) for a, b in zip(latents(by_image), latents(by_strategy), strict=True))
    assert "0/codes" not in encode_references(changed.job, changed.references), "what is changed has no codes yet"


@pytest.mark.parametrize(
    ("num_frames", "names", "message"),
    [
        (4, ("image",), r"shots\[0\].image: 1 of 1 latent frames .* nothing is left to make"),
        (4, ("end_image",), r"shots\[0\].end_image: 1 of 1 latent frames"),
        (5, ("image", "end_image"), r"shots\[0\].image and end_image: 2 of 2 latent frames"),
    ],
)
def test_a_clip_too_short_for_what_it_is_given_is_refused_before_any_work(
    tiny_model: Path, tmp_path: Path, picture: Path, num_frames: int, names: tuple[str, ...], message: str
) -> None:
    given = dict.fromkeys(names, str(picture))

    def of_length(frames: int) -> Prepared:
        return film(tiny_model, tmp_path / "a.mp4", {"prompt": "a", "duration": f"{frames}f"} | given, use_codes=False)

    with pytest.raises(StoryboardError, match=message):
        of_length(num_frames)
    assert of_length(num_frames + 4).plan.num_frames == num_frames + 4


def test_a_shot_ends_on_its_picture_in_its_last_segment_alone(
    tiny_model: Path, tmp_path: Path, picture: Path, clip: Path
) -> None:
    strategy = "0,0,0,0,5;0,0,0,5,5;0,0,0,10,4"
    shot = PROMPT | {"references": [str(clip)], "mask_strategy": strategy, "end_image": str(picture)}
    prepared = film(tiny_model, tmp_path / "a.mp4", shot)
    first, second = (request.refine for request in film_requests(prepared.job, encoded_media(prepared)))
    assert (first.placed[1] == 0).sum() == 14
    assert (first.tail is None, second.tail is None) == (True, False)
    with pytest.raises(StoryboardError, match=r"shots\[0\]\.mask_strategy.*15 of 15"):
        film(tiny_model, tmp_path / "b.mp4", shot | {"duration": "1 segments"})


def encoded_media(prepared: Prepared) -> dict[int, TakeMedia]:
    return take_media(prepared.plan, encode_references(prepared.job, prepared.references))


def test_requests_of_a_film_need_its_media(tiny_model: Path, tmp_path: Path, picture: Path) -> None:
    prepared = film(tiny_model, tmp_path / "a.mp4", PROMPT | {"image": str(picture)})
    with pytest.raises(ValueError, match=r"shots\[0\]\.image"):
        next(film_requests(prepared.job))


def test_shots_with_references_do_not_each_look_at_all_segments(
    tiny_model: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counted(tuple):
        looks = 0

        def __iter__(self) -> Any:
            Counted.looks += 1
            return super().__iter__()

    shot = {"prompt": "a", "transition": "cut", "duration": "1 segments", "references": [str(picture)]}
    plan = plan_film(parse_storyboard({"shots": [shot] * 20}), str(tiny_model)).plan
    plan = replace(plan, shots=Counted(plan.shots), segments=Counted(plan.segments))
    assert len(check_references(plan)) == 20
    assert Counted.looks <= 2


def test_references_and_an_image_do_not_go_together(tiny_model: Path, tmp_path: Path, picture: Path) -> None:
    shot = PROMPT | {"references": [str(picture)]}
    with pytest.raises(StoryboardError, match="put all in `references`"):
        film(tiny_model, tmp_path / "a.mp4", shot | {"image": str(picture)})
    with pytest.raises(StoryboardError, match=r"shots\[1\].references: this shot goes on"):
        film(tiny_model, tmp_path / "a.mp4", PROMPT, shot)
    with pytest.raises(StoryboardError, match="there is no such file"):
        film(tiny_model, tmp_path / "a.mp4", shot | {"references": [str(tmp_path / "none.png")]})
