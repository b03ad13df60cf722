"""Speed of a forward pass of the diffusion transformer, against a matrix product and against its plain formula.

    OMP_NUM_THREADS=2 python -m benchmarks.stdit_forward --json figures.json

Weights are random; figures do not depend on them. What is compared takes turns, and figures are medians over the turns,
so that other work on the machine slows all of them. Rates are floating-point operations of matrix products and
attention, a multiply-add counted as two, over seconds; `of matmul` is the rate over that of a float32 product of two
large square matrices in the same run. All rows count the operations of the plain formula, also those that are saved.

    plain           the formulas of Open-Sora v1.2 one after the other, with nothing kept or fused
    forward         STDiT3, text features given
    prepared        STDiT3, prepared text given, as in every step of sampling
    guided step     both halves of guidance as one batch, prepared; twice the operations
    bfloat16        `prepared` and `guided step` with weights in bfloat16; left out where the CPU does not compute in it

`sample` is what a whole guided sample takes: the text prepared once and all steps, over two plain passes a step.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arlon.cost import dit_cost
from arlon.models.embeddings import spatial_position
from arlon.models.layers import NORM_EPS, STDiT3Block
from arlon.models.stdit import TIME_SCALE, STDiT3, STDiT3Config
from arlon.precision import has_fast_bfloat16
from benchmarks.vae_decode import resident_mib, table_row
from pipelines.store.run_folder import write_json

FPS = 24.0
PIXELS_PER_LATENT = 8
COLUMNS = ("", "seconds", "GFLOP/s", "of matmul", "relative error")


@dataclass(frozen=True)
class Inputs:
    """A noisy latent (B, C, T, H, W), its time (B,) and a text (B, L, E)."""

    latent: Tensor
    t: Tensor
    text: Tensor

    @property
    def sizes(self) -> dict[str, float]:
        """Frame rate, and height and width in pixels."""
        height, width = (side * PIXELS_PER_LATENT for side in self.latent.shape[-2:])
        return {"fps": FPS, "height": float(height), "width": float(width)}


def make_dit(config: STDiT3Config) -> STDiT3:
    """An STDiT3 in eval mode with random weights in place of initial zeros, so that every branch affects the error."""
    torch.manual_seed(0)
    dit = STDiT3(config).eval().requires_grad_(False)
    for module in dit.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return dit


def make_inputs(config: STDiT3Config, size: tuple[int, int, int], text_length: int) -> Inputs:
    """One sample of noise with a text of noise, all of whose tokens count."""
    latent = torch.randn(1, config.in_channels, *size)
    return Inputs(latent, torch.tensor([0.5]), torch.randn(1, text_length, config.caption_channels))


def plain_forward(dit: STDiT3, inputs: Inputs) -> Tensor:
    """Velocity (B, C, T, H, W) of a model without frame mask, of a latent that patches divide; no step is fused."""
    sizes = {name: torch.full_like(inputs.t, value) for name, value in inputs.sizes.items()}
    x = dit.x_embedder.proj(inputs.latent)  # (B, D, nT, nH, nW)
    grid = x.shape[2:]
    x = x.flatten(3).permute(0, 2, 3, 1).contiguous()
    base = dit.config.input_sq_size
    x = x + spatial_position(sizes["height"], sizes["width"], grid[1:], x.shape[-1], base).unsqueeze(1)
    time_vector = dit.t_embedder(TIME_SCALE * inputs.t) + dit.fps_embedder(sizes["fps"])
    six = dit.t_block(time_vector).unflatten(-1, (6, -1))
    text = dit.y_embedder(inputs.text)
    for spatial, temporal in zip(dit.spatial_blocks, dit.temporal_blocks, strict=True):
        x = _plain_block(spatial, x, six, text, None)
        x = _plain_block(temporal, x, six, text, dit.rope.freqs)
    shift, scale = (dit.final_layer.scale_shift_table + time_vector[:, None])[:, None].chunk(2, dim=2)
    patches = dit.final_layer.linear(_plain_norm(x) * (1 + scale) + shift)
    pt, ph, pw = dit.config.patch_size
    values = patches.unflatten(2, grid[1:]).unflatten(-1, (pt, ph, pw, -1))  # (B, nT, nH, nW, pt, ph, pw, Cout)
    latent = values.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
    return -latent[:, : dit.config.in_channels]


def _plain_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


def _plain_block(block: STDiT3Block, x: Tensor, six: Tensor, text: Tensor, freqs: Tensor | None) -> Tensor:
    """A block on x (B, nT, S, D); frequencies (d / 2,) make it temporal."""
    parts = (block.scale_shift_table + six)[:, None, None].unbind(3)  # six of (B, 1, 1, D)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
    y = _plain_norm(x) * (1 + scale_a) + shift_a
    if freqs is not None:
        y = y.transpose(1, 2).contiguous()
    rows = y.flatten(0, 1)  # (M, n, D)
    q, k, v = block.attn.qkv(rows).unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = _plain_rms(q, block.attn.q_norm), _plain_rms(k, block.attn.k_norm)
    if freqs is not None:
        q, k = _plain_rotation(q, freqs), _plain_rotation(k, freqs)
    y = block.attn.proj(_plain_attention(q, k, v)).view(y.shape)
    x = x + gate_a * (y if freqs is None else y.transpose(1, 2).contiguous())
    cross = block.cross_attn
    q = cross.q_linear(x.flatten(1, 2)).unflatten(-1, (cross.num_heads, -1)).transpose(1, 2)
    k, v = cross.kv_linear(text).unflatten(-1, (2, cross.num_heads, -1)).permute(2, 0, 3, 1, 4)
    x = x + cross.proj(_plain_attention(q, k, v)).view(x.shape)
    hidden = F.gelu(block.mlp.fc1(_plain_norm(x) * (1 + scale_m) + shift_m), approximate="tanh")
    return x + gate_m * block.mlp.fc2(hidden)


def _plain_rms(x: Tensor, norm: nn.RMSNorm | None) -> Tensor:
    if norm is None:
        return x
    return norm.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + NORM_EPS))


def _plain_rotation(x: Tensor, freqs: Tensor) -> Tensor:
    """Turn the adjacent pairs of x (M, A, n, d) by their frame."""
    angles = torch.outer(torch.arange(x.shape[2], dtype=freqs.dtype), freqs).repeat_interleave(2, dim=-1)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * angles.cos() + torch.stack((-b, a), dim=-1).flatten(-2) * angles.sin()


def _plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of q (M, A, n, d) to k, v (M, A, m, d), heads joined: (M, n, D)."""
    weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def guided_step(dit: STDiT3, inputs: Inputs) -> Callable[[], Tensor]:
    """Both halves of guidance in one batch, with the null caption of the model: (2 B, C, T, H, W)."""
    null = dit.null_text(inputs.text.shape[1]).expand_as(inputs.text)
    prepared = dit.prepare_text(torch.cat((inputs.text, null)))
    return lambda: dit(torch.cat([inputs.latent] * 2), inputs.t.repeat(2), prepared, **inputs.sizes)


