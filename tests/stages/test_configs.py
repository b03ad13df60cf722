"""Every configuration file loads, and the small model fits in the repository."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from stages.train import load_stage_config

FOLDER = Path(__file__).parents[2] / "configs" / "shapes"
FILES = {
    "vae": "vae",
    "vqvae": "vqvae",
    "vqvae_coarser": "vqvae",
    "ar": "ar",
    "dit": "dit",
    "inject": "inject",
}
MODELS = {"vae": "VideoVAE", "vqvae": "LatentVQVAE", "ar": "CodeTransformer", "dit": "STDiT3"}


def model_of(name: str, folder: Path) -> torch.nn.Module:
    import importlib

    stage = FILES[name]
    config = load_stage_config(stage, [folder / f"{name}.yaml"], [])
    module = importlib.import_module(f"stages.{stage}")
    if stage == "inject":
        return module.SemanticInjection(config.injection)
    return getattr(module, MODELS[stage])(getattr(config, stage))


DIT_PARTS = ("images", "clips", "segments")


@pytest.mark.parametrize("folder", [FOLDER, FOLDER / "tiny"])
def test_parts_of_the_dit_start_where_the_one_before_ends(folder: Path) -> None:
    parts = [load_stage_config("dit", [folder / "dit.yaml", folder / f"dit_{name}.yaml"], []) for name in DIT_PARTS]
    assert all(part.dit == parts[0].dit for part in parts)
    assert [part.train.previous_part for part in parts] == [None, "runs/dit_images/export", "runs/dit_clips/export"]
    windows = [(part.flow.windows.latent_frames, part.flow.windows.overlap) for part in parts]
    assert windows == [(1, 0), (5, 0), (15, 5)]
    assert load_stage_config("dit", [folder / "dit.yaml"], []).train.start_folder is None


@pytest.mark.parametrize("folder", [FOLDER, FOLDER / "tiny"])
def test_latents_are_measured_until_only_the_decoders_learn(folder: Path) -> None:
    names = ("spatial", "temporal", "all", "decoder")
    parts = [load_stage_config("vae", [folder / "vae.yaml", folder / f"vae_{name}.yaml"], []) for name in names]
    assert [part.part for part in parts] == list(names)
    assert [part.measures_statistics for part in parts] == [True, True, True, False]
    released = load_stage_config("vae", [FOLDER.parent / "opensora_v1_2" / "vae.yaml"], [])
    assert not released.measures_statistics


def test_make_dit_trains_the_parts_in_order_into_the_folders_that_the_next_one_reads() -> None:
    lines = recipe("dit", "configs/shapes")
    outputs = [line.split("--output ")[1].split()[0] for line in lines]
    assert outputs == ["runs/dit_images", "runs/dit_clips", "runs/dit"]
    assert all(f"configs/shapes/dit_{part}.yaml" in line for part, line in zip(DIT_PARTS, lines, strict=True))
    assert all("--config configs/shapes/dit.yaml" in line for line in lines)
    alone = recipe("dit", "configs/elsewhere")
    assert [line.split("stages.train ")[1].split() for line in alone] == [
        ["dit", "--config", "configs/elsewhere/dit.yaml"]
    ]


@pytest.mark.parametrize(("target", "parts"), [("vae", 4), ("dit", 3)])
def test_only_the_first_part_of_a_stage_starts_from_other_weights(target: str, parts: int) -> None:
    start = "train.init_from=weights/x"
    lines = recipe(target, "configs/shapes", f"{start} optim.lr=0.5")
    assert [start in line for line in lines] == [True] + [False] * (parts - 1)
    assert all("optim.lr=0.5" in line for line in lines)
    alone = recipe(target, "nowhere", start)
    assert [start in line for line in alone] == [True], "a folder without parts is one run"


@pytest.mark.parametrize("target", ["train", "vqvae"])
def test_weights_that_fit_one_component_are_not_given_to_several(target: str) -> None:
    done = make(target, "configs/shapes", "train.init_from=weights/x")
    assert done.returncode != 0
    assert "train.init_from=weights/x fits one" in done.stderr


def test_a_later_part_refuses_to_throw_the_part_before_away() -> None:
    files = [FOLDER / "dit.yaml", FOLDER / "dit_clips.yaml"]
    with pytest.raises(ValueError, match=r"train\.init_from = 'x' .*train\.previous_part=null"):
        load_stage_config("dit", files, ["train.init_from=x"])
    alone = load_stage_config("dit", files, ["train.init_from=x", "train.previous_part=null"])
    assert alone.train.start_folder == "x"


def recipe(target: str, folder: str, arguments: str = "") -> list[str]:
    """The trainings that `make TARGET CONFIG=FOLDER ARGS=ARGUMENTS` would run."""
    done = make(target, folder, arguments)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if "stages.train" in line]


def make(target: str, folder: str, arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "--dry-run", "--assume-old=setup", target, f"CONFIG={folder}", f"ARGS={arguments}"],
        cwd=FOLDER.parents[1],
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("name", FILES)
def test_tiny_variant_builds(name: str) -> None:
    assert sum(p.numel() for p in model_of(name, FOLDER / "tiny").parameters()) < 250_000


def test_small_model_is_at_most_32_megabytes_in_bfloat16() -> None:
    sizes = {name: 2 * sum(t.numel() for t in model_of(name, FOLDER).state_dict().values()) for name in FILES}
    assert sum(sizes.values()) <= 32e6, sizes
