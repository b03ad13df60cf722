"""One frame as a picture, the base alone, and frames of any size."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from arlon.checkpoint import write_model_index
from arlon.data.video_io import read_video
from arlon.diffusion import conditioning
from arlon.film.container import read_film_record
from arlon.film.make import KeptWorkers
from arlon.film.messages import RefineResult
from arlon.film.plan import clip_plan, with_frame_size
from arlon.film.prepare import plan_film
from arlon.film.schedule import film_requests
from arlon.film.storyboard import Storyboard, StoryboardError, UsageError, parse_storyboard
from arlon.film.workers import DecodeWorker, RefineWorker
from arlon.models.video_vae import VideoVAE
from pipelines.cli import app
from pipelines.runs.generate import FilmProgress, generate
from pipelines.runs.picture import is_picture, make_picture, prepare_picture
from pipelines.runs.prepare import prepare
from pipelines.runs.resume import continue_run, open_run
from pipelines.runs.verify import verify_run
from pipelines.store.run_folder import RunFolder
from tests.pipelines.tiny_model import HEIGHT, WIDTH

pytestmark = pytest.mark.slow


def board(**values: Any) -> Storyboard:
    shots = [{"prompt": "a red circle", "duration": "51f"}, {"prompt": "a blue square", "duration": "34f"}]
    return parse_storyboard({"seed": 7, "shots": shots, **values})


@pytest.fixture(scope="module")
def base_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model without what codes need."""
    folder = tmp_path_factory.mktemp("base") / "base"
    folder.mkdir()
    for name in ("vae", "dit", "text_encoder"):
        (folder / name).symlink_to(tiny_model / name)
    defaults = json.loads((tiny_model / "model_index.json").read_text())["defaults"]
    write_model_index(folder, defaults)
    return folder


def make(model: Path, output: Path, film: Storyboard, **options: Any) -> list[torch.Tensor]:
    prepared = prepare(film, model=str(model), output=output, settings={"num_threads": 1})
    generate(prepared, **options)
    folder = RunFolder(prepared.paths.run_dir)
    return [folder.read_latent(segment.index) for segment in prepared.plan.segments]


def test_a_base_alone_and_a_whole_model_without_codes_make_the_same_film(
    tiny_model: Path, base_model: Path, tmp_path: Path
) -> None:
    alone = make(base_model, tmp_path / "base.mp4", board())
    without = make(tiny_model, tmp_path / "without.mp4", board(use_codes=False))
    whole = make(tiny_model, tmp_path / "whole.mp4", board())
    assert all(torch.equal(a, b) for a, b in zip(alone, without, strict=True))
    assert not torch.equal(alone[0], whole[0])


def test_segments_of_a_base_go_on_from_one_another(base_model: Path, tmp_path: Path) -> None:
    joined = make(base_model, tmp_path / "joined.mp4", board())
    cut = board()
    cut = replace(cut, shots=(cut.shots[0], replace(cut.shots[1], transition="cut")))
    assert not torch.equal(joined[1][:, :, :5], make(base_model, tmp_path / "cut.mp4", cut)[1][:, :, :5])


@pytest.mark.parametrize(("height", "width"), [(64, 32), (16, 80), (48, 48)])
def test_a_base_makes_any_size(base_model: Path, tmp_path: Path, height: int, width: int) -> None:
    make(base_model, tmp_path / "a.mp4", board(height=height, width=width))
    assert read_video(tmp_path / "a.mp4").shape[1:3] == (height, width)


def test_workers_kept_for_films_with_codes_are_not_used_without(tiny_model: Path, tmp_path: Path) -> None:
    workers = KeptWorkers()
    first = make(tiny_model, tmp_path / "a.mp4", board(), worker=workers)
    without = make(tiny_model, tmp_path / "b.mp4", board(use_codes=False), worker=workers)
    assert torch.equal(make(tiny_model, tmp_path / "c.mp4", board(use_codes=False))[0], without[0])
    assert not torch.equal(first[0], without[0])


def test_codes_are_not_asked_of_a_base(base_model: Path, tmp_path: Path) -> None:
    with pytest.raises(StoryboardError, match="use_codes"):
        prepare(board(use_codes=True), model=str(base_model), output=tmp_path / "a.mp4")


