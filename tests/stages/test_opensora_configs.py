"""Every configuration of the full size builds and runs once on the meta device, which finds tensors made elsewhere."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from arlon.checkpoint import BASE_COMPONENTS, ModelSources, check_consistency, save_component
from arlon.components import Component
from arlon.config import config_from_dict, load_config
from arlon.film.geometry import GenerationDefaults, make_geometry, read_size
from arlon.models.ar import CodeTransformer
from arlon.models.injection import SemanticInjection
from arlon.models.stdit import STDiT3
from arlon.models.video_vae import VideoVAE
from arlon.models.vqvae import LatentVQVAE
from stages.assemble import RUN_OF_COMPONENT, ModelFolderConfig
from stages.train import load_stage_config

FOLDER = Path(__file__).parents[2] / "configs" / "opensora_v1_2"
STAGES = {
    "vae": "vae",
    "vqvae": "vqvae",
    "vqvae_coarser": "vqvae",
    "ar": "ar",
    "dit": "dit",
    "inject": "inject",
}
LATENT = (1, 4, 20, 64, 64)
"""A segment of 68 frames of 512 x 512."""


def stage_config(name: str) -> Any:
    return load_stage_config(STAGES[name], [FOLDER / f"{name}.yaml"], [])


def on_meta(kind: type, config: Any) -> Any:
    with torch.device("meta"):
        return kind(config).eval().requires_grad_(False)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


@pytest.mark.slow
def test_vae_runs() -> None:
    vae = on_meta(VideoVAE, stage_config("vae").vae)
    latent = vae.encode(empty(1, 3, 17, 512, 512))
    assert latent.shape == (1, 4, 5, 64, 64)
    assert vae.decode(latent, 17).shape == (1, 3, 17, 512, 512)


@pytest.mark.parametrize(("name", "grid"), [("vqvae", (5, 8, 8)), ("vqvae_coarser", (5, 4, 4))])
def test_vqvae_runs(name: str, grid: tuple[int, int, int]) -> None:
    vqvae = on_meta(LatentVQVAE, stage_config(name).vqvae)
    codes = vqvae.encode(empty(*LATENT))
    assert tuple(codes.shape[1:]) == grid
    assert vqvae.decode(codes, 20).shape == LATENT
    assert vqvae(empty(*LATENT)).reconstruction.is_meta


@pytest.mark.slow
def test_dit_and_injection_run() -> None:
    """Injection reaches the first half of the temporal blocks, and the last of them changes no shape."""
    dit, injection = (
        on_meta(STDiT3, stage_config("dit").dit),
        on_meta(SemanticInjection, stage_config("inject").injection),
    )
    assert (dit.config.depth, injection.config.num_blocks) == (28, 14)
    velocity = dit(
        empty(*LATENT),
        empty(1),
        empty(1, 300, 4096),
        empty(1, 300, dtype=torch.bool),
        empty(1, 20, dtype=torch.bool),
        fps=24.0,
        height=512.0,
        width=512.0,
        inject=injection.condition(empty(*LATENT)),
    )
    assert velocity.shape == LATENT
    assert velocity.is_meta


def test_ar_runs() -> None:
    ar = on_meta(CodeTransformer, stage_config("ar").ar)
    codes = empty(1, 5 * 64, dtype=torch.int64)
    logits = ar(codes, empty(1, 300, 4096), empty(1, 300, dtype=torch.bool))
    assert logits.shape == (1, 321, 8193)
    assert logits.is_meta


def test_components_fit_each_other(tmp_path: Path) -> None:
    """What the stages export, with the text encoder and defaults of model.yaml, would make a model folder."""
    model = load_config(ModelFolderConfig, [FOLDER / "model.yaml"])
    configs = {
        "vae": stage_config("vae").vae,
        "vqvae": stage_config("vqvae").vqvae,
        "vqvae_coarser": stage_config("vqvae_coarser").vqvae,
        "ar": stage_config("ar").ar,
        "dit": stage_config("dit").dit,
        "injection": stage_config("inject").injection,
        "text_encoder": model.text_encoder,
    }
    for name, config in configs.items():
        holder = Component()  # the networks themselves would not fit into memory
        holder.config = config
        save_component(holder, tmp_path / name)
    check_consistency(tmp_path, configs, model.defaults)
    sizes, defaults = read_size("opensora_v1_2")
    found = {name: getattr(sizes, name) for name in ("vae", "vqvae", "ar", "injection", "text_encoder")}
    assert found | {"dit": sizes.backbone.config} == {name: configs[name] for name in (*found, "dit")}
    geometry = make_geometry(sizes, defaults)
    assert geometry.grid.segment_frames == 68
    assert geometry.code_grid == (8, 8)


def test_the_base_names_the_released_parts() -> None:
    base = load_config(ModelSources, [FOLDER / "base.yaml"])
    assert set(base.components) == set(BASE_COMPONENTS)
    config_from_dict(GenerationDefaults, base.defaults)
    trained = load_config(ModelFolderConfig, [FOLDER / "model.yaml"]).defaults
    shared = {name: value for name, value in base.defaults.items() if name != "aesthetic_score"}  # of its captions only
    assert {name: trained[name] for name in shared} == shared


@pytest.mark.parametrize("stage", ["stage1", "stage2", "stage3"])
def test_buckets_of_the_recipe_are_the_released_ones(stage: str) -> None:
    released = json.loads((FOLDER.parents[1] / "tests" / "data" / "buckets.json").read_text())["bucket_config"][stage]
    config = load_stage_config("dit", [FOLDER / "dit.yaml", FOLDER / f"dit_{stage}.yaml"], [])
    found: dict[str, dict[str, list[Any]]] = {}
    for bucket in config.data.buckets:
        keep = bucket.keep_prob if bucket.length_prob is None else [bucket.keep_prob, bucket.length_prob]
        found.setdefault(bucket.resolution, {})[str(bucket.num_frames)] = [keep, bucket.batch_size]
    assert found == released
    assert config.data.strict_buckets
    starts_from_weights = config.train.init_from is not None
    assert config.dit == replace(stage_config("dit").dit, freeze_y_embedder=starts_from_weights)


def test_stages_read_the_folders_that_make_writes() -> None:
    """The folders of exports, or released weights."""
    made = {f"runs/{run}/export" for run in RUN_OF_COMPONENT.values()}
    released = set(load_config(ModelFolderConfig, [FOLDER / "model.yaml"]).released.values())
    ar, inject = stage_config("ar"), stage_config("inject")
    assert {ar.vqvae, inject.vqvae, inject.vqvae_coarser} <= made
    assert {inject.dit, *(stage_config(name).data.vae for name in STAGES if name != "vae")} <= released


def test_stages_of_the_recipe_follow_one_another() -> None:
    stages = [load_stage_config("dit", [FOLDER / "dit.yaml", FOLDER / f"dit_stage{n}.yaml"], []) for n in (1, 2, 3)]
    assert [s.train.init_from for s in stages] == [None, "runs/dit_stage1/export", "runs/dit_stage2/export"]
    shares = [sum(s.flow.windows.mask_ratios.values()) for s in stages]
    assert shares == pytest.approx([0.2, 0.2, 0.25])
    assert [s.train.max_steps for s in stages] == [30000, 23000, 15000]
