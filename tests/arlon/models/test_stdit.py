"""STDiT3 against figures of the released code, and what must hold for any weights."""

import gzip
import json
import math
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from arlon.attention import automatic
from arlon.diffusion import flow
from arlon.models.layers import CrossAttention, Mlp, RotaryTime, SelfAttention, TextTokens, rotate_pairs
from arlon.models.stdit import STDiT3, STDiT3Config, keep_tokens
from tests.closeness import assert_close_to_scale

DATA = Path(__file__).parents[2] / "data"
FLOAT32_ERROR = 1e-5


def make_dit(**changes) -> STDiT3:
    """A tiny STDiT3 in eval mode whose weights, zero-initialised ones included, are random."""
    values = {"hidden_size": 16, "depth": 2, "num_heads": 2, "caption_channels": 6, "model_max_length": 5}
    torch.manual_seed(0)
    dit = STDiT3(STDiT3Config(**values | changes))
    with torch.no_grad():
        for name, parameter in dit.named_parameters():
            if name.endswith("weight") and parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return dit.eval()


def make_inputs(batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "latent": torch.randn(batch, 4, 3, 4, 6, generator=generator),
        "t": torch.linspace(0.2, 0.9, batch),
        "text": torch.randn(batch, 5, 6, generator=generator),
        "text_mask": torch.tensor([[True, True, False, False, False], [True] * 5])[:batch],
        "frame_mask": torch.tensor([[False, True, True], [True, True, True]])[:batch],
        "fps": torch.full((batch,), 24.0),
        "height": torch.full((batch,), 32.0),
        "width": torch.full((batch,), 48.0),
    }


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float(((got - expected).norm() / expected.norm()).detach())


@pytest.fixture(scope="module")
def golden_dit() -> STDiT3:
    config = json.loads((DATA / "stdit3_s_weights.json").read_text())["config"]
    dit = STDiT3(STDiT3Config(**config))
    dit.load_state_dict(load_file(DATA / "stdit3_s_weights.safetensors"), strict=True)
    return dit.eval()


