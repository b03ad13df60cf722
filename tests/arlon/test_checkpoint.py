from __future__ import annotations

import json
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from arlon.checkpoint import (
    SHARED_VALUES,
    CheckpointError,
    ModelFolder,
    hash_component,
    load_component,
    resolve_model,
    save_component,
    write_model_index,
)
from arlon.components import Component
from arlon.text.encoders import TextEncoderConfig


@dataclass(frozen=True, kw_only=True)
class TinyConfig:
    dim: int = 3
    ratio: tuple[int, int] = (1, 2)
    dropout: float = 0.0


class Tiny(Component):
    config_class = TinyConfig

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(config.dim, 4)
        self.tied = nn.Linear(config.dim, 4, bias=False)
        self.tied.weight = self.linear.weight
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("table", torch.arange(5.0), persistent=False)


class Other(Tiny):
    """Same tensors, another class."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_component(Tiny(TinyConfig(dim=3, ratio=(4, 8))), tmp_path / "tiny")


def rewrite(folder: Path, **changes: Any) -> None:
    """Change tensors of a component: a value replaces, None removes."""
    tensors = load_file(folder / "model.safetensors") | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")


def test_round_trip_is_exact(tmp_path: Path) -> None:
    model = Tiny(TinyConfig(dim=5, ratio=(4, 8)))
    loaded = load_component(Tiny, save_component(model, tmp_path / "a" / "tiny"))
    assert loaded.config == model.config
    for (name, before), after in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0, msg=name)
    assert torch.equal(loaded.table, torch.arange(5.0))
    assert not loaded.training
    assert sorted(path.name for path in (tmp_path / "a" / "tiny").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_stored_precision_is_rounded_once_and_loads_as_float32(tmp_path: Path) -> None:
    model = Tiny(TinyConfig())
    loaded = load_component(Tiny, save_component(model, tmp_path / "t", torch.bfloat16))
    assert load_file(tmp_path / "t" / "model.safetensors")["linear.weight"].dtype == torch.bfloat16
    assert torch.equal(loaded.linear.weight, model.linear.weight.bfloat16().float())
    assert loaded.count.dtype == torch.int64
    half = load_component(Tiny, tmp_path / "t", dtype=torch.bfloat16)
    assert (half.linear.weight.dtype, half.table.dtype) == (torch.bfloat16, torch.float32)


def test_weights_can_be_read_by_others(tmp_path: Path) -> None:
    folder = save_component(Tiny(TinyConfig()), tmp_path / "t")
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_saving_again_replaces_weights_and_drops_stale_shards(folder: Path) -> None:
    (folder / "notes.txt").write_text("kept")
    (folder / "model.safetensors.index.json").write_text("{}")
    (folder / "diffusion_pytorch_model.safetensors").write_text("stale")
    save_component(Tiny(TinyConfig(dim=6)), folder)
    assert load_component(Tiny, folder).config.dim == 6
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]


def test_failed_save_leaves_the_old_component(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = hash_component(folder)

    def fail(*args: Any, **kwargs: Any) -> None:
        Path(args[1]).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("arlon.components.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_component(Tiny(TinyConfig(dim=6)), folder)
    assert hash_component(folder) == before
    assert len(list(folder.iterdir())) == 2


def test_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    model = Tiny(TinyConfig())
    hashes = {hash_component(save_component(model, tmp_path / name)) for name in "ab"}
    assert len(hashes) == 1
    with torch.no_grad():
        model.linear.bias[0] += 1e-6
    assert hash_component(save_component(model, tmp_path / "c")) not in hashes


def test_loading_leaves_the_global_generator_alone(folder: Path) -> None:
    state = torch.random.get_rng_state()
    load_component(Tiny, folder)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_override_wins_over_the_stored_config(folder: Path) -> None:
    assert load_component(Tiny, folder, dropout=0.5).config == TinyConfig(ratio=(4, 8), dropout=0.5)
    with pytest.raises(ValueError, match=r"'dropuot'.*'dropout'"):
        load_component(Tiny, folder, dropuot=0.5)


def test_released_folder_with_shards_and_extra_keys_loads(folder: Path) -> None:
    model = load_component(Tiny, folder)
    config = {"dim": 3, "architectures": ["X"], "model_type": "x", "_name": "x", "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = {name: f"diffusion_pytorch_model-{i}.safetensors" for i, name in enumerate(tensors)}
    for name, shard in shards.items():
        save_file({name: tensors[name]}, folder / shard)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    assert torch.equal(load_component(Tiny, folder).linear.bias, model.linear.bias)

    (folder / shards["count"]).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks 1 of 4 shards: {shards['count']}"):
        load_component(Tiny, folder)
    index.write_text(json.dumps({"weight_map": {"count": "../count.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        load_component(Tiny, folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"linear.bias": None}, "lacks tensors, 1 of 4: linear.bias"),
        ({"extra": torch.zeros(1)}, "has unexpected tensors, 1 of 5: extra"),
        ({"linear.bias": torch.zeros(5)}, r"linear.bias is \(5,\), expected \(4,\)"),
        ({"count": torch.tensor(1.0)}, "count is stored as F32, expected torch.int64"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder: Path, changes: dict[str, Any], message: str) -> None:
    rewrite(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_component(Tiny, folder)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
        (torch.int8, "I8"),
        (torch.int64, "I64"),
        (torch.bool, "BOOL"),
    ],
)
def test_weights_stored_as_other_numbers_are_refused(folder: Path, dtype: torch.dtype, name: str) -> None:
    scale = {"linear.weight_scale": torch.ones(1)}  # quantised files have more tensors, which are not the reason
    rewrite(folder, **scale, **{"linear.bias": torch.zeros(4).to(dtype), "linear.weight": torch.ones(4, 3).to(dtype)})
    for strict in (True, False):
        with pytest.raises(CheckpointError) as error:
            load_component(Tiny, folder, strict=strict)
        (line,) = str(error.value).splitlines()
        assert "holds 2 Tiny tensors of a type that is not supported: " in line
        assert f"linear.bias ({name})" in line
        assert f"linear.weight ({name}); expected float32, float16, bfloat16, float64: get the weights" in line


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_weights_in_every_precision_that_is_read_load(folder: Path, dtype: torch.dtype) -> None:
    rewrite(folder, **{"linear.bias": torch.tensor([1.0, 2, 3, 4], dtype=dtype)})
    loaded = load_component(Tiny, folder)
    assert loaded.linear.bias.tolist() == [1, 2, 3, 4]
    assert (loaded.linear.bias.dtype, loaded.count.item()) == (torch.float32, 7)  # an integer buffer stays one


def test_not_strict_tolerates_missing_and_extra_but_not_wrong_shapes(folder: Path) -> None:
    rewrite(folder, **{"linear.bias": None, "extra": torch.zeros(1)})
    assert load_component(Tiny, folder, strict=False).linear.bias.shape == (4,)
    rewrite(folder, **{"linear.bias": torch.zeros(5)})
    with pytest.raises(CheckpointError, match="does not fit Tiny"):
        load_component(Tiny, folder, strict=False)


@pytest.mark.parametrize("size", [0, 5, 40, -1])
def test_cut_off_weights_are_named(folder: Path, size: int) -> None:
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:size])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*\d+ bytes"):
        load_component(Tiny, folder)


def test_missing_parts_say_what_was_expected(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder.*config\.json"):
        load_component(Tiny, folder / "nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors.*diffusion_pytorch_model"):
        load_component(Tiny, folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_component(Tiny, folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_component(Tiny, folder)


def test_folder_of_another_class_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="holds a Tiny, expected a Other"):
        load_component(Other, folder)


# --- model folders ---

CONFIGS: dict[str, dict[str, Any]] = {
    "vae": {"temporal": {"embed_dim": 16}, "spatial": {"block_out_channels": [8, 8, 8, 8]}},
    "vqvae": {"latent_channels": 16, "ratio": [2, 2, 2], "codebook_size": 64},
    "vqvae_coarser": {"latent_channels": 16, "ratio": [2, 4, 4], "codebook_size": 32},
    "ar": {"codebook_size": 64, "text_dim": 384, "max_text": 48, "grid": [4, 6]},
    "dit": {
        "in_channels": 16,
        "caption_channels": 384,
        "hidden_size": 24,
        "patch_size": [1, 2, 2],
        "model_max_length": 48,
    },
    "injection": {"in_channels": 16, "dim": 24, "patch_size": [1, 2, 2]},
    "text_encoder": {"kind": "minilm", "dim": 384, "max_length": 48},
}
DEFAULTS = {"height": 64, "width": 96, "fps": 8.0}


def write_model(root: Path, **changes: dict[str, Any]) -> Path:
    """A model folder of configs and dummy weights; `changes` are merged into the configs."""
    for name, config in CONFIGS.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        values = {"_class_name": name.upper(), "_format": 1, **config, **changes.get(name, {})}
        (root / name / "config.json").write_text(json.dumps(values))
        if name != "text_encoder":
            save_file({"w": torch.arange(3.0)}, root / name / "model.safetensors")
    return root


def test_model_folder_round_trip(tmp_path: Path) -> None:
    written = write_model_index(write_model(tmp_path), DEFAULTS)
    opened = ModelFolder.open(tmp_path)
    assert opened == written
    assert opened.defaults == DEFAULTS
    assert opened.component("dit") == tmp_path / "dit"
    assert set(opened.components) == set(CONFIGS)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert (index["_class_name"], index["format"]) == ("ArlonPipeline", 1)
    assert index["components"]["dit"] == {"class": "DIT", "sha256": hash_component(tmp_path / "dit")}


def test_model_hash_tells_contents_not_places(tmp_path: Path) -> None:
    first = write_model_index(write_model(tmp_path / "a"), DEFAULTS)
    second = write_model_index(write_model(tmp_path / "b"), {})
    assert first.model_hash == second.model_hash
    third = write_model_index(write_model(tmp_path / "c", injection={"num_blocks": 2}), DEFAULTS)
    assert third.model_hash != first.model_hash


def test_writing_the_index_again_keeps_the_defaults(tmp_path: Path) -> None:
    write_model_index(write_model(tmp_path), DEFAULTS)
    assert write_model_index(tmp_path).defaults == DEFAULTS


def test_changed_weights_are_noticed_unless_told_not_to_look(tmp_path: Path) -> None:
    written = write_model_index(write_model(tmp_path), DEFAULTS)
    save_file({"w": torch.zeros(3)}, tmp_path / "dit" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"dit.*model_index\.json"):
        ModelFolder.open(tmp_path)
    assert ModelFolder.open(tmp_path, verify=False).model_hash == written.model_hash


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ar": {"codebook_size": 128}}, "ar' has codebook size 128, but .*vqvae' has 64"),
        ({"dit": {"in_channels": 4}}, "dit' has latent channels 4, but .*vae' has 16"),
        ({"vqvae_coarser": {"latent_channels": 4}}, "vqvae_coarser' has latent channels 4"),
        ({"injection": {"in_channels": 4}}, "injection' has latent channels 4"),
        ({"ar": {"text_dim": 768}}, "ar' has text width 768, but .*text_encoder' has 384"),
        ({"injection": {"dim": 48}}, "injection' has token width 48, but .*dit' has 24"),
        ({"injection": {"patch_size": [1, 1, 1]}}, "injection' has patch size"),
        ({"text_encoder": {"max_length": 64}}, "writes 64 tokens, but dit takes at most 48"),
        ({"ar": {"grid": [6, 4]}}, r"ar writes \(6, 4\) codes a frame, but the VQ-VAE has \(4, 6\)"),
    ],
)
def test_components_that_disagree_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        write_model_index(write_model(tmp_path, **changes), DEFAULTS)
    assert not (tmp_path / "model_index.json").exists()


def test_every_disagreement_is_listed(tmp_path: Path) -> None:
    changes = {"ar": {"codebook_size": 1, "text_dim": 2}, "dit": {"in_channels": 3}}
    with pytest.raises(CheckpointError) as caught:
        write_model_index(write_model(tmp_path, **changes), DEFAULTS)
    assert len(str(caught.value).splitlines()) == 3


def test_missing_component_is_named(tmp_path: Path) -> None:
    write_model_index(write_model(tmp_path), DEFAULTS)
    (tmp_path / "ar" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks the components ar$"):
        ModelFolder.open(tmp_path)
    with pytest.raises(FileNotFoundError, match="model folder"):
        ModelFolder.open(tmp_path / "dit")
    with pytest.raises(FileNotFoundError, match="no component in"):
        write_model_index(tmp_path / "ar")


def test_part_of_a_model_opens_when_no_more_is_required(tmp_path: Path) -> None:
    save_component(Tiny(TinyConfig()), tmp_path / "dit")
    write_model_index(tmp_path)
    model = ModelFolder.open(tmp_path, required=["dit"])
    with pytest.raises(FileNotFoundError, match="has no component 'ar', it has dit"):
        model.component("ar")
    with pytest.raises(
        FileNotFoundError,
        match=r"ar, injection, text_encoder, vae, vqvae",
    ):
        ModelFolder.open(tmp_path)


@pytest.mark.parametrize("content", ["{}", '{"format": 2, "components": {}}', '{"format": 1, "components": []}'])
def test_index_of_another_format_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(CheckpointError, match="this version reads 1"):
        ModelFolder.open(tmp_path)


def test_index_without_hashes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"format": 1, "components": {"dit": {}}}')
    with pytest.raises(CheckpointError, match="no sha256 for dit"):
        ModelFolder.open(tmp_path)


def test_model_is_found_by_folder(tmp_path: Path) -> None:
    assert resolve_model(tmp_path) == tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shape", "unknown model 'shape', did you mean 'shapes'"),
        ("./runs/none", "unknown model './runs/none'"),
        ("runs/none", "no folder 'runs/none', and no model of that name on the hub"),
        ("", "unknown model ''"),
    ],
)
def test_unknown_model_is_refused_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message) as caught:
        resolve_model(name)
    assert "\n" not in str(caught.value)


def test_compared_fields_exist_in_the_configs_of_the_models() -> None:
    from arlon.models.ar import CodeTransformerConfig
    from arlon.models.injection import InjectionConfig
    from arlon.models.stdit import STDiT3Config
    from arlon.models.video_vae import VideoVAEConfig
    from arlon.models.vqvae import LatentVQVAEConfig

    configs = {
        "vae": VideoVAEConfig(),
        "vqvae": LatentVQVAEConfig(),
        "vqvae_coarser": LatentVQVAEConfig(),
        "ar": CodeTransformerConfig(),
        "dit": STDiT3Config(),
        "injection": InjectionConfig(),
        "text_encoder": TextEncoderConfig(),
    }
    single = [("ar", "max_text"), ("ar", "grid"), ("vqvae", "ratio"), ("dit", "model_max_length")]
    single += [("vae", "spatial.block_out_channels"), ("text_encoder", "max_length")]
    shared = [item for _, keys in SHARED_VALUES for item in keys.items()]
    for component, dotted in shared + single:
        assert attrgetter(dotted)(configs[component]) is not None, (component, dotted)
