"""Released folders: they load strictly, come out as the same bytes, and can be put together as a model."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from arlon import hub
from arlon.checkpoint import (
    BASE_COMPONENTS,
    FILM_COMPONENTS,
    CheckpointError,
    ModelFolder,
    ModelSources,
    combine,
    find_weights,
    load_component,
    read_config,
    resolve_model,
    save_component,
    stored_dtypes,
)
from arlon.config import ConfigError
from arlon.data.video_io import probe
from arlon.film.geometry import open_model, read_geometry
from arlon.film.storyboard import parse_storyboard
from arlon.models.stdit import STDiT3
from arlon.models.video_vae import SpatialVAEConfig, TemporalVAEConfig, VideoVAE, VideoVAEConfig
from arlon.text.encoders import load_text_encoder
from pipelines.runs.generate import generate
from pipelines.runs.picture import make_picture, prepare_picture
from tests.pipelines.films import prepared_film
from tests.pipelines.tiny_model import make_tiny_model

DATA = Path(__file__).parents[1] / "data"
DIT_EXTRAS = {
    "architectures": ["STDiT3"],
    "model_type": "STDiT3",
    "enable_flash_attn": True,
    "enable_layernorm_kernel": True,
    "input_size": [None, None, None],
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.2",
}
VAE_CONFIG = {
    "architectures": ["VideoAutoencoderPipeline"],
    "model_type": "VideoAutoencoderPipeline",
    "cal_loss": False,
    "freeze_vae_2d": False,
    "from_pretrained": None,
    "micro_frame_size": 17,
    "scale": [3.85, 2.32, 2.33, 3.06],
    "shift": [-0.1, 0.34, 0.27, 0.98],
    "vae_2d": {"type": "VideoAutoencoderKL", "from_pretrained": "owner/name", "micro_batch_size": 2},
    "vae_temporal": {"type": "VAE_Temporal_SD", "from_pretrained": None},
}


def released_dit(folder: Path, dtype: torch.dtype = torch.float32, num_shards: int = 1) -> Path:
    """An STDiT3 of Open-Sora's own code, as its training writes it: config.json and safetensors in one precision."""
    folder.mkdir(parents=True)
    config = json.loads((DATA / "stdit3_s_weights.json").read_text())["config"]
    (folder / "config.json").write_text(json.dumps(config | DIT_EXTRAS))
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(DATA / "stdit3_s_weights.safetensors").items()}
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = {name: f"model-{i % num_shards + 1:05}-of-{num_shards:05}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(names.values()):
        save_file({n: tensors[n] for n in names if names[n] == shard}, folder / shard, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_released_dit_comes_out_as_the_same_bytes(tmp_path: Path, dtype: torch.dtype, num_shards: int) -> None:
    """Also where buffers and rotary frequencies, which we keep in float32, were rounded by the release."""
    folder = released_dit(tmp_path / "released", dtype, num_shards)
    assert len(contents(folder)) == (2 if num_shards == 1 else 5)
    dit = STDiT3.from_pretrained(folder)
    dit.save_pretrained(tmp_path / "export")
    assert contents(tmp_path / "export") == contents(folder)
    STDiT3.from_pretrained(folder, dtype=dtype).save_pretrained(tmp_path / "as_stored")
    assert contents(tmp_path / "as_stored") == contents(folder)
    save_component(dit, tmp_path / "named", dtype=stored_dtypes(folder))
    assert contents(tmp_path / "named") == contents(folder)


def test_config_and_header_come_out_as_they_were_written_by_others(tmp_path: Path) -> None:
    """Keys in an order of their own, other spaces, keys of Hugging Face; tensors in no order, metadata of others."""
    folder = released_dit(tmp_path / "released")
    config = json.loads((folder / "config.json").read_text())
    others = {"_name_or_path": "/mnt/run", "auto_map": {"AutoModel": "x--stdit.STDiT3"}, "_diffusers_version": "0.29"}
    values = dict(sorted((config | others).items(), reverse=True))
    (folder / "config.json").write_text(json.dumps(values, indent=4, ensure_ascii=False), newline="\r\n")
    tensors = list(load_file(folder / "model.safetensors").items())[::-1]
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", "zeta": "1", "alpha": "2"}}
    place = 0
    for name, tensor in tensors:
        end = place + tensor.numel() * 4
        entries[name] = {"shape": list(tensor.shape), "dtype": "F32", "data_offsets": [place, end]}
        place = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    numbers = b"".join(tensor.numpy().tobytes() for _, tensor in tensors)
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + numbers)
    STDiT3.from_pretrained(folder).save_pretrained(tmp_path / "export")
    assert contents(tmp_path / "export") == contents(folder)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_a_changed_model_differs_in_its_numbers_only(tmp_path: Path, num_shards: int) -> None:
    folder = released_dit(tmp_path / "released", torch.bfloat16, num_shards)
    dit = STDiT3.from_pretrained(folder)
    with torch.no_grad():
        dit.final_layer.linear.bias += 1
    dit.save_pretrained(tmp_path / "export")
    before, after = contents(folder), contents(tmp_path / "export")
    assert before.keys() == after.keys()
    (changed,) = [name for name in before if before[name] != after[name]]
    old, new = load_file(folder / changed), load_file(tmp_path / "export" / changed)
    assert [name for name in old if not torch.equal(old[name], new[name])] == ["final_layer.linear.bias"]
    assert new["final_layer.linear.bias"].dtype == torch.bfloat16
    again = STDiT3.from_pretrained(tmp_path / "export")
    torch.testing.assert_close(again.final_layer.linear.bias, dit.final_layer.linear.bias, rtol=2**-8, atol=0)


def test_a_form_that_no_longer_fits_is_left(tmp_path: Path) -> None:
    """Another config is never written under the old text, nor a tensor under a header that says something else."""
    folder = released_dit(tmp_path / "released", num_shards=3)
    other = STDiT3.from_pretrained(folder, class_dropout_prob=0.5)
    other.save_pretrained(tmp_path / "config")
    assert json.loads((tmp_path / "config" / "config.json").read_text())["class_dropout_prob"] == 0.5
    assert STDiT3.from_pretrained(tmp_path / "config").config == other.config
    kept = {name: content for name, content in contents(folder).items() if name != "config.json"}
    assert kept.items() < contents(tmp_path / "config").items()

    dit = STDiT3.from_pretrained(folder)
    shutil.copytree(folder, tmp_path / "half")
    dit.save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    assert sorted(contents(tmp_path / "half")) == ["config.json", "model.safetensors"]
    assert load_file(tmp_path / "half" / "model.safetensors")["final_layer.linear.bias"].dtype == torch.bfloat16
    STDiT3.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "converted")
    assert contents(tmp_path / "converted") == contents(tmp_path / "half")


