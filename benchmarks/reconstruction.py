"""Quality of each part of a model on its own, on takes it has never seen.

    python benchmarks/reconstruction.py --takes 64 --json figures.json

Takes are rendered from shapes world with held-out attribute pairs and phrasings and a seed of their own; all encoder
inputs are the rendered frames, all captions those of the takes. Parts that the model does not have yet are named and
left out, so a model can be measured while it is being trained.

    VAE                 PSNR and SSIM of videos through encoder and decoder
    VQ-VAE, coarser     R^2 of latents through the codes, against the mean of each channel; codebook in use
    AR                  nats a code, in the windows that generation has, against the unigram entropy of the same codes
    DiT                 flow-matching loss of segments, at times spread evenly over [0, 1]: alone, and with the
                        injection of the codes of the take
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arlon.checkpoint import CONFIG_NAME, PACKAGED_MODELS, load_component
from arlon.data.datasets import CaptionSpan, ShapesTakes, ShapesTakesConfig
from arlon.data.samples import WindowConfig, span_at, window_starts
from arlon.evaluation import metrics
from arlon.models.ar import CodeTransformer
from arlon.models.injection import SemanticInjection
from arlon.models.stdit import STDiT3
from arlon.models.video_vae import VideoVAE
from arlon.models.vqvae import LatentVQVAE, codebook_usage
from arlon.registry import COMPONENTS, TRAINED_COMPONENTS
from arlon.text.encoders import MiniLMEncoder, TextEncoder, TextFeatures, load_text_encoder
from pipelines.store.run_folder import write_json
from stages.flow_matching import even_times, flow_losses

SEED = 2_000_003
"""Seed of the takes; no training or validation set has it."""
CLASSES = {name: COMPONENTS[name].model_class for name in TRAINED_COMPONENTS}
Figures = dict[str, float]


@dataclass(frozen=True)
class EncodedTakes:
    """Takes of one size.

    Attributes:
        latent: (n, C, T, H, W).
        spans: Captions of each take; the first caption of a span is used.
        size: Height and width of the frames in pixels.
        fps: Frames a second.
    """

    latent: Tensor
    spans: tuple[tuple[CaptionSpan, ...], ...]
    size: tuple[int, int]
    fps: float


class Texts:
    """Features of captions, each encoded once."""

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder
        self._known: dict[str, TextFeatures] = {}

    def features(self, span: CaptionSpan) -> tuple[Tensor, Tensor]:
        """Tokens (1, L, E) and mask (1, L) of the first caption of a span, without padding."""
        text = span.captions[0]
        if text not in self._known:
            self._known[text] = self._encoder.encode([text])
        found = self._known[text]
        length = int(found.mask.sum())
        return found.tokens[:, :length], found.mask[:, :length]


# --- the parts -----------------------------------------------------------------------------------------------


def find_model(name_or_path: str) -> Path:
    """Folder of a model that need not be complete: a packaged name or a path.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    import arlon

    packaged = Path(arlon.__file__).parent / "weights" / name_or_path
    folder = packaged if name_or_path in PACKAGED_MODELS else Path(name_or_path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"no model folder {str(folder)!r}; packaged models are {', '.join(PACKAGED_MODELS)}")
    return folder


def load_parts(folder: Path) -> dict[str, Any]:
    """The components of a model folder that are there, by name, frozen."""
    return {
        name: load_component(kind, folder / name).eval().requires_grad_(False)
        for name, kind in CLASSES.items()
        if (folder / name / CONFIG_NAME).is_file()
    }


def load_texts(folder: Path) -> Texts:
    """The text encoder of a model folder, or MiniLM if it names none yet."""
    if (folder / "text_encoder" / CONFIG_NAME).is_file():
        return Texts(load_text_encoder(folder / "text_encoder"))
    return Texts(MiniLMEncoder())


# --- figures -------------------------------------------------------------------------------------------------


def measure_vae(
    vae: VideoVAE, source: ShapesTakes, progress: Callable[[str, int, int], None]
) -> tuple[EncodedTakes, Figures]:
    """Latents of all takes, and how like the videos their decoding is.

    Returns:
        The takes, and `psnr` (mean over takes, dB), `psnr_min` (of the worst take), `psnr_pooled` (of the squared
        error of all takes together) and `ssim` (mean over takes). Decoded values are clipped to [-1, 1] first.
    """
    latents, spans, psnr, ssim, errors = [], [], [], [], []
    for index in range(len(source)):
        take = source.take(index)
        latent = vae.encode(take.video[None])
        decoded = vae.decode(latent, num_frames=take.video.shape[1])[0].clamp(-1, 1)
        latents.append(latent)
        spans.append(take.spans)
        psnr.append(metrics.psnr(decoded, take.video))
        ssim.append(metrics.ssim(decoded, take.video))
        errors.append((decoded - take.video).double().square().mean().item())
        progress("vae", index + 1, len(source))
    config = source.config
    takes = EncodedTakes(torch.cat(latents), tuple(spans), (config.height, config.width), config.fps)
    pooled = 10 * math.log10(metrics.VIDEO_RANGE**2 / _mean(errors))
    return takes, {"psnr": _mean(psnr), "psnr_min": min(psnr), "psnr_pooled": pooled, "ssim": _mean(ssim)}