def test_other_sizes_with_codes_name_the_way_out(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(StoryboardError, match="--base-only"):
        prepare(board(height=64), model=str(tiny_model), output=tmp_path / "a.mp4")


@pytest.mark.ray
def test_ray_makes_the_same_film_with_a_base(base_model: Path, tmp_path: Path, ray_session: Any) -> None:
    film = board(aspect="9:21", resolution="144p")  # frames are cut
    local = make(base_model, tmp_path / "local.mp4", film)
    ray = make(base_model, tmp_path / "ray.mp4", film, executor="ray")
    assert all(torch.equal(a, b) for a, b in zip(local, ray, strict=True))
    assert (tmp_path / "ray.mp4").read_bytes() == (tmp_path / "local.mp4").read_bytes()


# --- frame sizes by name -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "size"),
    [
        ({"aspect": "9:16", "resolution": "240p"}, (240, 426)),
        ({"aspect": "portrait", "resolution": "240p"}, (426, 240)),
        ({"aspect": "9:21", "resolution": "144p"}, (124, 290)),  # 125 x 291 by name, but H.264 needs even ones
        ({"resolution": "144p"}, (192, 192)),
        ({"resolution": 256, "aspect": "1:4"}, (128, 512)),
        ({"aspect": "landscape"}, (32, 48)),  # as many pixels as the model's own, 1536
        ({"aspect": "4:1"}, (80, 16)),
        ({}, (None, None)),
    ],
)
def test_sizes_by_name_are_those_of_the_table(tiny_model: Path, values: dict[str, Any], size: tuple[int, int]) -> None:
    from arlon.film.geometry import open_model, read_geometry

    geometry = read_geometry(open_model(str(tiny_model))[0])
    found = with_frame_size(board(**values), geometry)
    assert (found.height, found.width) == size
    assert (found.aspect, found.resolution) == (None, None)
    assert with_frame_size(found, geometry) == found


NAMED = {"aspect": "9:21", "resolution": "144p"}  # 124 x 290, made at 128 x 304


def test_a_named_size_is_the_centre_of_a_film_of_the_next_size(base_model: Path, tmp_path: Path) -> None:
    named = prepare(board(**NAMED), model=str(base_model), output=tmp_path / "a.mp4", settings={"num_threads": 1})
    generate(named)
    larger = make(base_model, tmp_path / "b.mp4", board(height=128, width=304))
    assert read_video(tmp_path / "a.mp4").shape[1:3] == (124, 290)
    folder = RunFolder(named.paths.run_dir)
    worker, latents = DecodeWorker(named.job), [folder.read_latent(index) for index in range(2)]
    for request, latent, expected in zip(film_requests(named.job), latents, larger, strict=True):
        assert latent.equal(expected)
        decode = replace(request.decode, refined=RefineResult.from_disk(latent))
        whole = worker.run(replace(decode, size=None)).frames
        assert whole.shape[1:3] == (128, 304)
        assert np.array_equal(worker.run(decode).frames, whole[:, 2:126, 7:297])