def golden_arguments(case: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inputs of a golden case in our convention: t in [0, 1], text (B, L, E), bool masks."""
    arguments = {name: case[f"in.{name}"] for name in ("fps", "height", "width")}
    arguments |= {"latent": case["in.x"], "t": case["in.timestep"] / 1000, "text": case["in.y"][:, 0]}
    masks = {"text_mask": "in.mask", "frame_mask": "in.x_mask"}
    return arguments | {name: case[key].bool() for name, key in masks.items() if key in case}


@pytest.mark.parametrize("name", ["plain", "nonsquare_lens", "odd_pad_xmask", "image"])
def test_forward_equals_the_released_code(golden_dit: STDiT3, name: str):
    case = load_file(DATA / f"stdit3_s_{name}.safetensors")
    with torch.no_grad():
        velocity = golden_dit(**golden_arguments(case))
    assert velocity.dtype == torch.float32
    assert relative_error(velocity, -case["out"][:, :4]) <= FLOAT32_ERROR


@pytest.mark.parametrize("name", ["plain", "odd_pad_xmask"])
def test_every_block_equals_the_released_code(golden_dit: STDiT3, name: str):
    case, found = load_file(DATA / f"stdit3_s_{name}.safetensors"), {}

    def keep(key: str):
        return lambda module, args, out: found.update({key: out})

    hooks = [golden_dit.x_embedder.register_forward_hook(keep("embedded"))]
    for kind in ("spatial", "temporal"):
        for i, block in enumerate(getattr(golden_dit, f"{kind}_blocks")):
            hooks.append(block.register_forward_hook(keep(f"mid.{kind}.{i}")))
        hooks.append(getattr(golden_dit, f"{kind}_blocks")[0].attn.register_forward_hook(keep(f"mid.{kind}.0.attn")))
    try:
        with torch.no_grad():
            golden_dit(**golden_arguments(case))
    finally:
        for hook in hooks:
            hook.remove()
    blocks = {key: got for key, got in found.items() if key.startswith("mid")}
    blocks["mid.temporal.0.attn"] = blocks["mid.temporal.0.attn"].transpose(1, 2)  # theirs: time is a row
    errors = {key: relative_error(got.reshape(case[key].shape), case[key]) for key, got in blocks.items()}
    assert len(errors) == 6
    assert max(errors.values()) <= FLOAT32_ERROR, errors


def test_loss_and_gradients_equal_the_released_code(golden_dit: STDiT3):
    case = load_file(DATA / "stdit3_s_trainloss.safetensors")
    clean, noise, t, mask = case["in.x0"], case["in.noise"], case["in.t"] / 1000, case["in.x_mask"].bool()
    golden_dit.zero_grad()
    velocity = golden_dit(
        flow.add_noise(clean, noise, t, mask), t, case["in.y"][:, 0], case["in.text_mask"].bool(), mask,
        **{name: case[f"in.{name}"] for name in ("fps", "height", "width")},
    )  # fmt: skip
    loss = flow.flow_loss(velocity, flow.velocity_target(clean, noise), mask)
    loss.mean().backward()
    assert relative_error(loss.detach(), case["loss"]) <= FLOAT32_ERROR
    expected = {key[5:]: value for key, value in case.items() if key.startswith("grad.")}
    got = {name: p.grad for name, p in golden_dit.named_parameters() if p.requires_grad}
    assert expected.keys() == got.keys()
    errors = {name: relative_error(got[name], expected[name]) for name in expected}
    assert max(errors.values()) <= FLOAT32_ERROR, max(errors.items(), key=lambda item: item[1])
    golden_dit.zero_grad()


def test_bfloat16_stays_within_the_error_of_the_released_code(golden_dit: STDiT3):
    case = load_file(DATA / "stdit3_s_odd_pad_xmask.safetensors")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        velocity = golden_dit(**golden_arguments(case))
    assert relative_error(velocity, -case["out"][:, :4]) <= 0.011


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("STDiT3-XL/2", {"hidden_size": 1152, "num_heads": 16}),
        ("STDiT3-3B/2", {"hidden_size": 1872, "num_heads": 26}),
    ],
)
def test_full_size_has_the_released_keys_and_shapes(name: str, sizes: dict[str, int]):
    expected = json.loads(gzip.decompress((DATA / "stdit3_full_size_keys.json.gz").read_bytes()))[name]
    with torch.device("meta"):
        dit = STDiT3(STDiT3Config(**sizes))
    assert {key: list(value.shape) for key, value in dit.state_dict().items()} == expected["keys"]
    assert sum(p.numel() for p in dit.parameters()) == expected["num_params"]


def test_full_size_forward_runs_on_the_meta_device():
    with torch.device("meta"):
        dit = STDiT3(STDiT3Config(depth=2, hidden_size=1152, num_heads=16))
        inputs = {
            "latent": torch.empty(2, 4, 20, 64, 64), "t": torch.empty(2), "text": torch.empty(2, 300, 4096),
            "text_mask": torch.ones(2, 300, dtype=torch.bool),
            "frame_mask": torch.ones(2, 20, dtype=torch.bool),
        }  # fmt: skip
    velocity = dit(**inputs, fps=24, height=512, width=512)  # outside: a tensor made on the CPU would not fit
    assert velocity.shape == (2, 4, 20, 64, 64)
    assert velocity.device.type == "meta"


def test_masked_text_has_no_influence():
    dit, inputs = make_dit(), make_inputs()
    changed = inputs | {"text": torch.where(inputs["text_mask"][..., None], inputs["text"], 1e3)}
    torch.testing.assert_close(dit(**inputs), dit(**changed), rtol=0, atol=0)


def test_sample_without_text_is_finite_and_does_not_see_text():
    dit, inputs = make_dit(), make_inputs()
    inputs["text_mask"] = torch.tensor([[False] * 5, [True] * 5])
    inputs["text"].requires_grad_()
    velocity = dit(**inputs)
    velocity.square().sum().backward()
    assert velocity.isfinite().all()
    assert inputs["text"].grad.isfinite().all()
    assert inputs["text"].grad[0].abs().max() == 0
    assert inputs["text"].grad[1].abs().max() > 0


def test_a_sample_does_not_depend_on_the_others_of_its_batch():
    dit, inputs = make_dit(), make_inputs()
    inputs |= {"height": torch.tensor([32.0, 64.0]), "width": torch.tensor([48.0, 40.0])}
    both = dit(**inputs)
    for row in range(2):
        alone = dit(**{name: value[row : row + 1] for name, value in inputs.items()})
        assert_close_to_scale(both[row : row + 1], alone)


def test_frame_mask_of_noisy_frames_only_changes_nothing():
    dit, inputs = make_dit(), make_inputs()
    torch.testing.assert_close(
        dit(**inputs | {"frame_mask": torch.ones(2, 3, dtype=torch.bool)}),
        dit(**inputs | {"frame_mask": None}),
    )


def test_frame_mask_is_one_of_patches_where_they_span_frames():
    """A latent of 3 frames in patches of 2: the last patch is made of its third frame and padding."""
    dit, inputs = make_dit(patch_size=(2, 2, 2)), make_inputs()
    seen: list[Tensor] = []
    dit.final_layer.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[3]))
    mask = torch.tensor([[False, False, True], [True, True, False]])
    masked = dit(**inputs | {"frame_mask": mask})
    assert torch.equal(seen[0], torch.tensor([[False, True], [True, False]]))
    assert relative_error(masked, dit(**inputs | {"frame_mask": ~mask})) > 1e-3
    with pytest.raises(ValueError, match=r"2 latent frames.*patch 0.*sample 1"):
        dit(**inputs | {"frame_mask": torch.tensor([[False, False, True], [True, False, False]])})


@pytest.mark.parametrize("temporal", [False, True])
def test_self_attention_equals_a_naive_loop(temporal: bool):
    torch.manual_seed(0)
    attention, rope = SelfAttention(12, 3, qk_norm=True, temporal=temporal).double(), RotaryTime(4)
    torch.nn.init.normal_(attention.q_norm.weight)
    torch.nn.init.normal_(attention.k_norm.weight)
    tokens = torch.randn(1, 2, 5, 12, dtype=torch.double)  # two frames of five places, or two places in five frames
    if temporal:
        tokens = tokens.transpose(1, 2)
    rows = tokens.transpose(1, 2)[0] if temporal else tokens[0]
    q, k, v = attention.qkv(rows).view(2, 5, 3, 3, 4).unbind(2)

    def turned(value: Tensor, weight: Tensor, place: int) -> Tensor:
        value = value / (value.square().mean() + 1e-6).sqrt() * weight
        angles = [temporal * place * 10_000 ** (-2 * i / 4) for i in range(2)]
        pairs = [[[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]] for a in angles]
        return torch.block_diag(*(torch.tensor(pair, dtype=torch.double) for pair in pairs)) @ value

    expected = torch.zeros(2, 5, 3, 4, dtype=torch.double)
    for b, h, i in product(range(2), range(3), range(5)):
        query = turned(q[b, i, h], attention.q_norm.weight, i)
        scores = [query @ turned(k[b, j, h], attention.k_norm.weight, j) / 2 for j in range(5)]
        expected[b, i, h] = torch.stack(scores).softmax(0) @ v[b, :, h]
    expected = attention.proj(expected.flatten(2))
    got = attention(tokens, rope(5) if temporal else None)[0]
    # queries and keys are normalised and rotated in float32, so double inputs agree to float32
    assert_close_to_scale(got.transpose(0, 1) if temporal else got, expected)


def test_rotation_depends_on_the_distance_of_frames_only():
    rope = RotaryTime(8)
    q, k = torch.randn(2, 8)
    turned_q, turned_k = (rotate_pairs(v.expand(1, 9, 1, 1, 8), rope(9))[0, :, 0, 0] for v in (q, k))
    scores = turned_q @ turned_k.T
    for offset in (-3, 0, 4):
        diagonal = scores.diagonal(offset)
        assert_close_to_scale(diagonal, diagonal[:1].expand_as(diagonal))


def test_cross_attention_equals_attention_to_the_kept_tokens():
    torch.manual_seed(0)
    attention = CrossAttention(8, 2)
    x, text = torch.randn(2, 6, 8), torch.randn(2, 5, 8)
    mask = torch.tensor([[True, False, True, False, False], [False, True, True, True, True]])
    both = attention(x, TextTokens(text, mask))
    for row in range(2):
        alone = attention(x[row : row + 1], TextTokens(text[row : row + 1, mask[row]], None))
        torch.testing.assert_close(both[row : row + 1], alone)


def test_an_mlp_without_gradients_equals_one_with_them():
    torch.manual_seed(0)
    mlp, x = Mlp(6, 10, 4), torch.randn(3, 7, 6)
    expected = mlp.fc2(torch.nn.functional.gelu(mlp.fc1(x), approximate="tanh"))
    before = x.clone()
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(mlp(x), expected, rtol=0, atol=0)
    assert torch.equal(x, before)


@pytest.mark.parametrize("mask_kind", ["none", "uneven", "even", "empty"])
def test_prepared_text_gives_the_same_velocity(mask_kind: str):
    dit, inputs = make_dit(), make_inputs()
    masks = {
        "none": None,
        "uneven": [[False, True, False, True, False], [True, True, True, False, True]],
        "even": [[False, True, False, True, False], [True, False, False, False, True]],
        "empty": [[False] * 5, [False, False, True, False, False]],
    }
    mask = masks[mask_kind] if mask_kind == "none" else torch.tensor(masks[mask_kind])
    inputs["text_mask"] = mask
    with torch.no_grad():
        expected = dit(**inputs)
        prepared = dit.prepare_text(inputs["text"], mask)
        for t in (inputs["t"], inputs["t"] / 2):
            got = dit(**inputs | {"t": t, "text": prepared, "text_mask": None})
            expected = dit(**inputs | {"t": t})
            assert_close_to_scale(got, expected)
    keys = prepared.keys[0][0]
    assert keys.keys.shape[2] == {"none": 5, "uneven": 4, "even": 2, "empty": 1}[mask_kind]
    assert (keys.mask is None) == (mask_kind in ("none", "even"))


def test_preparing_a_text_drops_no_caption():
    dit, inputs = make_dit(class_dropout_prob=1.0), make_inputs()
    expected = dit.prepare_text(inputs["text"]).keys[1][1]
    got = dit.train().prepare_text(inputs["text"]).keys[1][1]
    torch.testing.assert_close(got.values, expected.values, rtol=0, atol=0)
    assert (expected.values[0] - expected.values[1]).abs().max() > 1e-3


def test_prepared_text_of_another_batch_or_with_a_mask_is_refused():
    dit, inputs = make_dit(), make_inputs()
    prepared = dit.prepare_text(inputs["text"])
    with pytest.raises(ValueError, match="give text_mask to prepare_text"):
        dit(**inputs | {"text": prepared})
    alone = dit.prepare_text(inputs["text"][:1])
    with pytest.raises(ValueError, match=r"text.*1.*latent.*2"):
        dit(**inputs | {"text": alone, "text_mask": None})
    with pytest.raises(ValueError, match="text_mask must be bool"):
        dit.prepare_text(inputs["text"], torch.ones(2, 4, dtype=torch.bool))


def test_kept_tokens_come_first_and_in_order():
    text = torch.arange(2 * 4, dtype=torch.float32).view(2, 4, 1)
    mask = torch.tensor([[False, True, False, True], [False, False, True, False]])
    kept, kept_mask = keep_tokens(text, mask)
    assert kept[0, :, 0].tolist() == [1, 3]
    assert kept[1, 0, 0] == 6
    assert kept_mask.tolist() == [[True, True], [True, False]]


def test_inject_sees_tokens_in_time_row_column_order_and_replaces_them():
    dit, inputs = make_dit(), make_inputs()
    seen = []

    def inject(i: int, y: Tensor) -> Tensor:
        seen.append((i, tuple(y.shape)))
        return y

    plain = dit(**inputs)
    torch.testing.assert_close(dit(**inputs, inject=inject), plain, rtol=0, atol=0)
    assert seen == [(0, (2, 18, 16)), (1, (2, 18, 16))]

    def last_frame_only(i: int, y: Tensor) -> Tensor:
        return torch.cat((y[:, :12], y[:, 12:] + 1), dim=1) if i == 1 else y

    changed = (dit(**inputs, inject=last_frame_only) - plain).abs().amax(dim=(0, 1, 3, 4))
    assert changed[2] > 0
    assert changed[:2].max() == 0


def test_inject_stands_between_temporal_attention_and_its_gate():
    """x + gate * inject(attention(...)): what a temporal block adds follows by hand."""
    dit, inputs = make_dit(), make_inputs()
    block, seen = dit.temporal_blocks[1], {}
    hooks = [
        block.attn.register_forward_hook(lambda module, args, out: seen.update(attention=out)),
        block.register_forward_pre_hook(lambda module, args: seen.update(x=args[0], six=args[1])),
        block.cross_attn.register_forward_pre_hook(lambda module, args: seen.update(after=args[0])),
    ]
    added = torch.randn(2, 18, 16)

    def inject(i: int, y: Tensor) -> Tensor:
        seen.update(y=y)
        return y + added

    try:
        dit(**inputs, inject=inject)
    finally:
        for hook in hooks:
            hook.remove()
    torch.testing.assert_close(seen["y"], seen["attention"].flatten(1, 2))
    gate = (block.scale_shift_table + seen["six"])[:, :, None, 2]
    expected = seen["x"] + gate * (seen["attention"] + added.view(2, 3, 6, 16))
    torch.testing.assert_close(seen["after"], expected.flatten(1, 2))


def test_gradient_checkpointing_gives_the_same_gradients():
    dit, inputs = make_dit(drop_path=0.5).train(), make_inputs()
    scale = torch.ones(16, requires_grad=True)
    grads = []
    for dit.gradient_checkpointing in (False, True):
        dit.zero_grad()
        scale.grad = None
        generator = torch.Generator().manual_seed(3)
        dit(**inputs, inject=lambda i, y: y * scale, generator=generator).square().sum().backward()
        grads.append([scale.grad, *(p.grad for p in dit.parameters() if p.requires_grad)])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_caption_dropout_gives_the_null_caption_and_follows_the_generator():
    dit, inputs = make_dit(class_dropout_prob=1.0), make_inputs()
    inputs["text"], inputs["text_mask"] = inputs["text"][:, :3], inputs["text_mask"][:, :3]
    null = dit(**inputs | {"text": dit.null_text(3).expand(2, -1, -1)})
    torch.testing.assert_close(dit.train()(**inputs), null)

    dit, inputs = make_dit(class_dropout_prob=0.5).train(), make_inputs()
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2, 3, 4, 5)]
    first, again, *others = (dit(**inputs, generator=seed) for seed in seeds)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert any(not torch.equal(first, other) for other in others)


def test_stochastic_depth_keeps_the_expected_branch():
    dit = make_dit(drop_path=0.5, depth=3).train()
    x = torch.empty(1000, 1)
    factors = [dit._draw_keep(i, x, torch.Generator().manual_seed(0)) for i in range(3)]
    assert factors[0].eq(1).all()
    assert set(factors[2].unique().tolist()) == {0.0, 2.0}
    assert abs(float(factors[1].mean()) - 1) < 0.05
    assert abs(float(factors[2].mean()) - 1) < 0.1
    assert dit.eval()._draw_keep(2, x, None) is None


def test_fresh_temporal_blocks_have_no_effect():
    dit = STDiT3(STDiT3Config(hidden_size=16, depth=2, num_heads=2, caption_channels=6, model_max_length=5)).eval()
    inputs = make_inputs()
    plain = dit(**inputs)
    for block in dit.temporal_blocks:
        torch.nn.init.normal_(block.attn.qkv.weight)
        torch.nn.init.normal_(block.scale_shift_table)
    torch.testing.assert_close(dit(**inputs), plain, rtol=0, atol=0)
    assert plain.abs().max() > 0


def test_rotation_angles_stay_float32():
    dit = make_dit().to(torch.bfloat16)
    assert dit.rope.freqs.dtype == torch.float32
    torch.testing.assert_close(dit.rope.freqs, RotaryTime(8).freqs, rtol=0, atol=0)
    inputs = make_inputs()
    assert relative_error(dit(**inputs), make_dit()(**inputs)) < 0.05


def test_only_the_temporal_blocks_train_when_asked():
    dit = make_dit(only_train_temporal=True)
    trained = {name.split(".")[0] for name, p in dit.named_parameters() if p.requires_grad}
    assert trained == {"temporal_blocks"}


def test_saved_model_computes_the_same(tmp_path: Path):
    dit, inputs = make_dit(), make_inputs()
    dit.save_pretrained(tmp_path / "dit")
    file = tmp_path / "dit" / "config.json"
    values = json.loads(file.read_text()) | {"model_type": "STDiT3", "architectures": ["STDiT3"]}
    file.write_text(json.dumps(values))
    loaded = STDiT3.from_pretrained(tmp_path / "dit")
    assert loaded.config == dit.config
    torch.testing.assert_close(loaded(**inputs), dit(**inputs), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent": torch.zeros(2, 3, 3, 4, 6)}, r"latent must be \(B, 4, T, H, W\), got \(2, 3, 3, 4, 6\)"),
        ({"t": torch.tensor(0.5)}, "one flow time a sample"),
        ({"text": torch.zeros(2, 5, 7)}, r"expected|text must be"),
        ({"text": torch.zeros(2, 6, 6), "text_mask": None}, "at most 5"),
        ({"text_mask": torch.ones(2, 5)}, "text_mask must be bool"),
        ({"text_mask": torch.ones(2, 5, dtype=torch.long)}, r"text_mask must be bool .*int64.*; use mask.bool\(\)"),
        ({"frame_mask": torch.ones(2, 4, dtype=torch.bool)}, "frame_mask must be bool"),
        ({"fps": torch.zeros(3)}, "fps, height and width"),
    ],
)
def test_wrong_inputs_are_refused(change: dict[str, Tensor], message: str):
    with pytest.raises(ValueError, match=message):
        make_dit()(**make_inputs() | change)


def test_wrong_config_lists_every_problem():
    with pytest.raises(ValueError, match=r"depth.*class_dropout_prob.*hidden_size"):
        STDiT3Config(depth=0, class_dropout_prob=1.5, hidden_size=1150)
    with pytest.raises(ValueError, match="multiple of 2 num_heads"):
        STDiT3Config(hidden_size=64, num_heads=7)


def test_null_text_refuses_a_length_the_model_does_not_have():
    dit = make_dit()
    torch.testing.assert_close(dit.null_text(3), dit.y_embedder.y_embedding[:3])
    with pytest.raises(ValueError, match="null caption of 6 tokens"):
        dit.null_text(6)


@pytest.mark.parametrize("mask_kind", ["none", "bool", "additive"])
def test_attention_written_out_equals_the_fused_kernel(mask_kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=generator) for n in (5, 7, 7))
    mask = None
    if mask_kind != "none":
        mask = torch.rand(2, 1, 5, 7, generator=generator) > 0.3
        mask[..., 0] = True
    if mask_kind == "additive":
        mask = torch.zeros(2, 1, 5, 7).masked_fill(~mask, -torch.inf)
    full = [part.clone().requires_grad_() for part in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*full, attn_mask=mask)
    expected.square().sum().backward()
    half = [part.bfloat16().requires_grad_() for part in (q, k, v)]
    got = automatic(*half, mask if mask is None or mask.dtype == torch.bool else mask.bfloat16())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, rtol=0.03, atol=0.03)
    got.float().square().sum().backward()
    for ours, exact in zip(half, full, strict=True):
        assert (ours.grad.float() - exact.grad).norm() < 0.03 * exact.grad.norm()