def measure_vqvae(vqvae: LatentVQVAE, latent: Tensor) -> tuple[Tensor, Figures]:
    """Codes (n, cT, cH, cW) of latents (n, C, T, H, W), and what is left of the latents.

    Returns:
        The codes, and `r_squared` (1 = all, 0 = as good as the mean of each channel), `used_share` (of the
        codebook), `perplexity` and `num_codes`.
    """
    codes = torch.cat([vqvae.encode(take) for take in latent.split(1)])
    size = latent.shape[2:]
    decoded = torch.cat([vqvae.decode(take, size[0], grid=(size[1], size[2])) for take in codes.split(1)])
    usage = codebook_usage(codes, vqvae.config.codebook_size)
    return codes, {
        "r_squared": metrics.r_squared(latent, decoded),
        "used_share": usage.used_share,
        "perplexity": usage.perplexity,
        "num_codes": float(codes.numel()),
    }


@dataclass(frozen=True)
class CodeWindow:
    """Code frames [start, stop) as generation sees them: those from `learned` on are new, under `span`."""

    start: int
    learned: int
    stop: int
    span: CaptionSpan


def code_windows(
    spans: tuple[CaptionSpan, ...], num_frames: int, *, ratio: int, max_frames: int, hop: int
) -> Iterator[CodeWindow]:
    """Windows in which every code frame is new exactly once, as `CodeStream` slides them.

    Args:
        spans: Captions of the take.
        num_frames: Code frames of the take.
        ratio: Latent frames of a code frame; it belongs to the caption of the first.
        max_frames: Longest window.
        hop: Code frames by which a full window slides; at a new caption at least as many are free.
    """
    owners = [span_at(spans, frame * ratio) for frame in range(num_frames)]
    new = 0
    while new < num_frames:
        start = max(0, new - (max_frames - hop))
        stop = new + 1
        while stop < min(num_frames, start + max_frames) and owners[stop] is owners[new]:
            stop += 1
        yield CodeWindow(start=start, learned=new, stop=stop, span=owners[new])
        new = stop


def measure_ar(model: CodeTransformer, codes: Tensor, takes: EncodedTakes, texts: Texts, *, ratio: int) -> Figures:
    """Prediction of codes from the caption and the codes before them.

    Code frames that are partly padding, at the end of a take, are left out.

    Returns:
        `loss` (nats a code), `loss_without_text` (the same under the null text), `unigram_entropy` (nats, of the
        same codes: no model that knows only how frequent codes are is below it), `num_codes`.
    """
    config = model.config
    losses: list[Tensor] = []
    without: list[Tensor] = []
    counted: list[Tensor] = []
    num_frames = takes.latent.shape[2] // ratio
    for take, spans in zip(codes, takes.spans, strict=True):
        for window in code_windows(spans, num_frames, ratio=ratio, max_frames=config.max_code_frames, hop=config.hop):
            context = take[window.start : window.stop].flatten()[None]
            target = take[window.learned : window.stop].flatten()
            text, mask = texts.features(window.span)
            for found, drop in ((losses, False), (without, True)):
                logits = model(context, text, mask, drop_text=torch.tensor([drop]))[0, :-1]
                found.append(F.cross_entropy(logits[-len(target) :].float(), target, reduction="none"))
            counted.append(target)
    return {
        "loss": torch.cat(losses).mean().item(),
        "loss_without_text": torch.cat(without).mean().item(),
        "unigram_entropy": metrics.unigram_entropy(torch.cat(counted)),
        "num_codes": float(sum(map(len, counted))),
    }


def measure_flow(
    dit: STDiT3, takes: EncodedTakes, texts: Texts, condition: Callable[[int, int, int], Any] | None = None
) -> Figures:
    """Flow-matching loss of segments: the first of a take all noise, later ones with their first frames given.

    Times are spread evenly over [0, 1], without the shift, one a segment; noise is the same for every model.

    Args:
        dit: The diffusion transformer.
        takes: Latents and captions.
        texts: Features of the captions.
        condition: (take, first latent frame, one past the last) -> semantic injection. None: none.

    Returns:
        `loss` (0 = perfect; about 2 for a velocity of 0, as latents have unit variance), `num_segments`.

    Raises:
        ValueError: If no take holds a segment.
    """
    windows = WindowConfig()
    places = [
        (index, start)
        for index, spans in enumerate(takes.spans)
        for start in window_starts(spans, takes.latent.shape[2], windows)
    ]
    if not places:
        raise ValueError(f"no take of {takes.latent.shape[2]} latent frames holds a segment of {windows.latent_frames}")
    losses: list[Tensor] = []
    for (index, start), t in zip(places, even_times(len(places)), strict=True):
        stop = start + windows.latent_frames
        mask = torch.ones(1, windows.latent_frames, dtype=torch.bool)
        mask[:, : windows.overlap if start else 0] = False
        text, text_mask = texts.features(span_at(takes.spans[index], start + windows.overlap))
        batch = {
            "latent": takes.latent[index : index + 1, :, start:stop],
            "text": text,
            "text_mask": text_mask,
            "frame_mask": mask,
            "fps": torch.tensor([takes.fps]),
            "height": torch.tensor([float(takes.size[0])]),
            "width": torch.tensor([float(takes.size[1])]),
        }
        generator = torch.Generator().manual_seed(len(losses))
        inject = None if condition is None else condition(index, start, stop)
        losses.append(flow_losses(dit, batch, t[None], generators=[generator], inject=inject))
    return {"loss": torch.cat(losses).mean().item(), "num_segments": float(len(losses))}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@torch.inference_mode()
