"""PixArt-Sigma as the start of an STDiT3, against a naive PixArt on the same tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from arlon.checkpoint import CheckpointError
from arlon.models.embeddings import spatial_position
from arlon.models.pixart import load_pixart
from arlon.models.stdit import STDiT3, STDiT3Config
from tests.closeness import assert_close_to_scale

DIM, HEADS, DEPTH, CHANNELS, TEXT = 24, 3, 2, 4, 10
Weights = dict[str, Tensor]


def make_pixart(null_tokens: int = 5) -> Weights:
    """A random PixArt-Sigma, with the names of its authors."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, 16, DIM),
        "x_embedder.proj.weight": (DIM, CHANNELS, 2, 2),
        "x_embedder.proj.bias": (DIM,),
        "y_embedder.y_embedding": (null_tokens, TEXT),
        "final_layer.scale_shift_table": (2, DIM),
    }
    linears = {
        "t_embedder.mlp.0": (DIM, 256),
        "t_embedder.mlp.2": (DIM, DIM),
        "t_block.1": (6 * DIM, DIM),
        "y_embedder.y_proj.fc1": (DIM, TEXT),
        "y_embedder.y_proj.fc2": (DIM, DIM),
        "final_layer.linear": (2 * 2 * 2 * CHANNELS, DIM),
    }
    for block in range(DEPTH):
        shapes[f"blocks.{block}.scale_shift_table"] = (6, DIM)
        linears |= {
            f"blocks.{block}.attn.qkv": (3 * DIM, DIM),
            f"blocks.{block}.attn.proj": (DIM, DIM),
            f"blocks.{block}.cross_attn.q_linear": (DIM, DIM),
            f"blocks.{block}.cross_attn.kv_linear": (2 * DIM, DIM),
            f"blocks.{block}.cross_attn.proj": (DIM, DIM),
            f"blocks.{block}.mlp.fc1": (4 * DIM, DIM),
            f"blocks.{block}.mlp.fc2": (DIM, 4 * DIM),
        }
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {name: torch.randn(shape, generator=generator) / math.sqrt(shape[-1]) for name, shape in shapes.items()}


def make_stdit(**changes: Any) -> STDiT3:
    torch.manual_seed(1)
    sizes = {"hidden_size": DIM, "num_heads": HEADS, "depth": DEPTH, "in_channels": CHANNELS, "caption_channels": TEXT}
    return STDiT3(STDiT3Config(**{**sizes, "model_max_length": 7, "qk_norm": False, "input_sq_size": 64, **changes}))


def store(weights: Any, path: Path) -> Path:
    save_file(weights, path) if path.suffix == ".safetensors" else torch.save(weights, path)
    return path


