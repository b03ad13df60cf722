"""The code transformer: causality, cache, windows, prompt switches, sampling."""

import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from arlon.models.ar import CodeTransformer, CodeTransformerConfig, code_loss
from arlon.models.code_sampling import CodeStream, PromptSpan, SamplingConfig, _window_at, generate_codes, sample_code
from tests.closeness import assert_close_to_scale

GREEDY = SamplingConfig(temperature=0.0, guidance_scale=1.0)


def make_ar(**changes) -> CodeTransformer:
    """A tiny model whose weights are large enough to make every path count."""
    torch.manual_seed(0)
    settings = {"codebook_size": 13, "text_dim": 5, "max_text": 6, "dim": 16, "depth": 2, "num_heads": 2}
    model = CodeTransformer(CodeTransformerConfig(**{**settings, "grid": (2, 3), "max_code_frames": 4, **changes}))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name or "scale" in name), std=0.4)
    return model.eval()


def make_inputs(batch: int = 2, frames: int = 3, length: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (B, S), text (B, L, E) and a mask with padding at the end of the second text."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(13, (batch, 6 * frames), generator=generator)
    text = torch.randn(batch, length, 5, generator=generator)
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[1:, -1] = False
    return codes, text, mask


def make_span(num_code_frames: int, seed: int = 0, length: int = 3) -> PromptSpan:
    text = torch.randn(1, length, 5, generator=torch.Generator().manual_seed(seed))
    return PromptSpan(text=text, num_code_frames=num_code_frames)


def frame_generator(frame: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + frame)


def generate(model: CodeTransformer, schedule: list[PromptSpan], sampling: SamplingConfig, **options) -> Tensor:
    return generate_codes(model, schedule, generator_for_frame=frame_generator, sampling=sampling, **options)


def naive_logits(model: CodeTransformer, codes: list[int], text: Tensor) -> Tensor:
    """The network of one sample without padding, slot by slot and head by head, as documented."""
    width = model.config.grid[1]
    cells = math.prod(model.config.grid)

    def place(rows: Tensor, columns: Tensor, index: int) -> Tensor:
        return rows[index % cells // width, 0] + columns[0, index % cells % width]

    def normed(x: Tensor, scale: Tensor) -> Tensor:
        return x / (x.square().mean() + 1e-6).sqrt() * scale

    def turned(x: Tensor, time: int) -> Tensor:
        y, pairs = x.clone(), len(x) // 2
        for i in range(pairs // 2):
            angle = torch.tensor(time * 1000.0 ** (-i / (pairs // 2)))
            y[i] = x[i] * angle.cos() - x[i + pairs] * angle.sin()
            y[i + pairs] = x[i] * angle.sin() + x[i + pairs] * angle.cos()
        return y

    slots = [model.text_proj(feature) + model.text_position[i] for i, feature in enumerate(text)]
    held, predicted = [0] * (len(text) + 1), [0] * len(text) + [1]
    slots.append(model.start + place(model.predicted_row, model.predicted_column, 0))
    for i, code in enumerate(codes):
        position = place(model.held_row, model.held_column, i)
        position = position + place(model.predicted_row, model.predicted_column, i + 1)
        slots.append(model.code_embed.weight[code] + position)
        held.append(1 + i // cells)
        predicted.append(1 + (i + 1) // cells)

    for block in model.blocks:
        heads = block.attention.num_heads
        q_scale, k_scale = block.attention.qk_scale[:, 0]
        q_k_v = []
        for slot in slots:
            mixed = block.attention.qkv.weight @ normed(slot, block.attention_norm.weight)
            q_k_v.append(mixed.view(3, heads, -1))
        attended = []
        for n in range(len(slots)):
            parts = []
            for h in range(heads):
                q = turned(normed(q_k_v[n][0, h], q_scale), predicted[n])
                keys = [turned(normed(q_k_v[m][1, h], k_scale), held[m]) for m in range(n + 1)]
                weight = torch.stack([q @ key / len(q) ** 0.5 for key in keys]).softmax(0)
                parts.append(sum(weight[m] * q_k_v[m][2, h] for m in range(n + 1)))
            attended.append(slots[n] + block.attention.out.weight @ torch.cat(parts))
        slots = []
        for slot in attended:
            gate, up = (block.mlp.gate_up.weight @ normed(slot, block.mlp_norm.weight)).chunk(2)
            slots.append(slot + block.mlp.down.weight @ (gate / (1 + (-gate).exp()) * up))
    return torch.stack([model.head.weight @ normed(slot, model.norm.weight) for slot in slots[len(text) :]])


def test_forward_equals_a_naive_loop():
    model = make_ar()
    codes, text, _ = make_inputs(batch=1)
    with torch.no_grad():
        expected = naive_logits(model, codes[0, :15].tolist(), text[0])
        assert_close_to_scale(model(codes[:, :15], text)[0], expected)


def test_changing_a_code_leaves_the_logits_before_it_alone():
    model = make_ar()
    codes, text, mask = make_inputs()
    before = model(codes, text, mask)
    for i in (0, 5, 6, 17):
        changed = codes.clone()
        changed[:, i] = (changed[:, i] + 1) % 13
        after = model(changed, text, mask)
        assert torch.equal(after[:, : i + 1], before[:, : i + 1])
        assert (after[:, i + 1] - before[:, i + 1]).abs().amax(-1).min() > 1e-3


def test_padded_text_changes_nothing():
    model = make_ar()
    codes, text, _ = make_inputs()
    expected = model(codes, text[:, :2])
    mask = torch.tensor([[True, True, False, False]] * 2)
    assert_close_to_scale(model(codes, text, mask), expected)
    assert_close_to_scale(model(codes, text + 9 * ~mask[..., None], mask), expected)


def test_empty_text_mask_gives_finite_logits_that_ignore_the_text():
    model = make_ar()
    codes, text, mask = make_inputs()
    nothing = torch.zeros_like(mask)
    logits = model(codes, text, nothing)
    assert logits.isfinite().all()
    torch.testing.assert_close(model(codes, -text, nothing), logits)


@pytest.mark.parametrize("num_known", [0, 4, 6, 13])
def test_cached_decoding_equals_the_full_forward(num_known):
    model = make_ar()
    codes, text, mask = make_inputs()
    drop = torch.tensor([True, False])
    with torch.inference_mode():
        full = model(codes, text, mask, drop_text=drop)
        logits, cache = model.prefill(codes[:, :num_known], text, mask, max_codes=18, drop_text=drop)
        steps = [logits] + [model.step(codes[:, i], cache) for i in range(num_known, 18)]
    cached = torch.stack(steps, dim=1)
    assert (cached - full[:, num_known:]).abs().max() < 1e-5
    assert torch.equal(cached.argmax(-1), full[:, num_known:].argmax(-1))
    with pytest.raises(ValueError, match="cache is full"):
        model.step(codes[:, 0], cache)


def test_laid_out_for_steps_it_is_the_same_model():
    model, other = make_ar(), make_ar().store_column_major()
    codes, text, mask = make_inputs()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    assert all(block.mlp.down.weight.t().is_contiguous() for block in other.blocks)
    with torch.inference_mode():
        assert_close_to_scale(other(codes, text, mask), model(codes, text, mask))


def test_dropped_text_is_the_null_text():
    model = make_ar()
    codes, text, mask = make_inputs()
    logits = model(codes, text, mask, drop_text=torch.tensor([True, False]))
    other = model(codes, 5 - text[:, :2], mask[:, :2], drop_text=torch.tensor([True, True]))
    assert_close_to_scale(logits[0], other[0])
    assert_close_to_scale(logits[1], model(codes, text, mask)[1])


def test_text_is_dropped_in_training_as_the_generator_says():
    model = make_ar(text_drop_prob=0.5).train()
    codes, text, mask = make_inputs(batch=8)
    draws = torch.rand(8, generator=torch.Generator().manual_seed(5))
    expected = model(codes, text, mask, drop_text=draws < 0.5)
    state = torch.get_rng_state()
    assert torch.equal(model(codes, text, mask, generator=torch.Generator().manual_seed(5)), expected)
    assert torch.equal(state, torch.get_rng_state()), "the global generator moved"


def test_loss_equals_a_naive_loop_over_the_learned_targets():
    codes, _, _ = make_inputs(frames=1)
    logits = torch.randn(2, 7, 14, dtype=torch.double)
    is_end = torch.tensor([True, False])
    loss_mask = torch.tensor([[False] * 3 + [True] * 3, [True] * 6])
    terms = [-logits[0, 6].log_softmax(-1)[13]]
    terms += [-logits[0, i].log_softmax(-1)[codes[0, i]] for i in range(3, 6)]
    terms += [-logits[1, i].log_softmax(-1)[codes[1, i]] for i in range(6)]
    expected = torch.stack(terms).mean().float()
    torch.testing.assert_close(code_loss(logits, codes, is_end, loss_mask), expected)
    assert code_loss(logits, codes, None, torch.zeros_like(loss_mask)) == 0
    everything = F.cross_entropy(logits[:, :6].flatten(0, 1).float(), codes.flatten())
    torch.testing.assert_close(code_loss(logits, codes), everything)


def test_optimizer_steps_teach_text_codes_and_end():
    torch.manual_seed(0)
    model = CodeTransformer(make_ar().config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    codes, text, mask = make_inputs(frames=1)
    is_end = torch.tensor([True, False])
    for _ in range(60):
        loss = code_loss(model(codes, text, mask, drop_text=torch.tensor([False, False])), codes, is_end)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05, f"two sequences told apart by their text should be learned by heart, loss {loss:.3f}"
    assert model.eval()(codes, text, mask)[0, -1].argmax() == 13


def naive_stream(model: CodeTransformer, schedule: list[PromptSpan]) -> Tensor:
    """Greedy codes with one full forward a code over a window that is simulated frame by frame."""
    frames: list[Tensor] = []
    for span in schedule:
        window = max(0, len(frames) - (model.config.max_code_frames - model.config.hop))
        for _ in range(span.num_code_frames):
            if len(frames) - window == model.config.max_code_frames:
                window += model.config.hop
            codes = torch.cat([*frames[window:], torch.empty(0, dtype=torch.int64)])
            for _ in range(model.config.codes_per_frame):
                logits = model(codes[None], span.text, span.text_mask)[0, -1, :-1]
                codes = torch.cat((codes, logits.argmax()[None]))
            frames.append(codes[-model.config.codes_per_frame :])
    return torch.stack(frames).unflatten(1, model.config.grid)[None]


@pytest.mark.parametrize("hop", [None, 2, 3])
def test_stream_equals_full_forwards_over_sliding_windows(hop):
    model = make_ar(window_hop=hop)
    schedule = [make_span(6, seed=0), make_span(2, seed=1, length=5), make_span(7, seed=2)]
    with torch.no_grad():
        expected = naive_stream(model, schedule)
    codes = generate(model, schedule, GREEDY)
    assert codes.shape == (1, 15, 2, 3)
    assert torch.equal(codes, expected)


@pytest.mark.parametrize("hop", [1, 2, 3])
def test_window_depends_on_the_schedule_alone(hop):
    config = CodeTransformerConfig(max_code_frames=4, window_hop=hop)
    schedule = [make_span(9), make_span(1), make_span(13)]
    frame = 0
    for span in schedule:
        window, read = max(0, frame - (4 - hop)), frame
        for _ in range(span.num_code_frames):
            if frame - window == 4:
                window, read = window + hop, frame
            assert _window_at(schedule, config, frame) == (window, read)
            frame += 1


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_resumed_stream_continues_exactly(guidance_scale):
    model = make_ar(window_hop=2)
    schedule = [make_span(7, seed=0), make_span(6, seed=1)]
    sampling = SamplingConfig(guidance_scale=guidance_scale)
    whole = generate(model, schedule, sampling)
    assert not torch.equal(whole[:, :7], generate(model, [make_span(7, seed=5)], sampling))
    for frame in range(14):
        assert torch.equal(generate(model, schedule, sampling, existing=whole[:, :frame]), whole), f"from {frame}"


def test_memory_of_a_stream_does_not_grow():
    model = make_ar()
    stream = CodeStream(model, [make_span(40)], generator_for_frame=frame_generator)
    sizes = set()
    for codes in stream:
        assert codes.shape == (2, 3)
        sizes.add((stream._cache.keys.numel(), min(len(stream._recent), 4)))
    assert {slots for slots, _ in sizes} == {2 * 2 * 2 * (3 + 1 + 4 * 6) * 8}
    assert len(stream._recent) == 4
    assert stream.next_frame == 40


def test_prompt_switch_changes_the_very_next_logits():
    model = make_ar()
    first = make_span(3, seed=0)
    logits = []
    for seed in (1, 2):
        stream = CodeStream(model, [first, make_span(2, seed=seed)], generator_for_frame=frame_generator)
        known = torch.stack([next(stream) for _ in range(3)])
        logits.append((known, stream._first_logits()))
    assert torch.equal(logits[0][0], logits[1][0])
    assert (logits[0][1] - logits[1][1]).abs().max() > 1e-2
    text = make_span(1, seed=2).text
    guided = [model(known.flatten()[None], text, drop_text=torch.tensor([drop]))[0, -1] for drop in (False, True)]
    assert_close_to_scale(logits[1][1], guided[1] + 3.0 * (guided[0] - guided[1]))


def test_guidance_of_one_equals_plain_and_of_zero_ignores_the_text():
    model = make_ar()
    two_rows = SamplingConfig(temperature=0.0, guidance_scale=1.0 + 1e-9)
    assert torch.equal(generate(model, [make_span(6)], two_rows), generate(model, [make_span(6)], GREEDY))
    unguided = SamplingConfig(guidance_scale=0.0)
    assert torch.equal(generate(model, [make_span(4, seed=1)], unguided), generate(model, [make_span(4)], unguided))


def test_draws_depend_on_the_seed_and_on_nothing_else():
    model = make_ar()
    schedule = [make_span(5)]
    codes = generate(model, schedule, SamplingConfig())
    torch.manual_seed(99)
    assert torch.equal(generate(model, schedule, SamplingConfig()), codes)
    other = generate_codes(model, schedule, generator_for_frame=lambda f: torch.Generator().manual_seed(f))
    assert not torch.equal(other, codes)
    assert torch.equal(generate(model, schedule, GREEDY), generate(model, schedule, GREEDY))


def test_codes_leave_inference_mode_and_reach_the_callback():
    model = make_ar()
    seen = []
    codes = generate(
        model,
        [make_span(3)],
        GREEDY,
        existing=torch.ones(1, 1, 2, 3, dtype=torch.int64),
        on_frame=lambda *a: seen.append(a),
    )
    assert [frame for frame, _ in seen] == [1, 2]
    assert torch.equal(torch.stack([frame for _, frame in seen]), codes[0, 1:])
    assert not codes.is_inference()


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_sampled_codes_have_the_probabilities_of_the_nucleus(top_p):
    logits = torch.tensor([0.1, 2.0, -1.0, 1.4, 0.3])
    probability = (logits / 0.8).softmax(0).tolist()
    kept, mass = [], 0.0
    for code in sorted(range(5), key=lambda i: -probability[i]):
        if mass < top_p:
            kept.append(code)
            mass += probability[code]
    draws = [sample_code(logits, (i + 0.5) / 4000, temperature=0.8, top_p=top_p) for i in range(4000)]
    for code in range(5):
        expected = probability[code] / mass if code in kept else 0.0
        assert draws.count(code) / 4000 == pytest.approx(expected, abs=1e-3)


def test_end_is_drawn_only_when_asked_for_and_at_the_start_of_a_frame():
    model = make_ar()
    model.head = torch.nn.Linear(16, 14)
    with torch.no_grad():
        model.head.bias.zero_()[13] = 1e4
    schedule = [make_span(2), make_span(3)]
    assert generate(model, schedule, SamplingConfig()).shape[1] == 5
    assert generate(model, schedule, SamplingConfig(stop_at_eos=True)).shape[1] == 2
    assert generate(model, schedule[:1], SamplingConfig(stop_at_eos=True)).shape[1] == 1


def test_component_round_trip_is_exact(tmp_path):
    model = make_ar()
    model.save_pretrained(tmp_path / "ar")
    loaded = CodeTransformer.from_pretrained(tmp_path / "ar").eval()
    assert loaded.config == model.config
    codes, text, mask = make_inputs()
    assert torch.equal(loaded(codes, text, mask), model(codes, text, mask))


def test_full_size_builds_and_runs_on_the_meta_device():
    config = CodeTransformerConfig(
        codebook_size=8192,
        text_dim=4096,
        max_text=300,
        dim=1024,
        depth=12,
        num_heads=16,
        grid=(8, 8),
        max_code_frames=54,
    )
    with torch.device("meta"):
        model = CodeTransformer(config).eval()
        codes, text = torch.zeros(1, 640, dtype=torch.int64), torch.zeros(1, 300, 4096)
    assert model(codes, text).shape == (1, 641, 8193)
    logits, cache = model.prefill(codes, text, max_codes=641)
    assert logits.shape == model.step(codes[:, 0], cache).shape == (1, 8193)
    assert logits.is_meta
    assert 0.15e9 < sum(parameter.numel() for parameter in model.parameters()) < 0.2e9


def test_bfloat16_autocast_trains():
    model = make_ar().train()
    codes, text, mask = make_inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(codes, text, mask, drop_text=torch.tensor([True, False]))
    code_loss(logits, codes).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    expected = model.float()(codes, text, mask, drop_text=torch.tensor([True, False]))
    assert F.mse_loss(logits.float(), expected) < 0.02 * expected.var()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.zeros(2, 6)}, "expected codes (B, S) int64"),
        ({"codes": torch.full((2, 6), 13)}, "codes must lie in [0, 13), got 13..13"),
        ({"text": torch.zeros(2, 4, 3)}, "expected text features (B, L, E) = (2, L, 5), got (2, 4, 3)"),
        ({"text": torch.zeros(2, 7, 5)}, "text has 7 tokens, expected 1 to max_text=6"),
        ({"text_mask": torch.ones(2, 4)}, "expected text_mask (B, L) = (2, 4) bool"),
    ],
)
def test_misfit_input_is_refused(change, message):
    codes, text, mask = make_inputs(frames=1)
    with pytest.raises(ValueError, match=re.escape(message)):
        make_ar()(**{"codes": codes, "text": text, "text_mask": mask, **change})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": []}, "at least one span"),
        ({"existing": torch.zeros(1, 1, 3, 2, dtype=torch.int64)}, r"expected existing codes \(1, n, 2, 3\)"),
        ({"existing": torch.full((1, 1, 2, 3), 13)}, r"codes must lie in \[0, 13\)"),
        (
            {"existing": torch.zeros(1, 9, 2, 3, dtype=torch.int64)},
            "9 existing code frames, but the schedule has 2",
        ),
    ],
)
def test_unusable_schedule_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CodeStream(make_ar(), **{"schedule": [make_span(2)], "generator_for_frame": frame_generator, **options})


def test_interrupted_frame_is_written_again_the_same():
    model = make_ar()
    expected = generate(model, [make_span(6)], SamplingConfig())
    stream = CodeStream(model, [make_span(6)], generator_for_frame=frame_generator)
    frames = [next(stream), next(stream)]
    step = model.step
    model.step = lambda codes, cache: step(codes, cache) if cache.length < 18 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        next(stream)
    del model.step
    assert torch.equal(torch.stack([*frames, *stream])[None], expected)


def test_stream_refuses_a_model_in_training_mode():
    with pytest.raises(RuntimeError, match=r"call model\.eval\(\)"):
        CodeStream(make_ar().train(), [make_span(1)], generator_for_frame=frame_generator)


def test_bad_settings_are_refused_together():
    with pytest.raises(ValueError, match="at least one code frame, got 0"):
        make_span(0)
    with pytest.raises(ValueError, match=r"one text \(1, L, E\), got \(2, 3, 5\)"):
        PromptSpan(text=torch.zeros(2, 3, 5), num_code_frames=1)
    with pytest.raises(ValueError, match=r"depth must be at least 1.*dim \(30\).*window_hop \(9\)"):
        CodeTransformerConfig(depth=0, dim=30, max_code_frames=9, window_hop=9)
    with pytest.raises(ValueError, match=r"top_p must lie in \(0, 1\]"):
        SamplingConfig(top_p=0.0)


def naive_blend(model: CodeTransformer, schedule: list[PromptSpan], scale: float) -> Tensor:
    """Greedy codes of two spans that fit one window: full forwards under each prompt, mixed by hand."""
    frames: list[Tensor] = []
    first, second = schedule
    null = torch.tensor([True])
    for frame in range(first.num_code_frames + second.num_code_frames):
        behind = frame - first.num_code_frames

        codes = torch.cat([*frames, torch.empty(0, dtype=torch.int64)])
        for _ in range(model.config.codes_per_frame):
            old = model(codes[None], first.text, first.text_mask)[0, -1, :-1]
            new = model(codes[None], second.text, second.text_mask)[0, -1, :-1]
            share = 0.0 if behind < 0 else {0: 1 / 3, 1: 2 / 3}.get(behind, 1.0)
            text = (1 - share) * old + share * new
            empty = model(codes[None], second.text, second.text_mask, drop_text=null)[0, -1, :-1]
            codes = torch.cat((codes, (empty + scale * (text - empty)).argmax()[None]))
        frames.append(codes[-model.config.codes_per_frame :])
    return torch.stack(frames).unflatten(1, model.config.grid)[None]


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_blended_switch_mixes_logits_of_both_prompts_over_its_frames(scale):
    model = make_ar(max_code_frames=12)
    first, second = make_span(3, seed=0), make_span(5, seed=1, length=5)
    blended = [first, replace(second, blend=2)]
    with torch.no_grad():
        expected = naive_blend(model, blended, scale)
    greedy = replace(GREEDY, guidance_scale=scale)
    codes = generate(model, blended, greedy)
    assert torch.equal(codes, expected)
    assert not torch.equal(codes, generate(model, [first, second], greedy))


@pytest.mark.parametrize("hop", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3))])
def test_blended_stream_continues_exactly_while_its_window_slides(hop):
    """The window holds four code frames; the blend is longer than that."""
    model = make_ar(window_hop=hop)
    schedule = [make_span(7, seed=0), replace(make_span(8, seed=1, length=5), blend=6)]
    sampling = SamplingConfig(guidance_scale=2.5)
    whole = generate(model, schedule, sampling)
    for frame in range(16):
        assert torch.equal(generate(model, schedule, sampling, existing=whole[:, :frame]), whole), f"from {frame}"


def test_blend_shorter_than_the_shot_before_leaves_earlier_codes_alone():
    model = make_ar()
    first, second = make_span(4, seed=0), make_span(4, seed=1)
    plain = generate(model, [first, second], SamplingConfig())
    blended = generate(model, [first, replace(second, blend=3)], SamplingConfig())
    assert torch.equal(plain[:, :4], blended[:, :4])
    with pytest.raises(ValueError, match="blend of a span must not be negative, got -1"):
        replace(first, blend=-1)