def measure_model(
    folder: Path, source: ShapesTakes, progress: Callable[[str, int, int], None] = lambda *_: None
) -> dict[str, Figures]:
    """Figures of every part of a model folder that is there, by part; `progress` is called with (part, done, all).

    Raises:
        FileNotFoundError: If there is no VAE: every other part works on its latents.
    """
    parts = load_parts(folder)
    if "vae" not in parts:
        raise FileNotFoundError(f"{str(folder)!r} holds no vae: nothing can be measured without its latents")
    takes, vae_figures = measure_vae(parts["vae"], source, progress)
    figures, codes = {"vae": vae_figures}, {}
    for name in ("vqvae", "vqvae_coarser"):
        if name in parts:
            codes[name], figures[name] = measure_vqvae(parts[name], takes.latent)
    vqvae, fine = parts.get("vqvae"), codes.get("vqvae")
    texts = load_texts(folder) if {"ar", "dit"} & set(parts) else None
    if {"ar", "vqvae"} <= set(parts):
        figures["ar"] = measure_ar(parts["ar"], fine, takes, texts, ratio=vqvae.config.ratio[0])
    if "dit" in parts:
        figures["dit"] = measure_flow(parts["dit"], takes, texts)
    if {"dit", "injection", "vqvae"} <= set(parts):
        condition = _injection(parts["injection"], vqvae, fine, takes.latent.shape)
        figures["dit + injection"] = measure_flow(parts["dit"], takes, texts, condition)
    return figures


def _injection(
    injection: SemanticInjection, vqvae: LatentVQVAE, codes: Tensor, shape: torch.Size
) -> Callable[[int, int, int], Any]:
    """Injection of the codes (n, cT, cH, cW) of takes whose latents have `shape` (n, C, T, H, W)."""

    def condition(index: int, start: int, stop: int) -> Any:
        coarse = vqvae.decode_frames(
            codes[index : index + 1], start, stop, num_latent_frames=shape[2], grid=(shape[3], shape[4])
        )
        return injection.condition(coarse)

    return condition


# --- command line --------------------------------------------------------------------------------------------


def table_lines(figures: dict[str, Figures]) -> list[str]:
    """One line a figure; what is missing is named."""
    lines = [
        f"{part:18}{name:20}{value:12.0f}" if name.startswith("num_") else f"{part:18}{name:20}{value:12.4f}"
        for part, values in figures.items()
        for name, value in values.items()
    ]
    missing = [part for part in (*CLASSES, "dit + injection") if part not in figures and part != "injection"]
    return lines + [f"{part:18}missing, or what it builds on is: skipped" for part in missing]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes", help="name or folder of the model; it may be incomplete")
    parser.add_argument("--takes", type=int, default=64, help="takes that are measured")
    parser.add_argument("--frames", type=int, default=68, help="frames of a take, a multiple of 17")
    parser.add_argument("--height", type=int, default=64, help="of the frames")
    parser.add_argument("--width", type=int, default=64, help="of the frames")
    parser.add_argument("--split", choices=("held_out", "train"), default="held_out")
    parser.add_argument("--seed", type=int, default=SEED, help="of the takes")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    parser.add_argument("--json", type=Path, metavar="OUT.json", help="write the figures")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        source = ShapesTakes(
            ShapesTakesConfig(
                num_takes=args.takes,
                num_frames=args.frames,
                height=args.height,
                width=args.width,
                split=args.split,
                seed=args.seed,
            )
        )
        folder = find_model(args.model)
        figures = measure_model(folder, source, _show)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{args.takes} takes of {args.frames} frames, {args.split} split, seed {args.seed}, model {folder.name}")
    print("\n".join(table_lines(figures)))
    if args.json:
        options = {name: value for name, value in vars(args).items() if name not in ("json", "model")}
        write_json(args.json, {"model": folder.name, "options": options, "figures": figures})


def _show(part: str, done: int, total: int) -> None:
    if done % 8 == 0 or done == total:
        print(f"{part} {done}/{total}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