def run_pixart(weights: Weights, latent: Tensor, t: Tensor, text: Tensor, position: Tensor) -> Tensor:
    """First half of what PixArt-Sigma makes of latents (B, C, H, W) at times (B,) in 0..1000, step by step."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(x, (DIM,), eps=1e-6) * (1 + scale) + shift

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = [one.unflatten(-1, (HEADS, -1)).transpose(1, 2) for one in (q, k, v)]
        scores = heads[0] @ heads[1].transpose(-1, -2) / math.sqrt(DIM // HEADS)
        return (scores.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2)

    rows, columns = latent.shape[2] // 2, latent.shape[3] // 2
    x = F.conv2d(latent, weights["x_embedder.proj.weight"], weights["x_embedder.proj.bias"], stride=2)
    x = x.flatten(2).transpose(1, 2) + position
    angles = t[:, None] * torch.exp(torch.arange(128) * (-math.log(10000) / 128))
    time = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], -1))))
    six = linear("t_block.1", F.silu(time)).unflatten(-1, (6, DIM))
    text = linear("y_embedder.y_proj.fc2", F.gelu(linear("y_embedder.y_proj.fc1", text), approximate="tanh"))
    for block in range(DEPTH):
        name = f"blocks.{block}"
        s1, c1, g1, s2, c2, g2 = (weights[f"{name}.scale_shift_table"] + six)[:, :, None].unbind(1)
        q, k, v = linear(f"{name}.attn.qkv", norm(x, s1, c1)).chunk(3, dim=-1)
        x = x + g1 * linear(f"{name}.attn.proj", attend(q, k, v))
        k, v = linear(f"{name}.cross_attn.kv_linear", text).chunk(2, dim=-1)
        x = x + linear(f"{name}.cross_attn.proj", attend(linear(f"{name}.cross_attn.q_linear", x), k, v))
        hidden = F.gelu(linear(f"{name}.mlp.fc1", norm(x, s2, c2)), approximate="tanh")
        x = x + g2 * linear(f"{name}.mlp.fc2", hidden)
    shift, scale = (weights["final_layer.scale_shift_table"] + time[:, None])[:, :, None].unbind(1)
    patches = linear("final_layer.linear", norm(x, shift, scale)).unflatten(-1, (2, 2, -1))
    patches = patches.unflatten(1, (rows, columns))  # (B, rows, columns, 2, 2, 2 C)
    return torch.einsum("nhwpqc->nchpwq", patches).reshape(len(latent), -1, 2 * rows, 2 * columns)[:, :CHANNELS]


@pytest.mark.parametrize("name", ["pixart.safetensors", "bare.pth", "wrapped.pth", "both.pt", "average.pt"])
@torch.no_grad()
def test_one_frame_is_read_as_pixart_reads_it(tmp_path: Path, name: str) -> None:
    weights = make_pixart()
    other = {key: torch.zeros_like(tensor) for key, tensor in weights.items()}
    wrapped = {
        "wrapped.pth": {"state_dict": weights, "epoch": 3},
        "both.pt": {"state_dict": weights, "state_dict_ema": other, "optimizer": {"state": {0: torch.ones(2)}}},
        "average.pt": {"state_dict_ema": weights},
    }
    dit = make_stdit().eval()
    load_pixart(dit, store(wrapped.get(name, weights), tmp_path / name))
    latent, text, t = torch.randn(2, CHANNELS, 6, 10), torch.randn(2, 7, TEXT), torch.tensor([0.3, 0.9])
    size = torch.tensor([48.0, 48.0]), torch.tensor([80.0, 80.0])
    position = spatial_position(*size, (3, 5), DIM, 64)
    expected = run_pixart(weights, latent, 1000 * t, text, position)
    got = dit(latent.unsqueeze(2), t, text, fps=24.0, height=48.0, width=80.0)
    assert_close_to_scale(-got.squeeze(2), expected)


def test_what_pixart_lacks_stays_fresh(tmp_path: Path) -> None:
    weights, dit = make_pixart(), make_stdit(qk_norm=True)
    before = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
    names = load_pixart(dit, store(weights, tmp_path / "pixart.pth"))
    state = dit.state_dict()
    assert set(names.loaded) | set(names.fresh) == state.keys()
    assert len(names.loaded) == len(weights) - 1  # all but pos_embed
    groups = {name.split(".")[0] for name in names.fresh if "_norm." not in name}
    assert groups == {"temporal_blocks", "fps_embedder", "rope"}
    assert sum(name.startswith("spatial_blocks") for name in names.fresh) == 2 * DEPTH
    for name in names.fresh:
        assert torch.equal(state[name], before[name]), name
    for name, tensor in weights.items():
        if name not in ("pos_embed", "x_embedder.proj.weight", "y_embedder.y_embedding"):
            assert torch.equal(state[name.replace("blocks.", "spatial_blocks.")], tensor), name


@pytest.mark.parametrize("rows", [1, 5, 7, 9])
def test_null_caption_is_cut_or_its_last_row_repeated(tmp_path: Path, rows: int) -> None:
    weights, dit = make_pixart(rows), make_stdit()
    load_pixart(dit, store(weights, tmp_path / "pixart.safetensors"))
    given, got = weights["y_embedder.y_embedding"], dit.y_embedder.y_embedding
    assert got.shape == (7, TEXT)
    for row in range(7):
        assert torch.equal(got[row], given[min(row, rows - 1)])


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda w: w.pop("blocks.1.mlp.fc2.bias"), {}, "lacks tensors, 1: spatial_blocks.1.mlp.fc2.bias"),
        (lambda w: w.pop("y_embedder.y_embedding"), {}, "lacks tensors, 1: y_embedder.y_embedding"),
        (
            lambda w: w.update({"csize_embedder.mlp.0.bias": torch.zeros(3)}),
            {},
            "has unknown tensors, 1: csize_embedder",
        ),
        (
            lambda w: w.update({"blocks.0.attn.sr.bias": torch.zeros(3)}),
            {},
            "unknown tensors, 1: spatial_blocks.0.attn.sr",
        ),
        (
            lambda w: w.update({"t_block.1.bias": torch.zeros(3)}),
            {},
            r"has unfit tensors, 1: t_block.1.bias is torch.float32 \(3,\), expected floating-point \(144,\)",
        ),
        (
            lambda w: w.update({"t_block.1.bias": torch.zeros(144, dtype=torch.int8)}),
            {},
            "t_block.1.bias is torch.int8",
        ),
        (lambda w: None, {"depth": 3}, r"lacks tensors, 15: spatial_blocks.2.scale_shift_table, .* and 11 more"),
        (lambda w: None, {"depth": 1}, r"has unknown tensors, 15: spatial_blocks.1"),
        (
            lambda w: None,
            {"pred_sigma": False},
            r"final_layer.linear.weight is torch.float32 \(32, 24\), .* \(16, 24\)",
        ),
        (
            lambda w: None,
            {"patch_size": (2, 2, 2)},
            r"x_embedder.proj.weight is .* \(24, 4, 1, 2, 2\), .* \(24, 4, 2, 2",
        ),
        (lambda w: w.update({"transformer_blocks.0.x": torch.zeros(1)}), {}, "is in the layout of diffusers; expected"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(
    tmp_path: Path, change: Callable[[Weights], Any], options: dict[str, Any], message: str
) -> None:
    weights, dit = make_pixart(), make_stdit(**options)
    change(weights)
    before = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_pixart(dit, store(weights, tmp_path / "pixart.pth"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in dit.state_dict().items())


class Sly:
    """Code that a pickle would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("sly"),)