def test_a_film_of_a_named_size_is_what_it_says(base_model: Path, tmp_path: Path) -> None:
    whole = prepare(board(**NAMED), model=str(base_model), output=tmp_path / "a.mp4", settings={"num_threads": 1})
    made = generate(whole)
    assert not list(verify_run(open_run(made.run_dir)))
    film = parse_storyboard(read_film_record(made.film)["storyboard"])
    assert (film.height, film.width, film.resolution) == (124, 290, None)
    again = prepare(film, model=str(base_model), output=tmp_path / "b.mp4", settings={"num_threads": 1})

    def stop(progress: FilmProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(again, on_progress=stop)
    run = open_run(again.paths.run_dir)
    assert generate(run.prepared, begin=lambda *_: continue_run(run)).film_hash == made.film_hash


def test_plan_and_inspect_state_both_sizes(base_model: Path, tmp_path: Path) -> None:
    common = ["--model", str(base_model), "--prompt", "a", "--aspect", "9:21", "--resolution", "144p"]
    planned = CliRunner().invoke(app, ["plan", *common])
    assert "made at 304 x 128, cut to 290 x 124 (width x height)" in " ".join(planned.output.split())
    one = prepare_picture(picture_board(**NAMED), model=str(base_model), output=tmp_path / "a.png")
    make_picture(one)
    assert Image.open(tmp_path / "a.png").size == (290, 124)
    told = CliRunner().invoke(app, ["inspect", str(tmp_path / "a.png")])
    assert "290 x 124 pixels, computed at 304 x 128" in " ".join(told.output.split())
    odd = replace(board(**NAMED), height=128)
    with pytest.raises(StoryboardError, match=r"height.*width.*aspect.*resolution"):
        prepare(odd, model=str(base_model), output=tmp_path / "c.mp4")


def test_a_size_and_a_name_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(StoryboardError, match=r"height.*width.*aspect.*resolution"):
        prepare(board(height=32, aspect="9:16"), model=str(tiny_model), output=tmp_path / "a.mp4")
    with pytest.raises(StoryboardError, match="resolution must be one of"):
        board(resolution="241p")
    with pytest.raises(StoryboardError, match="unknown aspect"):
        board(aspect="wide")


# --- pictures ------------------------------------------------------------------------------------------------


def picture_board(**values: Any) -> Storyboard:
    return parse_storyboard({"seed": 7, "shots": [{"prompt": "a red circle", "duration": "1f"}], **values})


def test_a_picture_is_one_decoded_latent_frame(tiny_model: Path, tmp_path: Path) -> None:
    prepared = prepare_picture(
        picture_board(), model=str(tiny_model), output=tmp_path / "a.png", settings={"num_threads": 1}
    )
    seen: list[Any] = []
    run = RefineWorker.run

    def keep(self: RefineWorker, request: Any) -> Any:
        seen.append((request, run(self, request)))
        return seen[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RefineWorker, "run", keep)
        result = make_picture(prepared)
    ((request, refined),) = seen
    assert refined.latent.shape == (1, 4, 1, HEIGHT // 8, WIDTH // 8)
    assert request.fps == 120.0
    assert request.codes.codes.shape[1] == 1
    with torch.inference_mode():
        video = VideoVAE.from_pretrained(tiny_model / "vae").decode(refined.latent, 1)
    expected = ((video[0, :, 0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    assert np.array_equal(np.array(Image.open(result.picture)), expected.numpy())


def test_times_of_a_picture_are_those_of_one_frame(tiny_model: Path, tmp_path: Path) -> None:
    prepared = prepare_picture(picture_board(), model=str(tiny_model), output=tmp_path / "a.png")
    film = prepare(board(), model=str(tiny_model), output=tmp_path / "b.mp4")
    steps: list[list[float]] = []
    with pytest.MonkeyPatch.context() as patch:
        integrate = conditioning.integrate

        def seen(velocity: Any, x: Any, times: torch.Tensor, **options: Any) -> Any:
            steps.append(times.tolist())
            return integrate(velocity, x, times, **options)

        patch.setattr(conditioning, "integrate", seen)
        make_picture(prepared)
        generate(film)
    assert steps[0][1] < steps[1][1], "fewer frames, less shift towards noise"


def test_a_picture_says_what_it_was_made_from(tiny_model: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    common = ["generate", "--model", str(tiny_model), "--prompt", "a red circle", "--num-frames", "1", "--seed", "7"]
    result = runner.invoke(app, [*common, "--output", str(tmp_path / "a.png")])
    assert result.exit_code == 0, result.output
    record = read_film_record(tmp_path / "a.png")
    assert record["storyboard"]["shots"][0]["prompt"] == "a red circle"
    assert str(tmp_path) not in json.dumps(record)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert runner.invoke(app, ["inspect", str(tmp_path / "a.png")]).exit_code == 0
    again = runner.invoke(app, [*common, "--output", str(tmp_path / "a.png")])
    assert again.exit_code == 2
    assert "--overwrite" in again.output
    plain = runner.invoke(app, [*common, "--output", str(tmp_path / "b.png"), "--no-metadata"])
    assert plain.exit_code == 0
    assert b"comment" not in (tmp_path / "b.png").read_bytes()
    assert np.array_equal(np.array(Image.open(tmp_path / "a.png")), np.array(Image.open(tmp_path / "b.png")))


def test_a_base_makes_pictures_of_any_size(base_model: Path, tmp_path: Path) -> None:
    film = picture_board(height=48, width=32)
    make_picture(prepare_picture(film, model=str(base_model), output=tmp_path / "a.png"))
    assert Image.open(tmp_path / "a.png").size == (32, 48)


@pytest.mark.parametrize(
    ("shots", "output", "message"),
    [
        ([{"prompt": "a", "duration": "1f"}], "a.mp4", "one frame is a picture: name the output"),
        ([{"prompt": "a", "duration": "2f"}], "a.png", "would be a picture, which is one frame"),
        ([{"prompt": "a", "duration": "1f"}] * 2, "a.png", "would be a picture, which is one frame"),
    ],
)
def test_name_and_length_must_fit(shots: list[dict[str, str]], output: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        is_picture(parse_storyboard({"shots": shots}), output)


def test_a_picture_takes_no_reference_and_no_cluster(tiny_model: Path, tmp_path: Path) -> None:
    film = parse_storyboard({"shots": [{"prompt": "a", "duration": "1f", "image": "x.png"}]})
    with pytest.raises(UsageError, match="leave out image"):
        prepare_picture(film, model=str(tiny_model), output=tmp_path / "a.png")
    common = ["plan", "--model", str(tiny_model), "--prompt", "a", "--num-frames", "1", "--image", "x.png"]
    assert "leave out image" in CliRunner().invoke(app, common).output
    common = ["generate", "--model", str(tiny_model), "--prompt", "a", "--num-frames", "1", "--output"]
    result = CliRunner().invoke(app, [*common, str(tmp_path / "a.png"), "--executor", "ray", "--sheet", "--hls"])
    assert result.exit_code == 2
    assert "made in one process: leave out --executor, --sheet, --hls" in result.output


def test_lengths_have_the_names_of_the_original(tiny_model: Path) -> None:
    common = ["plan", "--model", str(tiny_model), "--prompt", "a", "--base-only", "--json", "--num-frames"]
    named = CliRunner().invoke(app, [*common, "2x", "--set", "segment=30"])
    assert json.loads(named.output)["num_frames"] == 102
    assert len(json.loads(named.output)["segments"]) == 1
    refused = CliRunner().invoke(app, [*common, "3x"])
    assert refused.exit_code == 2
    assert "--num-frames must be a whole number or one of 1x, 2x, 4x, 8x, 16x, got '3x'" in refused.output


def test_the_plan_of_a_picture_is_one_frame_on_every_grid(tiny_model: Path, tmp_path: Path) -> None:
    plan = clip_plan(plan_film(picture_board(), str(tiny_model)).plan, 1)
    (segment,) = plan.segments
    assert (plan.num_frames, segment.num_latents, segment.num_code_frames, plan.takes[0].num_latents) == (1, 1, 1, 1)
