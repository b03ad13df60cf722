"""The examples of docs/extending.md, used as their readers would: as modules outside the package, named as plugins."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from arlon import ArlonPipeline, SemanticInjection, plugins
from arlon.attention import KERNELS
from arlon.backbones import FAMILIES
from arlon.checkpoint import write_model_index
from arlon.components import load_component
from arlon.diffusion import samplers
from arlon.diffusion.solvers import SOLVERS
from arlon.film.container import read_film_record
from arlon.models.injection_designs import DESIGNS, InjectionConfig
from arlon.text import interface
from pipelines.cli import app
from stages.registry import STAGES

DOCUMENT = Path(__file__).parents[2] / "docs" / "extending.md"
EXAMPLES = {
    block.split("\n", 1)[0].removeprefix("# "): block
    for block in re.findall(r"```python\n(# \w+\.py\n.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
}
REGISTERED = {
    "my_solver": (SOLVERS, "ralston"),
    "my_kernel": (KERNELS, "linear"),
    "my_backbone": (FAMILIES, "PointFlow"),
    "my_design": (DESIGNS, "gain"),
    "my_stage": (STAGES, "colour"),
}
SHORT = ("--prompt", "a red circle", "--num-frames", "51", "--seed", "3", "--threads", "1", "--quiet")


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Writes an example as a module and names it in ARLON_PLUGINS; Arlon forgets it at the end."""
    monkeypatch.syspath_prepend(tmp_path)
    named: list[str] = []

    def install(name: str) -> None:
        (tmp_path / f"{name}.py").write_text(EXAMPLES[f"{name}.py"], encoding="utf-8")
        monkeypatch.setenv(plugins.PLUGINS_VARIABLE, name)
        named.append(name)

    yield install
    for name in named:
        sys.modules.pop(name, None)
        plugins.forget(name)
        if name in REGISTERED:
            registry, entry = REGISTERED[name]
            registry.remove(entry)


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


def arlon(*arguments: object) -> None:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output


def test_every_example_is_tried_here() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    assert len(EXAMPLES) == 9
    assert [name for name in EXAMPLES if name.removesuffix(".py") not in source] == []


def test_a_solver_is_chosen_on_the_command_line_and_has_its_order(
    plugin: Callable[[str], None], tiny_model: Path, tmp_path: Path
) -> None:
    plugin("my_solver")
    film = tmp_path / "film.mp4"
    arlon("generate", "--model", tiny_model, "--solver", "ralston", "--output", film, *SHORT)
    assert read_film_record(film)["storyboard"]["solver"] == "ralston"

    def error(steps: int) -> float:
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        end = samplers.sample(lambda x, t: x * t[:, None], torch.ones(1, 1, dtype=torch.float64), times, "ralston")
        return abs(float(end) - float(torch.exp(torch.tensor(-0.5, dtype=torch.float64))))

    assert error(10) / error(20) == pytest.approx(4, rel=0.2)


def test_a_step_policy_ends_a_schedule(plugin: Callable[[str], None]) -> None:
    plugin("my_policy")
    calls: list[float] = []

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        calls.append(float(t[0]))
        return -x

    samplers.sample(velocity, torch.ones(2, 3), samplers.make_times(10), policy=module("my_policy").LeapBelow(0.5))
    assert calls == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5])