def test_sharded_dit_equals_the_whole_one(tmp_path: Path) -> None:
    whole = STDiT3.from_pretrained(released_dit(tmp_path / "whole"))
    sharded = STDiT3.from_pretrained(released_dit(tmp_path / "sharded", num_shards=3))
    for (name, a), b in zip(whole.state_dict().items(), sharded.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_tensors_that_do_not_fit_are_named_and_nothing_is_loaded(tmp_path: Path) -> None:
    folder = released_dit(tmp_path / "dit")
    tensors = load_file(folder / "model.safetensors")
    for changes, message in (
        (
            {"rope.freqs": None, "x_embedder.proj.bias": None},
            r"lacks tensors, 2 of \d+: rope.freqs, x_embedder.proj.bi",
        ),
        ({"pos_embed": torch.zeros(2)}, r"has unexpected tensors, 1 of \d+: pos_embed"),
        ({"x_embedder.proj.bias": torch.zeros(3)}, r"x_embedder.proj.bias is \(3,\), expected \(64,\)"),
        (
            {"rope.freqs": torch.zeros(8, dtype=torch.int32)},
            r"1 STDiT3 tensors of a type that is not supported: rope.freqs \(I32\)",
        ),
    ):
        changed = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
        save_file(changed, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            STDiT3.from_pretrained(folder)


@pytest.mark.parametrize("written", ["all", "differing"])
def test_what_transformers_writes_into_any_config_is_passed_over(tmp_path: Path, written: str) -> None:
    from transformers import GenerationConfig, PretrainedConfig

    class ReleasedConfig(PretrainedConfig):
        model_type = "STDiT3"

    sizes = json.loads((released_dit(tmp_path / "dit") / "config.json").read_text())
    expected = read_config(STDiT3, tmp_path / "dit")
    of_text = getattr(GenerationConfig, "_get_default_generation_params", dict)()
    of_version_4 = {"torchscript": False, "is_decoder": False, "pruned_heads": {}, "tie_word_embeddings": True}
    for name, value in (of_text | of_version_4).items():
        sizes.setdefault(name, value)
    config = ReleasedConfig(**sizes, id2label={0: "a", 1: "b"}, name_or_path="/mnt/run")
    values = {**sizes, **(config.to_dict() if written == "all" else config.to_diff_dict())}
    assert {"id2label", "label2id", "transformers_version", *of_version_4, *of_text} <= values.keys()
    (tmp_path / "dit" / "config.json").write_text(json.dumps(values))
    assert read_config(STDiT3, tmp_path / "dit") == expected
    STDiT3.from_pretrained(tmp_path / "dit").save_pretrained(tmp_path / "export")
    assert contents(tmp_path / "export") == contents(tmp_path / "dit")


def test_other_keys_of_a_released_config_are_named_in_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = read_config(STDiT3, released_dit(tmp_path / "dit"))
    config = json.loads((tmp_path / "dit" / "config.json").read_text())
    assert caplog.text == ""
    (tmp_path / "dit" / "config.json").write_text(json.dumps(config | {"return_dit": 1, "depht": 1}))
    assert read_config(STDiT3, tmp_path / "dit") == read_config(STDiT3, tmp_path / "dit") == expected
    assert len(caplog.records) == 1
    assert "depht, return_dit" in caplog.text
    assert str(tmp_path / "dit" / "config.json") in caplog.text


def test_a_mistyped_size_of_a_released_config_does_not_fit_its_weights(tmp_path: Path) -> None:
    config = json.loads((released_dit(tmp_path / "dit") / "config.json").read_text())
    config["depht"] = config.pop("depth")
    (tmp_path / "dit" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="lacks tensors"):
        STDiT3.from_pretrained(tmp_path / "dit")


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    config = json.loads((released_dit(tmp_path / "dit") / "config.json").read_text())
    (tmp_path / "dit" / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    with pytest.raises(CheckpointError, match="quantization_config"):
        STDiT3.from_pretrained(tmp_path / "dit")


def test_our_own_config_has_no_keys_of_transformers(tmp_path: Path) -> None:
    dit = STDiT3.from_pretrained(released_dit(tmp_path / "dit"), drop_path=0.1)
    dit.save_pretrained(tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config | {"max_length": 3}))
    with pytest.raises(ConfigError, match="unknown key 'max_length'"):
        STDiT3.from_pretrained(tmp_path / "ours")


SMALL_SPATIAL = SpatialVAEConfig(layers_per_block=1, block_out_channels=(4, 4, 4, 4), norm_num_groups=2)
SMALL_TEMPORAL = TemporalVAEConfig(filters=4, num_res_blocks=1, channel_multipliers=(1, 1, 1, 1), num_groups=2)


@dataclass(frozen=True, kw_only=True)
class SmallVAEConfig(VideoVAEConfig):
    spatial: SpatialVAEConfig = field(default_factory=lambda: SMALL_SPATIAL)
    temporal: TemporalVAEConfig = field(default_factory=lambda: SMALL_TEMPORAL)


class SmallVAE(VideoVAE):
    """Released configs state no widths; these are what a test can hold."""

    config_class = SmallVAEConfig


def released_vae(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(VAE_CONFIG | changes))
    tensors = {name: torch.randn(t.shape) for name, t in SmallVAE(SmallVAEConfig()).state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_released_vae_loads_and_comes_out_as_the_same_bytes(tmp_path: Path) -> None:
    folder = released_vae(tmp_path / "vae")
    vae = load_component(SmallVAE, folder)
    assert vae.config == SmallVAEConfig(micro_batch_size=2)
    save_component(vae, tmp_path / "export")
    assert contents(tmp_path / "export") == contents(folder)
    video = torch.rand(1, 3, 17, 16, 16)
    torch.testing.assert_close(load_component(SmallVAE, tmp_path / "export").encode(video), vae.encode(video))


def test_released_vae_of_whole_videos_loads_and_codes_them(tmp_path: Path) -> None:
    folder = released_vae(tmp_path / "vae", micro_frame_size=None)
    vae = load_component(SmallVAE, folder)
    assert vae.config == SmallVAEConfig(micro_batch_size=2, micro_frame_size=None)
    for frames, latents in ((1, 1), (18, 5), (34, 9)):  # chunks of 17 would make 1, 6 and 10
        assert vae.latent_shape(frames, 16, 16) == (4, latents, 2, 2)
        latent = vae.encode(torch.rand(1, 3, frames, 16, 16))
        assert latent.shape == (1, 4, latents, 2, 2)
        assert vae.decode(latent, frames).shape == (1, 3, frames, 16, 16)
    vae.save_pretrained(tmp_path / "export")
    assert contents(tmp_path / "export") == contents(folder)


def test_released_vae_config_means_the_full_size(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(VAE_CONFIG))
    assert read_config(VideoVAE, tmp_path) == VideoVAEConfig(micro_batch_size=2)
    with pytest.raises(ConfigError, match=r"config\.json.*STDiT3.*'cal_loss'"):
        read_config(STDiT3, tmp_path)


@pytest.mark.parametrize(
    ("part", "prefix"), [("VAE_Temporal_SD", "temporal_vae."), ("AutoencoderKL_sdxl", "spatial_vae.module.")]
)
def test_full_size_vae_has_the_released_keys_and_shapes(part: str, prefix: str) -> None:
    expected = json.loads(gzip.decompress((DATA / "vae_full_size_keys.json.gz").read_bytes()))[part]
    with torch.device("meta"):
        state = VideoVAE(VideoVAEConfig()).state_dict()
    found = {name.removeprefix(prefix): list(t.shape) for name, t in state.items() if name.startswith(prefix)}
    assert found == expected["keys"]
    assert sum(t.numel() for name, t in state.items() if name.startswith(prefix)) == expected["num_params"]
    others = {name for name in state if not name.startswith(("temporal_vae.", "spatial_vae.module."))}
    assert others == {"scale", "shift"}
    assert state["scale"].shape == state["shift"].shape == (1, 4, 1, 1, 1)


# --- model files ---


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Components in one place, as downloads lie in a folder; the T5 is a bare one."""
    return make_tiny_model(tmp_path_factory.mktemp("parts") / "tiny")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARLON_CACHE", str(tmp_path / "cache"))


def write_model_file(folder: Path, parts: Path, **changes: Any) -> Path:
    relative = os.path.relpath(parts, folder)
    sources = {"vae": f"{relative}/vae", "dit": f"{relative}/dit", "text_encoder": f"{relative}/text_encoder/t5"}
    values = {**sources, "defaults": {"height": 32, "width": 48, "segment": 15}, **changes}
    file = folder / "base.yaml"
    file.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))  # JSON is YAML
    return file


def test_a_model_file_makes_a_base_of_released_folders(parts: Path, tmp_path: Path) -> None:
    file = write_model_file(tmp_path, parts)
    model, identity = open_model(str(file), required=BASE_COMPONENTS)
    assert set(model.components) == set(BASE_COMPONENTS)
    assert identity["name"] == "base"
    assert (model.path / "dit").resolve() == (parts / "dit").resolve()
    assert find_weights(model.component("dit"))[0].samefile(parts / "dit" / "model.safetensors")
    encoder = load_text_encoder(model.component("text_encoder"))
    assert (encoder.dim, encoder.max_length, encoder.clean) == (12, 10, True)
    geometry = read_geometry(model)
    assert not geometry.has_codes
    assert (geometry.defaults.height, geometry.code_ratio, geometry.code_grid) == (32, (1, 1, 1), None)
    with pytest.raises(FileNotFoundError, match="lacks the components ar, injection, vqvae"):
        open_model(str(file), required=FILM_COMPONENTS)


def test_a_model_file_is_put_together_again_when_weights_change(parts: Path, tmp_path: Path) -> None:
    dit = tmp_path / "dit"
    dit.mkdir()
    for name in ("config.json", "model.safetensors"):
        (dit / name).write_bytes((parts / "dit" / name).read_bytes())
    file = write_model_file(tmp_path, parts, dit="dit")
    first = resolve_model(file)
    assert resolve_model(file) == first
    tensors = load_file(dit / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, dit / "model.safetensors")
    os.utime(dit / "model.safetensors", ns=(1, 1))
    second = resolve_model(file)
    assert second != first
    hashes = [ModelFolder.open(folder, required=(), verify=False).model_hash for folder in (first, second)]
    assert hashes[0] != hashes[1]


def test_some_of_the_code_components_are_refused(parts: Path, tmp_path: Path) -> None:
    file = write_model_file(tmp_path, parts, vqvae=str(parts / "vqvae"))
    with pytest.raises(FileNotFoundError, match="has vqvae but lacks ar, injection"):
        read_geometry(open_model(str(file), required=BASE_COMPONENTS)[0])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dit": "nowhere"}, FileNotFoundError, "dit: no folder 'nowhere', and that is no hub id"),
        ({"dit": "owner/not-cached"}, FileNotFoundError, "no folder 'owner/not-cached', and no model of that name"),
        ({"dti": "x"}, ConfigError, "unknown key 'dti', did you mean 'dit'"),
    ],
)
def test_wrong_model_files_say_what_is_wrong(
    parts: Path, tmp_path: Path, changes: dict[str, str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        resolve_model(write_model_file(tmp_path, parts, **changes))
    assert not list((tmp_path / "cache").rglob("*.json"))


def test_components_that_disagree_leave_nothing_behind(parts: Path, tmp_path: Path) -> None:
    small = released_dit(tmp_path / "dit")
    with pytest.raises(CheckpointError, match=r"text_encoder' has text width 12, but|dit' has text width 32, but"):
        combine(tmp_path / "model", ModelSources(dit=str(small), text_encoder=str(parts / "text_encoder" / "t5")))
    assert [path.name for path in tmp_path.iterdir()] == ["dit"]


def test_an_existing_folder_is_not_overwritten(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="is there already"):
        combine(tmp_path, ModelSources(dit=str(parts / "dit")))


# --- hub ---


def test_hub_fetches_one_folder_and_no_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text_encoder").mkdir()
    asked: list[tuple[str, dict[str, Any]]] = []

    def snapshot(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    found = hub.fetch("owner/name/text_encoder", siblings=("tokenizer",), download=False)
    assert found == tmp_path / "text_encoder"
    name, options = asked[0]
    assert (name, options["local_files_only"]) == ("owner/name", True)
    assert {pattern.split("/")[0] for pattern in options["allow_patterns"]} == {"text_encoder", "tokenizer"}
    assert {pattern.rsplit(".")[-1] for pattern in options["allow_patterns"]} == {"json", "safetensors", "model", "txt"}
    with pytest.raises(FileNotFoundError, match="has no folder 'nothing'"):
        hub.fetch("owner/name/nothing")


@pytest.mark.parametrize(
    ("name", "is_id"), [("a/b", True), ("a/b/c", True), ("a", False), ("../a", False), ("/a/b", False), ("a//b", False)]
)
def test_hub_ids_are_told_from_paths(name: str, is_id: bool) -> None:
    assert hub.is_hub_id(name) is is_id


# --- folders of released parts ---


@pytest.fixture
def released(parts: Path, tmp_path: Path) -> Path:
    """Released STDiT3, VAE and T5 folders side by side, under the names of the hub; no index."""
    folder = tmp_path / "Open-Sora-v1.2"
    for name, source in (("OpenSora-STDiT-v3", "dit"), ("OpenSora-VAE-v1.2", "vae"), ("t5", "text_encoder/t5")):
        shutil.copytree(parts / source, folder / name)
    config = json.loads((folder / "OpenSora-STDiT-v3" / "config.json").read_text())
    bare = {name: value for name, value in config.items() if not name.startswith("_")}
    (folder / "OpenSora-STDiT-v3" / "config.json").write_text(json.dumps(bare | DIT_EXTRAS))
    vae = read_config(VideoVAE, parts / "vae")
    widths = {
        "vae_2d": VAE_CONFIG["vae_2d"] | asdict(vae.spatial),
        "vae_temporal": VAE_CONFIG["vae_temporal"] | asdict(vae.temporal),
    }
    stated = VAE_CONFIG | widths | {"shift": list(vae.shift), "scale": list(vae.scale)}
    (folder / "OpenSora-VAE-v1.2" / "config.json").write_text(json.dumps(stated))
    return folder


def test_a_folder_of_released_parts_is_a_model(released: Path, parts: Path, tmp_path: Path) -> None:
    model, identity = open_model(str(released), required=BASE_COMPONENTS)
    assert set(model.components) == set(BASE_COMPONENTS)
    assert identity["name"] == "Open-Sora-v1.2"
    assert model.defaults["aesthetic_score"] == 6.5
    assert read_config(VideoVAE, model.component("vae")).temporal == read_config(VideoVAE, parts / "vae").temporal
    for name, kind, source in (("dit", STDiT3, "dit"), ("vae", VideoVAE, "vae")):
        module = kind.from_pretrained(model.component(name))
        save_component(module, tmp_path / name, dtype=stored_dtypes(model.component(name)))
        assert (tmp_path / name / "model.safetensors").read_bytes() == find_weights(parts / source)[0].read_bytes()


def test_no_film_is_made_with_a_vae_of_whole_videos(released: Path, tmp_path: Path) -> None:
    config = released / "OpenSora-VAE-v1.2" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"micro_frame_size": None}))
    size = {"height": 64, "width": 48, "fps": 8, "num_inference_steps": 1}
    with pytest.raises(ValueError, match=r"micro_frame_size.*17"):
        prepared_film(released, tmp_path / "film.mp4", {"prompt": "a red circle", "duration": "102f"}, **size)
    assert not (tmp_path / "film.mp4").exists()


@pytest.mark.slow
def test_a_folder_of_released_parts_generates_in_every_mode(released: Path, tmp_path: Path) -> None:
    Image.new("RGB", (50, 40), (200, 30, 30)).save(tmp_path / "red.png")
    still = {"prompt": "a red circle", "duration": "1f"}
    text = {"prompt": "a red circle", "duration": "102f"}
    size = {"height": 64, "width": 48, "fps": 8, "num_inference_steps": 1}  # portrait

    def film(name: str, shot: dict[str, Any]) -> Path:
        return generate(prepared_film(released, tmp_path / name, shot, **size)).film

    board = parse_storyboard({"seed": 7, "shots": [still], **size})
    picture = make_picture(prepare_picture(board, model=str(released), output=tmp_path / "a.png")).picture
    with Image.open(picture) as image:
        assert image.size == (48, 64)
    first = film("text.mp4", text)
    for name, given in (
        ("image", {"image": str(picture)}),
        ("ends", {"image": str(picture), "end_image": str(tmp_path / "red.png")}),
        ("video", {"video": str(first)}),
    ):
        made = film(f"{name}.mp4", text | given)
        info = probe(made)
        assert (info.height, info.width, info.num_frames) == (64, 48, 119)
        assert made.read_bytes() != first.read_bytes()
    placed = {"references": [str(picture), str(first)], "mask_strategy": "0;0,1,0,5,5,0.5;1,0,0,-1"}
    assert probe(film("placed.mp4", text | placed)).num_frames == 119
    assert probe(film("short.mp4", still | {"duration": "9f"})).num_frames == 9


def test_a_folder_that_lacks_a_part_says_which(released: Path) -> None:
    shutil.rmtree(released / "OpenSora-VAE-v1.2")
    with pytest.raises(FileNotFoundError, match=r"lacks vae.*dit.*'OpenSora-STDiT-v3'.*text_encoder.*'t5'"):
        resolve_model(released)


HUB_COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def on_hub(released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The released parts as the hub's cache keeps a repository `owner/parts`: links to files named by their hash."""
    repository = tmp_path / "hub" / "models--owner--parts"
    snapshot = repository / "snapshots" / HUB_COMMIT
    for number, file in enumerate(sorted(path for path in released.rglob("*") if path.is_file())):
        blob, link = repository / "blobs" / str(number), snapshot / file.relative_to(released)
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(HUB_COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(repository.parent))
    return snapshot


def test_released_parts_of_one_hub_repository_are_a_model(on_hub: Path, released: Path) -> None:
    model, identity = open_model("owner/parts", required=BASE_COMPONENTS, download=False)
    assert set(model.components) == set(BASE_COMPONENTS)
    assert identity["name"] == "owner/parts"
    assert model.path.name.startswith("parts-")
    assert model.component("dit").resolve() == on_hub / "OpenSora-STDiT-v3"
    local = open_model(str(released), required=BASE_COMPONENTS)[0]
    assert [model.components[name] for name in ("dit", "vae")] == [local.components[name] for name in ("dit", "vae")]
    assert load_text_encoder(model.component("text_encoder")).encode(["a red circle"]).mask.sum() == 4
    assert read_geometry(model).grid == read_geometry(local).grid


def test_a_hub_repository_of_one_part_says_what_it_lacks(on_hub: Path) -> None:
    for file in sorted((on_hub / "OpenSora-STDiT-v3").iterdir()):
        shutil.copyfile(file, on_hub / file.name)
    for part in ("OpenSora-STDiT-v3", "OpenSora-VAE-v1.2", "t5"):
        shutil.rmtree(on_hub / part)
    for name in ("owner/parts", str(on_hub)):
        with pytest.raises(FileNotFoundError) as error:
            resolve_model(name, download=False)
        message = f"{name!r} has no model_index.json and lacks vae, text_encoder (it has dit in '.'): put the released"
        assert str(error.value).startswith(message)


def test_a_hub_model_with_an_index_is_taken_as_it_is(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arlon.checkpoint.fetch", lambda name, *, download: parts)
    assert resolve_model("owner/model") == parts