def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none\.pth.*PixArt-Sigma"):
        load_pixart(make_stdit(), "none.pth")
    store({"state_dict": make_pixart(), "sly": Sly()}, tmp_path / "sly.pth")
    whole = store(make_pixart(), tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 9)
    for name in ("sly.pth", "cut.pth", "cut.safetensors"):
        with pytest.raises(CheckpointError, match=rf"{name}' is damaged, or holds more than tensors, .* store its"):
            load_pixart(make_stdit(), name)
    assert not (tmp_path / "sly").exists()
    for content in ([1, 2], {"state_dict": [1]}, {"epoch": 3}):
        with pytest.raises(CheckpointError, match="state dict"):
            load_pixart(make_stdit(), store(content, tmp_path / "other.pt"))


def test_full_size_takes_what_the_authors_name() -> None:
    """Of the 973 tensors of XL/2, those of PixArt-Sigma-XL/2 are 28 blocks of 15 and 16 others; none is left over."""
    names = [name for name in make_pixart() if not name.startswith("blocks.")]
    of_block = [name.removeprefix("blocks.0.") for name in make_pixart() if name.startswith("blocks.0.")]
    names += [f"blocks.{block}.{name}" for block in range(28) for name in of_block]
    with torch.device("meta"):
        state = STDiT3(STDiT3Config()).state_dict()
    mapped = {name.replace("blocks.", "spatial_blocks.") for name in names} - {"pos_embed"}
    assert mapped <= state.keys()
    assert len(mapped) == 28 * 15 + 16
