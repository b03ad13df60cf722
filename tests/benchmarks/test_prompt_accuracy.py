"""The films of the benchmark against those of the pipeline, and the parts that its modes take away."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arlon.checkpoint import read_json, write_model_index
from arlon.data.transforms import video_to_frames
from arlon.evaluation import cases as suite
from arlon.film.storyboard import parse_storyboard
from arlon.models.injection import SemanticInjection
from arlon.models.video_vae import VideoVAE
from benchmarks import prompt_accuracy as bench
from pipelines.runs.generate import generate
from pipelines.runs.prepare import prepare
from pipelines.store.run_folder import RunFolder
from tests.pipelines.tiny_model import FPS, HEIGHT, WIDTH, make_tiny_model

pytestmark = pytest.mark.slow

SECONDS = [51 / FPS, 34 / FPS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def case() -> suite.Case:
    return suite.sample_cases(1, seconds=SECONDS, aspect=WIDTH / HEIGHT)[0]


def make(model: bench.Model, case: suite.Case, mode: bench.Mode) -> list[np.ndarray]:
    return bench.FilmMaker(model.job(case), mode).shots(model.job(case))


def is_same(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_frames_are_those_of_the_film(folder, case, tmp_path):
    shots = [
        {"prompt": prompt, "duration": shot.seconds}
        for prompt, shot in zip(case.prompts, case.scene.shots, strict=True)
    ]
    storyboard = parse_storyboard({"seed": case.seed, "shots": shots})
    film = generate(prepare(storyboard, model=str(folder), output=tmp_path / "film.mp4", settings={"num_threads": 1}))
    stored, vae = RunFolder(film.run_dir), VideoVAE.from_pretrained(folder / "vae")
    expected = [
        video_to_frames(vae.decode(stored.read_latent(index), num_frames).detach()[0])
        for index, num_frames in enumerate((51, 34))
    ]
    assert is_same(make(bench.load_model(str(folder)), case, "arlon"), expected)


def test_a_film_does_not_depend_on_the_films_before_it(folder, case):
    model = bench.load_model(str(folder))
    maker = bench.FilmMaker(model.job(case))
    first = maker.shots(model.job(case))
    maker.shots(model.job(replace(case, seed=case.seed + 1)))
    assert is_same(maker.shots(model.job(case)), first)


def test_base_mode_is_the_model_with_a_fresh_injection(folder, case, tmp_path):
    fresh = make_tiny_model(tmp_path / "fresh")
    SemanticInjection(SemanticInjection.from_pretrained(fresh / "injection").config).save_pretrained(
        fresh / "injection"
    )
    write_model_index(fresh, read_json(fresh / "model_index.json", "a model index")["defaults"])
    base = make(bench.load_model(str(folder)), case, "base")
    assert is_same(base, make(bench.load_model(str(fresh)), case, "arlon"))
    assert not is_same(base, make(bench.load_model(str(folder)), case, "arlon"))


def test_codes_mode_has_no_diffusion(folder, case):
    one = make(bench.load_model(str(folder), num_inference_steps=1, guidance_scale=1.0), case, "codes")
    three = make(bench.load_model(str(folder), num_inference_steps=3, guidance_scale=9.0), case, "codes")
    other = make(bench.load_model(str(folder), settings={"ar_temperature": 3.0}), case, "codes")
    assert is_same(one, three)
    assert not is_same(one, other)
    assert [len(frames) for frames in one] == [51, 34]


def test_true_codes_are_those_of_the_scene_and_not_of_the_code_model(folder, case):
    model = bench.load_model(str(folder))
    job = model.job(case)
    codes = bench.SceneEncoder(job)(case)
    maker = bench.FilmMaker(job, "true_codes")
    made = list(maker.segments(job, codes))
    assert all(np.array_equal(part.codes.codes, codes[:, : part.codes.codes.shape[1]]) for part in made)
    assert made[-1].codes.codes.shape == codes.shape
    assert is_same(maker.shots(job, codes), bench.FilmMaker(job).shots(job, codes))
    assert not is_same(maker.shots(job, codes), make(model, case, "arlon"))
    with pytest.raises(ValueError, match="wanted"):
        maker.shots(job, codes[:, :1])
    with pytest.raises(ValueError, match="must be given"):
        maker.shots(job)


@pytest.mark.parametrize("mode", bench.MODES)
def test_the_command_writes_table_figures_and_sheet(mode, folder, tmp_path, capsys):
    figures, sheet = tmp_path / "figures.json", tmp_path / "sheet.png"
    options = ["--prompts", "2", "--switches", "1", "--mode", mode, "--json", str(figures), "--sheet", str(sheet)]
    bench.main(["--model", str(folder), *options])
    printed = capsys.readouterr()
    assert "colour" in printed.out
    assert "2/2" in printed.err
    record = json.loads(figures.read_text())
    assert [len(record["cases"][name]) for name in ("prompts", "switches")] == [2, 1]
    right = [case["scores"]["background"] for case in record["cases"]["prompts"]]
    assert record["figures"]["prompts"]["background"]["right"]["mean"] == sum(right) / 2
    assert str(tmp_path) not in figures.read_text()
    assert Image.open(sheet).height > 4 * HEIGHT


def test_where_figures_go_is_looked_at_before_films_are_made(tmp_path):
    for option in ("--json", "--sheet"):
        with pytest.raises(SystemExit, match=r"error: .* is a folder"):
            bench.main(["--model", "nothing", option, str(tmp_path)])
    with pytest.raises(SystemExit, match="error: unknown model"):
        bench.main(["--model", "nothing", "--json", str(tmp_path / "new" / "figures.json")])
    assert (tmp_path / "new").is_dir()


def test_bad_options_end_in_one_line(folder, capsys):
    with pytest.raises(SystemExit, match=r"error: .*temperature"):
        bench.main(["--model", str(folder), "--prompts", "1", "--ar-temperature", "-1"])
    with pytest.raises(SystemExit, match="error: unknown model"):
        bench.main(["--model", "nothing"])
    with pytest.raises(SystemExit):
        bench.main(["--prompts", "0", "--switches", "0"])
    assert "count cases" in capsys.readouterr().err