def take_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each call over rounds in which all are called once; call them before, so that none is cold."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            started_s = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started_s)
    return {name: median(values) for name, values in seconds.items()}


def relative_error(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected|."""
    return float((got - expected).norm() / expected.norm())


def peak_of(call: Callable[[], object]) -> float:
    """MiB that a call takes above what was resident before; true for what needs more than anything before it."""
    idle = resident_mib("VmRSS")
    call()
    return resident_mib("VmHWM") - idle


@torch.no_grad()
def measure(
    dit: STDiT3, inputs: Inputs, *, steps: int, rounds: int, side: int, bfloat16: bool
) -> dict[str, dict[str, float]]:
    """All figures by row and name; see above. `side` is that of the square matrices."""
    prepared = dit.prepare_text(inputs.text)
    forward = {
        "forward": lambda: dit(inputs.latent, inputs.t, inputs.text, **inputs.sizes),
        "prepared": lambda: dit(inputs.latent, inputs.t, prepared, **inputs.sizes),
    }
    peak_mib = peak_of(forward["prepared"])  # first: the peak of a process only grows
    matrix = torch.randn(side, side)
    calls: dict[str, Callable[[], Tensor]] = {
        "matmul": lambda: matrix @ matrix,
        "plain": lambda: plain_forward(dit, inputs),
        **forward,
        "guided step": guided_step(dit, inputs),
    }
    if bfloat16:
        half = copy.deepcopy(dit).to(torch.bfloat16)
        half_prepared = half.prepare_text(inputs.text)
        calls["prepared, bfloat16"] = lambda: half(inputs.latent, inputs.t, half_prepared, **inputs.sizes)
        calls["guided step, bfloat16"] = guided_step(half, inputs)
    outputs = {name: call() for name, call in calls.items()}
    del outputs["matmul"]
    errors = {name: relative_error(output[:1], outputs["plain"]) for name, output in outputs.items()}
    seconds = take_turns({**calls, "prepare": lambda: dit.prepare_text(inputs.text)}, rounds)
    text_length, size = inputs.text.shape[1], tuple(inputs.latent.shape[2:])
    flops = dit_cost(dit.config, size, text_length=text_length).flops
    matmul_rate = 2 * side**3 / seconds["matmul"]
    rows: dict[str, dict[str, float]] = {"matmul": {"seconds": seconds["matmul"], "rate": matmul_rate, "share": 1.0}}
    for name, error in errors.items():
        rate = flops * (2 if name.startswith("guided") else 1) / seconds[name]
        rows[name] = {"seconds": seconds[name], "rate": rate, "share": rate / matmul_rate, "error": error}
    rows["prepared"]["peak_mib"] = peak_mib
    for precision in ("", ", bfloat16") if bfloat16 else ("",):
        whole = 2 * seconds["prepare"] + steps * seconds[f"guided step{precision}"]
        rows[f"sample{precision}"] = {"seconds": whole, "share_of_plain": whole / (2 * steps * seconds["plain"])}
    return rows


def table_cells(name: str, row: dict[str, float]) -> list[str]:
    """One row, in the order of COLUMNS."""
    error = "" if "error" not in row else f"{row['error']:.1e}"
    return [name, f"{row['seconds']:.2f}", f"{row['rate'] / 1e9:.0f}", f"{row['share']:.2f}", error]


def parse_latent(text: str) -> tuple[int, int, int, int]:
    """`4x32x32x32` -> (C, T, H, W)."""
    parts = text.split("x")
    if len(parts) != 4 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no latent; expected CxTxHxW, such as 4x32x32x32")
    channels, *size = map(int, parts)
    if any(side % 2 for side in size[1:]):
        raise argparse.ArgumentTypeError(f"{text!r} is not made of whole patches: H and W must be even")
    return channels, *size


def main(argv: Sequence[str] | None = None) -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latent", type=parse_latent, default=(4, 32, 32, 32), metavar="CxTxHxW")
    parser.add_argument("--width", type=int, default=384, help="D")
    parser.add_argument("--depth", type=int, default=12, help="pairs of a spatial and a temporal block")
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--text", type=int, default=77, help="text tokens")
    parser.add_argument("--caption-channels", type=int, default=384, help="width of the text features")
    parser.add_argument("--steps", type=int, default=30, help="of a sample")
    parser.add_argument("--rounds", type=int, default=5, help="turns over which medians are taken")
    parser.add_argument("--matmul", type=int, default=2048, help="side of the square matrices")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch")
    parser.add_argument(
        "--bfloat16",
        choices=("auto", "always", "never"),
        default="auto",
        help="whether to measure it; auto: if the CPU computes in it. Elsewhere it takes ten times as long or more",
    )
    parser.add_argument("--json", type=Path, metavar="OUT.json", help="write the figures")
    args = parser.parse_args(argv)
    if min(args.steps, args.rounds, args.matmul, args.threads, args.text) < 1:
        parser.error("--steps, --rounds, --matmul, --threads and --text must be at least 1")
    torch.set_num_threads(args.threads)
    channels, *size = args.latent
    try:
        config = STDiT3Config(
            in_channels=channels,
            hidden_size=args.width,
            depth=args.depth,
            num_heads=args.heads,
            caption_channels=args.caption_channels,
            model_max_length=args.text,
        )
        bfloat16 = args.bfloat16 == "always" or (args.bfloat16 == "auto" and has_fast_bfloat16("cpu"))
        dit, inputs = make_dit(config), make_inputs(config, tuple(size), args.text)
        rows = measure(dit, inputs, steps=args.steps, rounds=args.rounds, side=args.matmul, bfloat16=bfloat16)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    tokens = math.prod(inputs.latent.shape[2:]) // math.prod(config.patch_size)
    print(
        f"{args.threads} threads, PyTorch {torch.__version__}, {tokens} tokens, width {args.width}, depth {args.depth}"
    )
    print(table_row(COLUMNS), table_row(["---"] * len(COLUMNS)), sep="\n")
    for name, row in rows.items():
        if "rate" in row:
            print(table_row(table_cells(name, row)))
    print(
        f"\npeak memory of a prepared forward above what is resident before it: {rows['prepared']['peak_mib']:.0f} MiB"
    )
    for name, row in rows.items():
        if "share_of_plain" not in row:
            continue
        print(
            f"{name} of {args.steps} steps: {row['seconds']:.0f} s, "
            f"{row['share_of_plain']:.2f} of {2 * args.steps} plain passes"
        )
    if args.bfloat16 == "auto" and not bfloat16:
        print("bfloat16 not measured: this CPU does not compute in it (--bfloat16 always measures it all the same)")
    if args.json:
        settings = {name: value for name, value in vars(args).items() if name != "json"}
        write_json(args.json, {**settings, "torch": torch.__version__, "rows": rows})


if __name__ == "__main__":
    main()
