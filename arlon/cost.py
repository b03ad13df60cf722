"""Parameters, floating-point operations and working memory of a network at a given size. No weights are needed.

A network is built and run once on the meta device, where tensors have shapes and no data, while a meter counts. So the
figures belong to the code that will run, not to a formula beside it. Deep networks are run with one and with two
blocks: what a block adds is the same every time.

Working memory is the most that tensors take at once besides weights and inputs. It leaves out what only a device knows:
the work space of convolutions and matrix products, and the fragments of its allocator. Attention counts as fused: its
scores are never all in memory.

Dimension key
    B  samples that pass together    C  latent channels    T H W  latent grid    L  text tokens    E  width of the text
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from arlon.models.ar import CodeTransformer, CodeTransformerConfig
from arlon.models.injection import InjectionConfig, SemanticInjection
from arlon.models.stdit import STDiT3, STDiT3Config
from arlon.models.video_pieces import num_tiles
from arlon.models.video_vae import VideoVAE, VideoVAEConfig
from arlon.models.vqvae import LatentVQVAE, LatentVQVAEConfig
from arlon.protocols import Cost
from arlon.text.encoders import TextEncoderConfig, network_config

Network = TypeVar("Network", bound=nn.Module)
LatentSize = tuple[int, int, int]
"""(T, H, W)."""
MAX_KEPT = 128
"""Costs of one kind that are remembered: a run on the meta device takes a second, and many films have one size."""


@dataclass(frozen=True)
class Measured:
    """Totals that a meter counted."""

    flops: int
    working_bytes: int


def measure(run: Callable[[], Any]) -> Measured:
    """Count the operations and the memory of a call; what it returns is alive until it ends."""
    attention, other = _FusedAttention(), _Meter()
    with torch.no_grad(), other, attention:
        run()
    return Measured(other.flops + attention.flops, other.peak)


class _Meter(TorchDispatchMode):
    """Adds up operations, and the storages that are alive, of those made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if (count := flop_registry.get(func.overloadpacket)) is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self._alive:
                self._alive.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return out

    def _free(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


class _FusedAttention(TorchFunctionMode):
    """Stands in for fused attention, which the meta device would write out: 2 n m (d + e) operations a head."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            q, k, v = args[:3]
            self.flops += 2 * prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])
            return q.new_empty(*q.shape[:-1], v.shape[-1])
        return func(*args, **(kwargs or {}))


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


@lru_cache(MAX_KEPT)
def dit_cost(
    config: STDiT3Config,
    size: LatentSize,
    *,
    text_length: int,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    injection: InjectionConfig | None = None,
) -> Cost:
    """One forward pass of the diffusion transformer with a frame mask, on latents (B, C, T, H, W).

    Args:
        config: Its shape.
        size: (T, H, W).
        text_length: L, padding included.
        batch: B; 2 with guidance.
        dtype: Of weights and activations.
        injection: What is injected; a ControlNet works in every pass, other designs leave a pass as it is.
    """
    inject = None
    if injection is not None and injection.design == "controlnet":
        with torch.device("meta"), torch.no_grad():
            coarse = torch.empty(1, injection.in_channels, *size)
            inject = _build(SemanticInjection, injection, dtype).condition(coarse)

    def at(depth: int) -> Cost:
        with torch.device("meta"):
            model = _build(STDiT3, replace(config, depth=depth), dtype)
            width = config.hidden_size if config.skip_y_embedder else config.caption_channels
            inputs = {
                "latent": torch.empty(batch, config.in_channels, *size),
                "t": torch.empty(batch),
                "text": torch.empty(batch, text_length, width),
                "text_mask": torch.ones(batch, text_length, dtype=torch.bool),
                "frame_mask": None if config.patch_size[0] > 1 else torch.ones(batch, size[0], dtype=torch.bool),
            }
        return _cost(model, lambda: model(**inputs, fps=24.0, height=1.0, width=1.0, inject=inject))

    return _at_depth(at, config.depth)


@lru_cache(MAX_KEPT)
def injection_cost(config: InjectionConfig, size: LatentSize, *, dtype: torch.dtype = torch.float32) -> Cost:
    """Modulations of one segment, which stay in memory while it is refined; coarse latent (1, C, T, H, W)."""

    def at(num_blocks: int) -> Cost:
        with torch.device("meta"):
            model = _build(SemanticInjection, replace(config, num_blocks=num_blocks), dtype)
            coarse = torch.empty(1, config.in_channels, *size)
        return _cost(model, lambda: model(coarse))

    return _at_depth(at, config.num_blocks)


@lru_cache(MAX_KEPT)
def vqvae_cost(
    config: LatentVQVAEConfig, code_size: tuple[int, int, int], *, dtype: torch.dtype = torch.float32
) -> Cost:
    """Decoding of codes (1, cT, cH, cW)."""
    with torch.device("meta"):
        model = _build(LatentVQVAE, config, dtype)
        codes = torch.empty(1, *code_size, dtype=torch.int64)
    return _cost(model, lambda: model.decode(codes))


@lru_cache(MAX_KEPT)
def vae_decode_cost(
    config: VideoVAEConfig,
    num_frames: int,
    latent_hw: tuple[int, int],
    *,
    blend_frames: int = 0,
    is_joined: bool = False,
    tile: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Cost:
    """Decoding of one video from a latent of `latent_hw` rows and columns.

    Chunks are decoded one after the other and kept, and then joined. So only one is run here, and a border if it is
    blended; and of tiles, which are all of one size, one.

    Args:
        config: Shape of the VAE.
        num_frames: Frames of the video, a multiple of a chunk or less than one.
        latent_hw: (H, W).
        blend_frames: As of `VideoVAE.decode`.
        is_joined: The border to the chunk before the video is blended too: that chunk passes the temporal part again.
        tile: As of `VideoVAE.decode`.
        dtype: Of weights and activations.
    """
    chunk = min(num_frames, config.micro_frame_size or num_frames)
    side = max(latent_hw) if tile is None else min(max(latent_hw), tile // config.space_stride)
    tiles = prod(num_tiles(length, side) for length in latent_hw)

    def decoding(num_chunks: int, blend: int, part: slice = slice(None)) -> Cost:
        with torch.device("meta"):
            model = _build(VideoVAE, config, dtype)
            size = (min(length, side) * config.space_stride for length in latent_hw)
            latent = torch.empty(1, *model.latent_shape(num_chunks * chunk, *size), dtype=dtype)
        return _cost(model, lambda: model.decode(latent, num_chunks * chunk, blend_frames=blend, part=part))

    once, chunks = decoding(1, 0), num_frames // chunk
    border_flops = decoding(2, blend_frames).flops - 2 * once.flops if blend_frames and chunks > 1 else 0
    join_flops = decoding(2, blend_frames, slice(chunk, None)).flops - once.flops if blend_frames and is_joined else 0
    chunk_bytes = chunk * 3 * prod(latent_hw) * config.space_stride**2 * dtype.itemsize
    kept = chunks - 1 if tiles == 1 else chunks  # tiles are added up in the frames of their chunk
    working_bytes = max(once.working_bytes + kept * chunk_bytes, 2 * chunks * chunk_bytes)
    flops = tiles * (once.flops * chunks + border_flops * (chunks - 1) + join_flops)
    return replace(once, flops=flops, working_bytes=working_bytes)


@lru_cache(MAX_KEPT)
def ar_read_cost(
    config: CodeTransformerConfig, *, text_length: int, batch: int = 1, dtype: torch.dtype = torch.float32
) -> Cost:
    """Reading a window that leaves one hop free into a new cache, which stays in memory."""
    frames = config.max_code_frames - config.hop
    return _ar_cost(config, frames, 0, text_length=text_length, batch=batch, dtype=dtype)


@lru_cache(MAX_KEPT)
def ar_frame_cost(
    config: CodeTransformerConfig, *, text_length: int, batch: int = 1, dtype: torch.dtype = torch.float32
) -> Cost:
    """Writing the codes of one frame, code by code, at the end of a full window."""
    read = _ar_cost(config, config.max_code_frames - 1, 0, text_length=text_length, batch=batch, dtype=dtype)
    both = _ar_cost(config, config.max_code_frames - 1, 1, text_length=text_length, batch=batch, dtype=dtype)
    return replace(both, flops=(both.flops - read.flops) * config.codes_per_frame)


@lru_cache(MAX_KEPT)
def _ar_cost(
    config: CodeTransformerConfig, frames: int, steps: int, *, text_length: int, batch: int, dtype: torch.dtype
) -> Cost:
    """Reading a number of code frames and stepping on."""

    def at(depth: int) -> Cost:
        with torch.device("meta"):
            model = _build(CodeTransformer, replace(config, depth=depth), dtype)
            codes = torch.empty(batch, frames * config.codes_per_frame, dtype=torch.int64)
            text = torch.empty(batch, text_length, config.text_dim)
            mask = torch.ones(batch, text_length, dtype=torch.bool)

        def run() -> None:
            room = config.max_code_frames * config.codes_per_frame
            _, cache = model.prefill(codes, text, mask, max_codes=room)
            for _ in range(steps):
                model.step(codes.new_empty(batch), cache)

        return _cost(model, run)

    return _at_depth(at, config.depth)


@lru_cache(MAX_KEPT)
def text_cost(config: TextEncoderConfig, *, dtype: torch.dtype = torch.float32) -> Cost:
    """Encoding of one prompt."""

    def at(depth: int) -> Cost:
        kind, values = network_config(config)
        values.num_layers = values.num_hidden_layers = depth
        with torch.device("meta"):
            model = _build(kind, values, dtype)
            ids = torch.empty(1, config.max_length, dtype=torch.int64)
        return _cost(model, lambda: model(input_ids=ids))

    return _at_depth(at, network_config(config)[1].num_hidden_layers)


def _build(kind: Callable[[Any], Network], config: Any, dtype: torch.dtype) -> Network:
    return kind(config).to(dtype).eval().requires_grad_(False)


def _cost(model: nn.Module, run: Callable[[], Any]) -> Cost:
    measured = measure(run)
    return Cost(
        num_parameters=sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers())),
        flops=measured.flops,
        working_bytes=measured.working_bytes,
    )


def _at_depth(cost: Callable[[int], Cost], depth: int) -> Cost:
    """Cost of a network of equal blocks, from those of one and of two."""
    if depth <= 2:
        return cost(depth)
    one, two = cost(1), cost(2)
    more = depth - 2
    return Cost(
        num_parameters=two.num_parameters + more * (two.num_parameters - one.num_parameters),
        flops=two.flops + more * (two.flops - one.flops),
        working_bytes=two.working_bytes + more * (two.working_bytes - one.working_bytes),
    )
