"""What wrong codes cost the loss: figures made by hand, a loss time by time, an injection of nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from arlon.film.messages import CodeResult
from arlon.film.schedule import film_requests, text_request
from arlon.film.workers import TextWorker
from arlon.models.injection import SemanticInjection
from arlon.models.stdit import STDiT3
from benchmarks.paper import variants, wrong_codes
from benchmarks.paper.experiments import EXPERIMENTS
from benchmarks.prompt_accuracy import SceneEncoder, load_model

pytestmark = pytest.mark.slow


def losses(right: float, *costs: float, without: float) -> wrong_codes.Losses:
    rows = zip(map(str, wrong_codes.SHARES), (0.0, *costs), strict=True)
    return {share: right + cost for share, cost in rows} | {wrong_codes.NO_CODES: without}


def test_figures_are_differences_within_a_scene() -> None:
    plain = [losses(1.0, 0.1, 0.4, 0.5, 0.6, without=2.0), losses(3.0, 0.1, 0.2, 0.5, 0.6, without=5.0)]
    other = [losses(2.0, 0.0, 0.1, 0.2, 0.3, without=2.0), losses(2.0, 0.0, 0.3, 0.2, 0.3, without=5.0)]
    found = wrong_codes.figures(other, plain)
    means = {name: round(share.mean, 6) for name, share in found.items()}
    assert means == {
        "right codes": 2.0,
        "5% wrong": 0.0,
        "10% wrong": 0.2,
        "20% wrong": 0.2,
        "30% wrong": 0.3,
        "no codes": 1.5,
        "less half of plain": 0.05,  # (0.1 - 0.2 + 0.3 - 0.1) / 2
    }
    assert (round(found["less half of plain"].low, 6), round(found["less half of plain"].high, 6)) == (-0.1, 0.2)
    assert "less half of plain" not in wrong_codes.figures(plain, None)
    table = wrong_codes.to_markdown({"other": found}, 2, {"name": "m", "hash": "0" * 64}, "command", "")
    assert "| other | 2000.0 [2000.0, 2000.0] | 0.0 [0.0, 0.0] | 200.0 [100.0, 300.0] |" in table


def silent(model: Path, folder: Path) -> Path:
    """The model with an injection of nothing."""
    shutil.copytree(model, folder)
    injection = SemanticInjection.from_pretrained(folder / "injection")
    names = {name for name, module in injection.named_modules() if module in injection.design.output_layers()}
    weights = folder / "injection" / "model.safetensors"
    tensors = {
        key: torch.zeros_like(value) if key.rpartition(".")[0] in names else value
        for key, value in load_file(weights).items()
    }
    save_file(tensors, weights)
    return folder


def test_losses_are_those_of_every_time_by_itself(tiny_model: Path, tmp_path: Path) -> None:
    model = load_model(str(tiny_model))
    cases = EXPERIMENTS["resilience"].cases(2, model.geometry)
    injections = {"own": tiny_model, "silent": silent(tiny_model, tmp_path / "silent")}
    progress: list[tuple[int, int]] = []
    found = wrong_codes.measure(model, injections, cases, lambda *numbers: progress.append(numbers))
    assert progress == [(1, 2), (2, 2)]
    for scene in found["silent"]:
        assert set(scene.values()) == {scene[wrong_codes.NO_CODES]}, "nothing is injected, whatever the codes"
    for scene in found["own"]:
        assert len(set(scene.values())) == len(scene), "every share gives another loss"

    job = model.job(cases[1])
    latent = SceneEncoder(job).latent(cases[1])
    codes = SceneEncoder(job).codes(latent)
    text = TextWorker(job).run(text_request(job.plan))
    asked = next(iter(film_requests(job))).refine
    request = replace(asked, text=text, codes=CodeResult(codes=codes, elapsed_s=0.0))
    worker = wrong_codes.LossWorker(job)
    latent = latent[:, :, : request.segment.num_latents]
    noise = wrong_codes.samplers.draw_noise((wrong_codes.NUM_TIMES, *latent.shape[1:]), cases[1].seed, "wrong codes")
    features = text.features[request.prompt]
    defaults = model.geometry.defaults
    area = (request.height * request.width) ** 0.5 / defaults.shift_base_size
    frames = max(request.segment.num_frames // 17 * 5, 1)
    shift = area * frames**0.5 * defaults.shift_scale
    dit = STDiT3.from_pretrained(tiny_model / "dit")
    errors = []
    with torch.inference_mode():
        inject = worker.injection.condition(worker.coarse_latent(codes, request))
        for row in range(wrong_codes.NUM_TIMES):
            t = (row + 0.5) / wrong_codes.NUM_TIMES
            t = shift * t / (1 + (shift - 1) * t)
            noisy = (1 - t) * latent + t * noise[row : row + 1]
            size = {"fps": request.fps, "height": float(request.height), "width": float(request.width)}
            time = torch.tensor([t], dtype=torch.float32)
            velocity = dit(noisy.float(), time, features.tokens, features.mask, inject=inject, **size)
            errors.append(float((velocity - (noise[row : row + 1] - latent)).square().mean()))
    assert found["own"][1]["0.0"] == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_the_table_compares_every_training(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = {"steps": 7, "settings": ["a.b=1"], "config": "0"}
    monkeypatch.setattr(wrong_codes, "shared_training", lambda folder, names: training)
    monkeypatch.setattr(wrong_codes, "variant_model", lambda folder, name, model: tiny_model)
    wrong_codes.main(["--scenes", "1", "--model", str(tiny_model), "--output", str(tmp_path / "tables")])
    table = (tmp_path / "tables" / "wrong_codes.md").read_text()
    contents = json.loads((tmp_path / "tables" / "wrong_codes.json").read_text())
    names = [variant.name for variant in variants.RESILIENCE]
    assert all(f"| {name} |" in table for name in names)
    assert "7 steps: `python -m benchmarks.paper.variants --steps 7 --only resilience -- a.b=1`" in table
    assert set(contents["losses"]) - set(names) == {f"the model {tiny_model.name}"}
    plain, other = (contents["figures"][name] for name in ("fine codes, no noise", "coarser codes, no noise"))
    half = plain["10% wrong"]["mean"] / 2
    assert other["less half of plain"]["mean"] == pytest.approx(half, abs=1e-6)


def test_bad_input_ends_in_one_line(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        wrong_codes.parse_args(["--scenes", "0"])
    places = [str(wrong_codes.parse_args(given).output) for given in ([], ["--scenes", "2"], ["--model", "other"])]
    assert places == ["docs/results", "outputs/paper/tables", "outputs/paper/tables"]
    with pytest.raises(SystemExit, match="error: unknown model"):
        wrong_codes.main(["--model", "nothing"])
    places = ["--model", str(tiny_model), "--variants", str(tmp_path), "--output", str(tmp_path / "tables")]
    with pytest.raises(SystemExit, match="error: 'fine codes, no noise' is not trained"):
        wrong_codes.main(places)
    assert not (tmp_path / "tables").exists()
