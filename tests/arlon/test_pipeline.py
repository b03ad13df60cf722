"""Films from Python: the same bits as the command line's, in memory, with the same refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import arlon
from arlon import ArlonPipeline, Film
from arlon.data.video_io import read_tags
from arlon.errors import CheckpointError, StoryboardError, UsageError
from pipelines.runs.generate import generate
from pipelines.store.run_folder import RunFolder
from tests.pipelines.films import prepared_film
from tests.pipelines.tiny_model import FPS, HEIGHT, WIDTH

PROMPTS = ["a red circle moves left", "a green circle moves left"]
SCRIPT = {
    "seed": 7,
    "shots": [
        {"prompt": PROMPTS[0], "duration": "51f"},
        {"prompt": PROMPTS[1], "duration": "34f", "blend": 1},
        {"prompt": "a blue square", "duration": "51f", "transition": "cut"},
    ],
}


@pytest.fixture(scope="module")
def pipe(tiny_model: Path) -> ArlonPipeline:
    return ArlonPipeline.from_pretrained(tiny_model, num_threads=1)


@pytest.fixture(scope="module")
def film(pipe: ArlonPipeline) -> Film:
    return pipe(SCRIPT, progress=False)


def test_a_film_has_the_bits_of_the_command_line(tiny_model: Path, tmp_path: Path, film: Film) -> None:
    result = generate(prepared_film(tiny_model, tmp_path / "a.mp4", *SCRIPT["shots"]))
    assert film.save(tmp_path / "b" / "b.mp4").read_bytes() == result.film.read_bytes()
    folder = RunFolder(result.run_dir)
    stored = torch.cat([folder.read_latent(index) for index in (0, 1)], dim=2)
    assert torch.equal(film.latents[0], stored)
    assert torch.equal(film.latents[1], folder.read_latent(2))
    codes = folder.read_codes()
    assert all(torch.equal(film.codes[take], codes[take]) for take in (0, 1))
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["b.mp4"]


def test_a_film_holds_frames_and_says_how_it_was_made(film: Film, tmp_path: Path) -> None:
    assert film.frames.shape == (136, HEIGHT, WIDTH, 3)
    assert film.frames.dtype == np.uint8
    assert (film.fps, film.seed) == (FPS, 7)
    assert [(s.index, s.shot, s.take, s.start_frame, len(s.frames)) for s in film.segments] == [
        (0, 0, 0, 0, 51),
        (1, 1, 0, 51, 34),
        (2, 2, 1, 85, 51),
    ]
    tagged, plain = film.save(tmp_path / "a.mp4"), film.save(tmp_path / "b.mp4", metadata=False)
    assert "storyboard" in read_tags(tagged)["comment"]
    assert "comment" not in read_tags(plain)


def test_segments_come_one_by_one_and_networks_stay_loaded(pipe: ArlonPipeline, film: Film) -> None:
    threads = torch.get_num_threads()
    stream = pipe.stream(SCRIPT)
    for segment, expected in zip(stream, film.segments, strict=True):
        assert torch.get_num_threads() == threads
        assert np.array_equal(segment.frames, expected.frames)


def test_options_and_media_reach_the_film(pipe: ArlonPipeline, tmp_path: Path) -> None:
    picture = tmp_path / "start.png"
    Image.new("RGB", (WIDTH, HEIGHT), "red").save(picture)
    script = {"shots": [{"prompt": PROMPTS[0], "duration": "51f", "image": str(picture)}]}
    options = {"seed": 3, "num_inference_steps": 1, "guidance_scale": 1.0, "solver": "midpoint", "progress": False}
    short = pipe(script, **options)
    board = short.plan.storyboard
    assert (board.seed, board.num_inference_steps, board.guidance_scale, board.solver) == (3, 1, 1.0, "midpoint")
    without = pipe(PROMPTS[0], seconds=51 / FPS, **options)
    assert not torch.equal(short.latents[0], without.latents[0])
    base = pipe(PROMPTS[0], seconds=1, use_codes=False, progress=False)
    assert base.codes == ()


def test_a_plan_costs_nothing_and_a_random_seed_is_told(pipe: ArlonPipeline) -> None:
    plan = pipe.plan(PROMPTS, seconds=51 / FPS)
    assert (plan.num_frames, len(plan.shots)) == (51 + 68, 2)
    seeds = {pipe.plan(PROMPTS).storyboard.seed for _ in range(3)}
    assert len(seeds) == 3


@pytest.mark.parametrize(
    ("script", "options", "error", "named"),
    [
        ([], {}, UsageError, "prompt"),
        ([1], {}, UsageError, "prompt"),
        ("  ", {}, StoryboardError, "prompt"),
        ("a", {"seconds": -1}, UsageError, "seconds"),
        ("a", {"num_inference_step": 3}, UsageError, "did you mean 'num_inference_steps'"),
        ("a", {"solver": "eulr"}, UsageError, "did you mean 'euler'"),
        ("a", {"height": 31}, StoryboardError, "height"),
        ("a", {"crf": 99}, UsageError, "crf"),
        ({"shots": [{"prompt": "a", "image": "missing.png"}]}, {}, StoryboardError, "missing.png"),
    ],
)
def test_bad_requests_are_refused_before_any_work(
    pipe: ArlonPipeline, script: Any, options: dict[str, Any], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        pipe(script, progress=False, **options)
    with pytest.raises(error, match=named):
        pipe.stream(script, **options)  # before the first segment is asked for


def test_models_that_cannot_be_used_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="shape"):
        ArlonPipeline.from_pretrained("shape")
    with pytest.raises(UsageError, match="num_thread"):
        ArlonPipeline.from_pretrained(tiny_model, num_thread=1)
    with pytest.raises(UsageError, match="device"):
        ArlonPipeline.from_pretrained(tiny_model, device="abacus")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model_index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"model_index\.json"):
        ArlonPipeline.from_pretrained(broken)
    with pytest.raises(UsageError, match=r"\.mp4"):
        Film(segments=(), plan=None, settings=None, record={}).save(tmp_path / "film.avi")  # type: ignore[arg-type]


def test_importing_arlon_loads_nothing_heavy_until_a_name_is_used() -> None:
    code = (
        "import sys, arlon; print(sorted({'torch', 'numpy', 'av'} & set(sys.modules)), 'ArlonPipeline' in dir(arlon))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "[] True\n"
    assert set(arlon.__all__) <= set(dir(arlon))
    assert all(getattr(arlon, name) is not None for name in arlon.__all__)
    with pytest.raises(AttributeError, match="Pipeline"):
        _ = arlon.Pipeline