@pytest.mark.slow
@pytest.mark.parametrize("example", ["use_kernel", "use_maps"])
def test_kernels_and_attention_maps_of_the_small_model(
    example: str, plugin: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin("my_kernel")
    plain = ArlonPipeline.from_pretrained
    monkeypatch.setattr(  # one thread and no bar, as everywhere in the tests
        ArlonPipeline, "from_pretrained", lambda name: plain(name, num_threads=1)
    )
    monkeypatch.setitem(
        EXAMPLES, f"{example}.py", EXAMPLES[f"{example}.py"].replace("=1)", "=1, seed=3, progress=False)")
    )
    plugin(example)
    monkeypatch.setenv(plugins.PLUGINS_VARIABLE, "my_kernel")
    used = module(example)
    usual = plain("shapes", num_threads=1)("a red circle moves left", seconds=1, seed=3, progress=False)
    same = torch.equal(used.film.latents[0], usual.latents[0])
    assert same == (example == "use_maps")
    if example == "use_maps":
        torch.testing.assert_close(used.first_step.sum(-1), torch.ones(used.first_step.shape[:-1]))


def test_a_backbone_of_another_family_makes_films_that_go_on_and_verify(
    plugin: Callable[[str], None], tiny_model: Path, tmp_path: Path
) -> None:
    plugin("my_backbone")
    model = tmp_path / "model"
    for part in ("vae", "text_encoder"):
        shutil.copytree(tiny_model / part, model / part)
    (model / "dit").mkdir()
    values = {"_class_name": "PointFlow", "in_channels": 4, "caption_channels": 12}
    (model / "dit" / "config.json").write_text(json.dumps(values))
    clean = torch.tensor([0.5, -0.5, 0.25, 0.0])
    save_file({"clean": clean}, model / "dit" / "model.safetensors")
    write_model_index(model, json.loads((tiny_model / "model_index.json").read_text())["defaults"])
    film = tmp_path / "film.mp4"
    arlon("generate", "--model", model, "--output", film, *SHORT)
    arlon("extend", film, "--prompt", "a blue square", "--duration", "34f", "--quiet")
    arlon("verify", film, "--segment", 1)
    arlon("plan", "--model", model, *SHORT[:4])
    made = ArlonPipeline.from_pretrained(model, num_threads=1)("a red circle", seconds=6, seed=3, progress=False)
    expected = clean.view(1, -1, 1, 1, 1).expand_as(made.latents[0])
    torch.testing.assert_close(made.latents[0], expected, atol=1e-5, rtol=0)


def test_a_text_encoder_is_found_by_its_kind(
    plugin: Callable[[str], None], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interface, "_LOADERS", dict(interface._LOADERS))
    plugin("my_text")
    (tmp_path / "config.json").write_text('{"_format": 1, "kind": "letters", "max_length": 9, "dim": 26}')
    features = interface.text_encoder_loader("letters")(max_length=9, clean=False, device="cpu", dtype=torch.float32)
    encoded = features.encode(["a b"])
    assert encoded.tokens[0, :2].argmax(-1).tolist() == [0, 1]
    assert encoded.mask.sum() == 2


def test_an_injection_design_is_trained_stored_and_loaded_by_its_name(
    plugin: Callable[[str], None], tmp_path: Path
) -> None:
    plugin("my_design")
    injection = SemanticInjection(InjectionConfig(design="gain", dim=16, num_blocks=2, first_block=1))
    y, coarse = torch.randn(4, 8, 16), torch.randn(2, 4, 2, 4, 4)
    assert torch.equal(injection.condition(coarse)(1, y), y), "a fresh injection is the identity"
    injection.train()
    optimizer = torch.optim.SGD(injection.parameters(), lr=0.1)
    (injection.condition(coarse)(1, y) - 2 * y).square().mean().backward()
    optimizer.step()
    changed = injection.eval().condition(coarse)
    assert not torch.equal(changed(1, y), y)
    assert torch.equal(changed(0, y), y), "block 0 is before the first"
    injection.save_pretrained(tmp_path / "injection")
    loaded = load_component(SemanticInjection, tmp_path / "injection")
    torch.testing.assert_close(loaded.condition(coarse)(2, y), changed(2, y))


def test_a_stage_trains_resumes_and_exports(plugin: Callable[[str], None], tmp_path: Path) -> None:
    from typer import Typer

    from stages.train import main

    plugin("my_stage")
    command = Typer()
    command.command()(main)
    options = [
        "colour",
        "train.log_steps=5",
        "train.val_steps=50",
        "train.ema_decay=0.5",
        "optim.warmup_steps=1",
        "--output",
        str(tmp_path / "run"),
    ]
    for limit in (20, 60):
        result = CliRunner().invoke(command, [*options, f"train.max_steps={limit}"])
        assert result.exit_code == 0, result.output
    learned = load_component(module("my_stage").Colour, tmp_path / "run" / "export").mean
    assert (learned - 0.5).abs().max() < 0.1
