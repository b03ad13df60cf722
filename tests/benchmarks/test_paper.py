"""The paper's experiments: the same films under every condition, and tables that say what the records say."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from arlon.evaluation import cases as suite
from arlon.film.geometry import open_model
from arlon.film.messages import CodeResult
from arlon.shapes import world
from benchmarks.paper import conditions
from benchmarks.paper.__main__ import main, parse_args
from benchmarks.paper.conditions import Condition, flip_codes, run_condition
from benchmarks.paper.experiments import EXPERIMENTS, QUARTER_FIGURES, SUITE_SEED, Experiment
from benchmarks.paper.tables import (
    accuracy_by_pair,
    cost,
    figure_differences,
    figure_shares,
    figures_by_shot,
    to_json,
    to_markdown,
)
from benchmarks.prompt_accuracy import load_model, make_cases
from benchmarks.prompt_accuracy import parse_args as parse_suite

pytestmark = pytest.mark.slow


def record(shape: float | None, seconds: float, shots: list[dict[str, float | None]]) -> conditions.Record:
    return {
        "figures": {"prompt_shape": shape},
        "shots": shots,
        "asked": [{"held_out": i == 0 or shape == 1.0, "motions": ["left", "up"][:i]} for i in range(len(shots))],
        "seconds": {"total": seconds, "code": seconds / 4, "refine": seconds / 2, "film": 2.0},
        "calls": 10,
    }


RECORDS = [
    record(
        1.0, 4.0, [{"colour": 1.0, "speed": None, "direction": 0.0, "both_objects": 0.0}, {"colour": 0.0, "shape": 1.0}]
    ),
    record(None, 8.0, [{"colour": 0.0}, {"colour": 0.0, "shape": 0.0}]),
    record(0.0, 6.0, [{"colour": 1.0}, {"colour": 1.0, "shape": 1.0}]),
]


def test_share_of_flipped_codes_is_the_one_asked_for_and_every_flip_changes_a_code() -> None:
    codes = torch.randint(0, 64, (1, 50, 4, 4), generator=torch.Generator().manual_seed(0))
    flipped = flip_codes(codes, 0.2, 64, seed=3)
    assert (flipped != codes).float().mean().item() == pytest.approx(0.2, abs=0.04)
    assert (flipped.min(), flipped.max()) >= (0, 0)
    assert flipped.max() < 64
    assert torch.equal(flip_codes(codes, 0.0, 64, seed=3), codes)
    assert (flip_codes(codes, 1.0, 64, seed=3) != codes).all()


def test_flips_of_the_first_frames_do_not_depend_on_the_later_ones() -> None:
    codes = torch.zeros(1, 9, 4, 4, dtype=torch.int64)
    assert torch.equal(flip_codes(codes, 0.5, 64, seed=1)[:, :4], flip_codes(codes[:, :4], 0.5, 64, seed=1))
    assert not torch.equal(flip_codes(codes, 0.5, 64, seed=1), flip_codes(codes, 0.5, 64, seed=2))


def test_figures_leave_out_what_a_film_does_not_show() -> None:
    share = figure_shares(RECORDS, ["prompt_shape"])["prompt_shape"]
    assert (share.mean, share.count) == (0.5, 2)


def test_figures_by_shot_is_the_mean_of_what_a_prompt_states() -> None:
    first, second = figures_by_shot(RECORDS)["accuracy"]
    assert first.mean == pytest.approx(2 / 3)
    assert second.mean == pytest.approx((0.5 + 0 + 1) / 3)


def test_later_shots_are_told_apart_by_whether_training_may_have_shown_their_pairs() -> None:
    found = [accuracy_by_pair(RECORDS, held_out=held_out) for held_out in (True, False)]
    assert [(share["accuracy"].mean, share["accuracy"].count) for share in found] == [(0.5, 1), (0.5, 2)]
    assert [share["colour"].mean for share in found] == [0, 0.5]
    experiment = Experiment(title="T", claim="C", conditions=(), figures=("prompt_shape",), segments=(1, 1))
    table = to_markdown(experiment, {"a": RECORDS}, {"name": "m", "hash": "h"}, "run me")
    assert "held-out attribute pairs in the first shot and in 1 of 3 later ones, the same" in table
    assert "| a | held out | 0.50 [0.50, 0.50] | 0.00 [0.00, 0.00] |" in table
    assert "Motions asked for there: left 3." in table


def test_records_say_which_shots_show_held_out_pairs() -> None:
    looks = [world.ObjectLook(colour="red", shape=s, size="large", motion="up", speed="fast") for s in world.SHAPES]
    shots = [world.Shot(objects=(look,), background="sky", seconds=1.0) for look in looks]
    assert [conditions._asked(shot)["held_out"] for shot in shots] == [False, False, False, True]
    assert conditions._asked(replace(shots[0], objects=(looks[0], looks[3]))) == {
        "held_out": True,
        "motions": ["up", "up"],
    }


def test_every_attribute_has_its_interval_at_each_position() -> None:
    rows = figures_by_shot(RECORDS)
    assert [share.mean for share in rows["colour"]] == pytest.approx([2 / 3, 1 / 3])
    assert (rows["colour"][0].low, rows["colour"][0].high) == suite.bootstrap_interval(np.array([1.0, 0.0, 1.0]))
    assert [share.count for share in rows["shape"]] == [0, 3]
    experiment = Experiment(title="T", claim="C", conditions=(), figures=("prompt_shape",), segments=(1, 1))
    named = {"name": "m", "hash": "h"}
    table = to_markdown(experiment, {"a": RECORDS}, named, "run me")
    assert "**shape**\n\n|  | 1 | 2 |\n| --- | --- | --- |\n| a |  | 0.67 [0.00, 1.00] |\n" in table
    assert "**speed**" not in table, "no prompt states it"
    stored = to_json(experiment, {"a": RECORDS}, named)["conditions"]["a"]["by_shot"]
    assert stored["shape"][1]["count"] == 3


def test_cost_is_that_of_the_middle_film() -> None:
    assert cost(RECORDS) == {"seconds_per_second": 3.0, "ar_share": 0.25, "dit_calls": 10}


def test_table_has_a_row_a_condition_and_a_column_a_figure() -> None:
    experiment = Experiment(title="T", claim="C", conditions=(), figures=("prompt_shape",), segments=(1, 1))
    table = to_markdown(experiment, {"a": RECORDS, "b": RECORDS[:1]}, {"name": "m", "hash": "h"}, "run me")
    rows = [line for line in table.splitlines() if line.startswith("| a") or line.startswith("| b")]
    assert rows[0] == "| a | 0.50 [0.00, 1.00] | 3.00 | 25% | 10 |"
    assert rows[6:8] == [
        "| a | 0.67 [0.00, 1.00] | 0.50 [0.00, 1.00] |",
        "| b | 1.00 [1.00, 1.00] | 0.50 [0.50, 0.50] |",
    ]


def test_quarters_have_a_table_of_their_own() -> None:
    figures = ("prompt_shape", "prompt_shape_first", "prompt_shape_last", "prompt_shape_change")
    films = [{**r, "figures": r["figures"] | dict.fromkeys(figures[1:], 0.25)} for r in RECORDS]
    experiment = Experiment(title="T", claim="C", conditions=(), figures=figures)
    table = to_markdown(experiment, {"a": films}, {"name": "m", "hash": "h"}, "run me")
    assert "| a | 0.50 [0.00, 1.00] | 3.00 | 25% | 10 |" in table
    assert f"| shape | a |{' 0.25 [0.25, 0.25] |' * 3}" in table
    assert set(QUARTER_FIGURES) < set(EXPERIMENTS["long"].figures)


def test_no_attribute_is_left_out_of_the_tables() -> None:
    names = {f"prompt_{name}" for name in suite.PROMPT_ATTRIBUTES}
    assert names < set(EXPERIMENTS["short"].figures)
    assert {f"{name}_last" for name in names} < set(EXPERIMENTS["long"].figures)


def test_films_are_made_once_and_the_same_ones_under_every_condition(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    geometry = load_model(str(tiny_model)).geometry
    two = EXPERIMENTS["short"].cases(2, geometry)
    assert [c.prompts for c in two] == [c.prompts for c in EXPERIMENTS["flips"].cases(3, geometry)[:2]]
    cases, made = two[:1], []
    film_record = conditions._film_record
    monkeypatch.setattr(conditions, "_film_record", lambda *a, **kw: made.append(1) or film_record(*a, **kw))

    def run(condition: Condition) -> list[conditions.Record]:
        return run_condition(
            condition, cases, tmp_path, model=str(tiny_model), written=written, progress=lambda done, total: None
        )

    written: dict[str, CodeResult] = {}
    plain, flipped = Condition(name="plain", steps=2), Condition(name="flips", steps=2, flipped=1.0)
    first = run(plain)
    assert len(made) == 1
    assert first[0]["calls"] == 2
    assert run(plain) == first
    assert len(made) == 1, "records are read, not made again"
    assert run(flipped)[0]["figures"] != first[0]["figures"]
    run(Condition(name="plain", steps=3))
    assert len(made) == 3, "another condition under the same name is made again"
    monkeypatch.setattr(conditions, "FORMAT", conditions.FORMAT + 1)
    run(plain)
    assert len(made) == 4, "and so are films that were measured by other definitions"


def test_films_made_under_other_defaults_of_the_model_are_made_again(tiny_model: Path) -> None:
    model = load_model(str(tiny_model))
    (case,) = EXPERIMENTS["short"].cases(1, model.geometry)
    key = conditions._key(Condition(name="plain"), case, model)
    defaults = replace(model.geometry.defaults, guidance_scale=model.geometry.defaults.guidance_scale + 1)
    for other in (
        replace(model, settings=replace(model.settings, vae_blend_frames=model.settings.vae_blend_frames + 1)),
        replace(model, geometry=replace(model.geometry, defaults=defaults)),
    ):
        assert other.model_hash == model.model_hash
        assert conditions._key(Condition(name="plain"), case, other) != key
    threads = replace(model, settings=replace(model.settings, num_threads=model.settings.num_threads + 1))
    assert conditions._key(Condition(name="plain"), case, threads) == key


def test_codes_are_taken_over_where_the_ar_model_would_write_the_same_ones(tiny_model: Path, tmp_path: Path) -> None:
    cases = EXPERIMENTS["short"].cases(1, load_model(str(tiny_model)).geometry)

    def run(condition: Condition, folder: str, written: dict[str, CodeResult]) -> list[conditions.Record]:
        place = {"folder": tmp_path / folder, "model": str(tiny_model)}
        return run_condition(condition, cases, written=written, progress=lambda done, total: None, **place)

    plain, warm = Condition(name="a", steps=2), Condition(name="b", steps=2, settings={"ar_temperature": 1.5})
    written: dict[str, CodeResult] = {}
    first = run(plain, "first", written)
    assert len(written) == len(cases)
    again = run(plain, "again", written)
    assert [r["figures"] for r in again] == [r["figures"] for r in first]
    assert [r["seconds"]["code"] for r in again] == [r["seconds"]["code"] for r in first], "their seconds count"
    assert all(r["seconds"]["total"] > r["seconds"]["code"] for r in again)
    assert len(written) == len(cases)
    apart = run(warm, "apart", {})
    assert [r["figures"] for r in run(warm, "warm", written)] == [r["figures"] for r in apart]
    assert len(written) == 2 * len(cases)


def test_a_window_that_moves_further_writes_other_codes(tiny_model: Path, tmp_path: Path) -> None:
    geometry = load_model(str(tiny_model)).geometry
    cases = replace(EXPERIMENTS["context"], segments=(1, 1, 1)).cases(1, geometry)
    written: dict[str, CodeResult] = {}
    for hop in (1, 3):
        condition = Condition(name=f"hop {hop}", steps=1, window_hop=hop)
        run_condition(
            condition, cases, tmp_path, model=str(tiny_model), written=written, progress=lambda done, total: None
        )
    near, far = (result.codes for result in written.values())
    assert not torch.equal(near, far)
    assert torch.equal(near[:, :6], far[:, :6]), "the same until the window is full"


def test_an_experiment_writes_its_table_and_every_film(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, work = tmp_path / "results", tmp_path / "work"
    places = ["--model", str(tiny_model), "--output", str(out), "--work", str(work)]
    main(["flips", "--films", "2", "--only", "0 % flipped", *places])
    stored = json.loads((out / "flips.json").read_text())
    assert len(stored["conditions"]["0 % flipped"]["films"]) == 2
    assert (out / "flips.md").read_text() in capsys.readouterr().out
    assert not math.isnan(stored["conditions"]["0 % flipped"]["cost"]["seconds_per_second"])


def test_a_shot_of_some_segments_is_made_of_as_many(tiny_model: Path) -> None:
    model = load_model(str(tiny_model))
    for shots, segments in ((1, 5), (3, 2)):
        experiment = replace(EXPERIMENTS["seams"], segments=(segments,) * shots)
        plan = model.job(experiment.cases(1, model.geometry)[0]).plan
        assert [span.num_segments for span in plan.shots] == [segments] * shots
        assert all(span.num_frames == span.asked_frames for span in plan.shots)


def test_seams_are_measured_as_the_model_makes_them() -> None:
    folder, _ = open_model("shapes")
    blended = {condition.settings["vae_blend_frames"] for condition in EXPERIMENTS["seams"].conditions}
    assert {0, folder.defaults["vae_blend_frames"]} <= blended


def test_long_films_take_a_minute_and_some_shots_have_two_segments() -> None:
    model = load_model("shapes")
    for name in ("long", "context"):
        plan = model.job(EXPERIMENTS[name].cases(1, model.geometry)[0]).plan
        assert len(plan.shots) == 12
        assert [span.num_segments for span in plan.shots] == list(EXPERIMENTS[name].segments)
        assert 60 <= plan.duration_s < 65


def test_differences_are_those_of_the_same_films() -> None:
    others = [record(shape, 4.0, [{}]) for shape in (0.0, 1.0, 0.0)]
    share = figure_differences(RECORDS, others, ["prompt_shape"])["prompt_shape"]
    assert (share.mean, share.count) == (0.5, 2)  # 1 - 0, unknown, 0 - 0
    experiment = Experiment(
        title="T",
        claim="C",
        conditions=(),
        figures=("prompt_shape",),
        segments=(1, 1),
        compared=(("a", "b"), ("a", "c")),
    )
    results = {"a": RECORDS, "b": others}
    assert "| a, less b | 0.50 [0.00, 1.00] |" in to_markdown(experiment, results, {"name": "m", "hash": "h"}, "run")
    (stored,) = to_json(experiment, results, {"name": "m", "hash": "h"})["differences"]
    assert (stored["of"], stored["less"], stored["figures"]["prompt_shape"]["mean"]) == ("a", "b", 0.5)


def test_every_comparison_is_of_conditions_that_are_made() -> None:
    for experiment in EXPERIMENTS.values():
        names = {condition.name for condition in experiment.conditions}
        assert all({*pair} <= names for pair in experiment.compared)
    assert ("arlon 5 steps", "base 30 steps") in EXPERIMENTS["short"].compared


def test_joins_are_shown_by_position() -> None:
    shots = [{"colour": 1.0}, {"colour": 1.0, "kept_shape": 0.0, "seam_strength_switch": 1.5}]
    first, second = figures_by_shot([record(1.0, 4.0, shots)] * 2)["seam_strength_switch"]
    assert (first.count, second.mean) == (0, 1.5)
    experiment = Experiment(title="T", claim="C", conditions=(), figures=("prompt_shape",), segments=(1, 1))
    results = {"a": [record(1.0, 4.0, shots)] * 2}
    table = to_markdown(experiment, results, {"name": "m", "hash": "h"}, "run")
    assert "**kept shape**" in table
    assert "| a |  | 1.50 [1.50, 1.50] |" in table
    assert "**kept place**" not in table


@pytest.mark.parametrize(
    ("options", "folder"),
    [
        ([], "docs/results"),
        (["--films", "2"], "outputs/paper/tables"),
        (["--only", "base 5 steps"], "outputs/paper/tables"),
        (["--model", "other"], "outputs/paper/tables"),
        (["--films", "2", "--output", "here"], "here"),
    ],
)
def test_a_part_of_an_experiment_does_not_replace_the_table_of_all(options: list[str], folder: str) -> None:
    assert parse_args(["short", *options]).output == Path(folder)


def test_two_objects_are_those_of_the_suite_with_its_seed(tiny_model: Path) -> None:
    geometry = load_model(str(tiny_model)).geometry
    cases = EXPERIMENTS["two_objects"].cases(3, geometry)
    assert all(len(case.scene.shots[0].objects) == 2 for case in cases)
    options = ["--prompts", "3", "--switches", "0", "--two-objects", "1", "--seed", str(SUITE_SEED)]
    assert make_cases(parse_suite(options), geometry)["prompts"] == cases


@pytest.mark.parametrize("option", ["--output", "--work"])
def test_a_file_in_place_of_a_folder_is_refused_before_any_film(option: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    places = ["--output", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
    with pytest.raises(SystemExit, match=r"error: .*file' is a file"):
        main(["short", "--model", "nothing", *places, option, str(tmp_path / "file")])


def test_unknown_conditions_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_args(["short", "--only", "arlon 7 steps"])
    assert stopped.value.code == 2
    assert "arlon 10 steps" in capsys.readouterr().err


def test_a_video_in_other_colours_keeps_layout_and_motion(tiny_model: Path, tmp_path: Path) -> None:
    cases = EXPERIMENTS["video"].cases(2, load_model(str(tiny_model)).geometry)
    for case in cases:
        other = conditions.in_other_colours(case)
        assert other.scene.start == case.scene.start
        for before, after in zip(case.scene.shots, other.scene.shots, strict=True):
            assert before.background != after.background
            for a, b in zip(before.objects, after.objects, strict=True):
                assert a.colour != b.colour
                assert (a.shape, a.size, a.motion, a.speed) == (b.shape, b.size, b.motion, b.speed)

    def figures(video: str) -> list[dict[str, float]]:
        condition = Condition(name=video, steps=2, mode="true_codes", video=video, measures_path=True)
        made = run_condition(
            condition, cases[:1], tmp_path, model=str(tiny_model), written={}, progress=lambda done, total: None
        )
        return [record["figures"] for record in made]

    asked = figures("as asked")
    assert asked != figures("other colours")
    assert all(0 <= found["path_followed"] <= 1 for found in asked)
