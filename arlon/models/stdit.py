"""STDiT3, the diffusion transformer of Open-Sora v1.2: spatial and temporal blocks in turn.

Source: Open-Sora v1.2 (`STDiT3`); state-dict keys and config fields are the released ones.

Ours differ from the released code in that
    - time runs over [0, 1] and the output is d noisy / dt = noise - clean; weights predict clean - noise, so
      that the last line of `forward` negates;
    - height and width count for each sample, not the first one's for the whole batch;
    - text is masked, not packed, and a sample without text tokens attends to nothing;
    - times, positions and rotations are float32 even if the weights are bfloat16;
    - captions shorter than `model_max_length` can be dropped in training.

Dimension key
    B  batch    C  latent channels    T H W  latent grid    nT nH nW  patch grid    S  nH * nW    N  nT * S
    D  width    L  text tokens    E  width of the text features
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from arlon.components import Component
from arlon.models.chunking import run_block
from arlon.models.embeddings import PatchEmbed, ScalarEmbedder, patch_grid, spatial_position
from arlon.models.layers import CaptionEmbedder, FinalLayer, RotaryTime, STDiT3Block, TextKeys, TextTokens

TIME_SCALE = 1000.0
"""Released weights embed times between 0 and 1000."""

SIZES = (
    "input_sq_size",
    "in_channels",
    "hidden_size",
    "depth",
    "num_heads",
    "caption_channels",
    "model_max_length",
)
"""Fields of the config that count something."""

Inject = Callable[[int, Tensor], Tensor]
"""(temporal block i, output of its self-attention (B, N, D)) -> what takes its place, (B, N, D)."""


@dataclass(frozen=True)
class BlockInputs:
    """What the first block is given in one pass, for injections that need more than the output of a self-attention."""

    tokens: Tensor
    """(B, nT, S, D)."""
    time: Tensor
    """Six vectors of the flow time, (B, nT or 1, 6, D)."""
    text: TextTokens
    """Projected text."""
    rotation: Tensor
    """Rotations of the frames for temporal attention."""


@runtime_checkable
class Injection(Protocol):
    """An injection that needs the inputs of every pass, such as a ControlNet; others are plain `Inject` functions."""

    def begin(self, inputs: BlockInputs) -> Inject:
        """Give the function to inject with in this pass."""
        ...


Generators = torch.Generator | Sequence[torch.Generator] | None
"""One generator, one for each sample, or the global one."""


@dataclass(frozen=True)
class PreparedText:
    """A text as the cross-attentions of one model read it; see `STDiT3.prepare_text`."""

    projected: TextTokens
    """Projected text."""
    keys: tuple[tuple[TextKeys, TextKeys], ...] = ()
    """Keys and values of spatial and temporal block i. Empty: every block computes its own, as in training, where its
    weights may be sharded and whole only while it runs."""

    @property
    def batch_size(self) -> int:
        """Samples B."""
        return self.projected.tokens.shape[0]

    def of_block(self, i: int) -> tuple[TextTokens | TextKeys, TextTokens | TextKeys]:
        """Text inputs of spatial and temporal block i."""
        return self.keys[i] if self.keys else (self.projected, self.projected)


@dataclass(frozen=True, kw_only=True)
class STDiT3Config:
    """Shape of an STDiT3; the defaults are XL/2. Fields are those of a released `config.json` that have an effect.

    Raises:
        ValueError: If sizes do not divide or are out of range; all problems are listed.
    """

    input_sq_size: int = 512
    """Side in pixels of the video at which the spatial positions have scale 1."""
    in_channels: int = 4
    """Latent channels C."""
    patch_size: tuple[int, int, int] = (1, 2, 2)
    """Latent frames, rows and columns of a patch."""
    hidden_size: int = 1152
    """Width D."""
    depth: int = 28
    """Number of spatial blocks, and of temporal blocks."""
    num_heads: int = 16
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Width of an MLP over D."""
    class_dropout_prob: float = 0.1
    """Probability of training on the null caption instead of the caption."""
    pred_sigma: bool = True
    """Whether the last layer has 2 C outputs; the second half is not used."""
    drop_path: float = 0.0
    """Probability of skipping a branch of the last block in training; rises linearly from 0 in the first."""
    caption_channels: int = 4096
    """Width E of the text features."""
    model_max_length: int = 300
    """Most text tokens, and rows of the null caption."""
    qk_norm: bool = True
    """Whether queries and keys of the self-attention are RMS-normalised."""
    only_train_temporal: bool = False
    """Whether everything but the temporal blocks is frozen."""
    freeze_y_embedder: bool = False
    """Whether the projection of the text is frozen."""
    skip_y_embedder: bool = False
    """Whether text arrives projected already, (B, L, D)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        problems = self._problems()
        if problems:
            raise ValueError("STDiT3Config: " + "; ".join(problems))

    def _problems(self) -> list[str]:
        found = [f"{name} ({getattr(self, name)}) must be at least 1" for name in SIZES if getattr(self, name) < 1]
        for name in ("class_dropout_prob", "drop_path"):
            if not 0 <= getattr(self, name) <= 1:
                found.append(f"{name} ({getattr(self, name)}) is a probability in [0, 1]")
        if len(self.patch_size) != 3 or min(self.patch_size) < 1:
            found.append(f"patch_size {self.patch_size} must hold three sizes of at least 1")
        if self.mlp_ratio <= 0:
            found.append(f"mlp_ratio ({self.mlp_ratio}) must be positive")
        if not found and self.hidden_size % (2 * self.num_heads):
            found.append(f"hidden_size ({self.hidden_size}) must be a multiple of 2 num_heads ({2 * self.num_heads})")
        if self.hidden_size % 4:
            found.append(f"hidden_size ({self.hidden_size}) must be a multiple of 4")
        return found

    @property
    def out_channels(self) -> int:
        """Channels the last layer writes."""
        return self.in_channels * (2 if self.pred_sigma else 1)


class STDiT3(Component):
    """Velocity of a noisy latent, given flow time, text, frame rate and size.

    Attributes:
        gradient_checkpointing: Recompute every block in the backward pass instead of keeping its parts.
        run_block: Runs one block, with the arguments of `STDiT3Block.forward` behind the block. Whatever concerns how a
            block runs, not what it computes, can be put here: pieces that fit in a cache (the default), weights that
            are loaded for the block and freed behind it.
    """

    config_class = STDiT3Config
    # Sizes come with the latent, and PyTorch or `arlon.attention` chooses the kernels.
    ignored_keys = frozenset(
        {"input_size", "enable_flash_attn", "enable_layernorm_kernel", "enable_sequence_parallelism"}
    )

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.run_block: Callable[..., Tensor] = run_block
        dim = config.hidden_size
        self.rope = RotaryTime(dim // config.num_heads)
        self.x_embedder = PatchEmbed(config.in_channels, config.patch_size, dim)
        self.t_embedder = ScalarEmbedder(dim)
        self.fps_embedder = ScalarEmbedder(dim)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.y_embedder = CaptionEmbedder(config.caption_channels, dim, config.model_max_length)
        block = partial(STDiT3Block, dim, config.num_heads, mlp_ratio=config.mlp_ratio, qk_norm=config.qk_norm)
        self.spatial_blocks = nn.ModuleList(block(temporal=False) for _ in range(config.depth))
        self.temporal_blocks = nn.ModuleList(block(temporal=True) for _ in range(config.depth))
        self.final_layer = FinalLayer(dim, math.prod(config.patch_size) * config.out_channels)
        self._init_weights()
        self._freeze()

    def null_text(self, length: int) -> Tensor:
        """Null caption for the unconditional half of guidance: the first `length` rows, (length, E).

        Raises:
            ValueError: If the model has no null caption of that length.
        """
        if not 1 <= length <= self.config.model_max_length:
            raise ValueError(
                f"a null caption of {length} tokens is not in the model: expected 1 to "
                f"{self.config.model_max_length} (model_max_length). Shorten the prompt to that length."
            )
        return self.y_embedder.y_embedding[:length]

    def prepare_text(self, text: Tensor, text_mask: Tensor | None = None) -> PreparedText:
        """Project a text and compute its keys and values for every block, which serve any latent and flow time.

        Text tokens that do not count are left out, so that attention has no more keys than the longest text of the
        batch. No caption is dropped, not even in training.

        Args:
            text: Text features, (B, L, E); (B, L, D) if the config says `skip_y_embedder`.
            text_mask: True = real text token, (B, L). All are real if None.

        Returns:
            What `forward` takes in place of text and mask, any number of times while the weights stay the same.

        Raises:
            ValueError: If shapes do not fit the config or each other.
        """
        self._check_text(text, text_mask, text.shape[0])
        if text_mask is not None:
            text, text_mask = keep_tokens(text, text_mask)
        projected = TextTokens(self._project_text(text.to(self.x_embedder.proj.weight.dtype)), text_mask)
        keys = ((spatial.read_text(projected), temporal.read_text(projected)) for spatial, temporal in self.blocks())
        return PreparedText(projected, tuple(keys))

    def blocks(self) -> Iterator[tuple[STDiT3Block, STDiT3Block]]:
        """Pairs of a spatial block and the temporal block that follows it, in order."""
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            assert isinstance(spatial, STDiT3Block)
            assert isinstance(temporal, STDiT3Block)
            yield spatial, temporal

    def forward(
        self,
        latent: Tensor,
        t: Tensor,
        text: Tensor | PreparedText,
        text_mask: Tensor | None = None,
        frame_mask: Tensor | None = None,
        *,
        fps: Tensor | float,
        height: Tensor | float,
        width: Tensor | float,
        inject: Inject | Injection | None = None,
        generator: Generators = None,
    ) -> Tensor:
        """Predict the velocity d noisy / dt = noise - clean.

        Args:
            latent: Noisy latent, (B, C, T, H, W); any T, H, W.
            t: Flow time, (B,), 1 = noise, 0 = data.
            text: Text features, (B, L, E); (B, L, D) if the config says `skip_y_embedder`. Or what `prepare_text`
                made of them, which saves work if the same text is given again.
            text_mask: True = real text token, (B, L). All are real if None.
            frame_mask: True = noisy frame, False = clean frame, a condition, (B, T). Noisy if None. The frames of one
                patch must agree.
            fps: Frames a second, (B,) or a number.
            height: Height of the video in pixels, (B,) or a number.
            width: Width of the video in pixels, (B,) or a number.
            inject: Called as inject(i, y) in temporal block i on the output y (B, N, D) of its self-attention, tokens
                in order of time, row, column; its result goes on to the gate and the residual. An `Injection` is begun
                with the inputs of this pass first.
            generator: Draws which captions and branches are dropped, in training only: one generator, or one for
                each sample. The global one if None.

        Returns:
            Velocity, (B, C, T, H, W), float32.

        Raises:
            ValueError: If shapes do not fit the config or each other.
        """
        self._check_inputs(latent, t, text, text_mask, frame_mask)
        frame_mask = _mask_patches(frame_mask, self.config.patch_size[0])
        dtype, grid = self.x_embedder.proj.weight.dtype, patch_grid(latent, self.config.patch_size)
        fps, height, width = (_per_sample(value, latent) for value in (fps, height, width))

        x = self.x_embedder(latent.to(dtype))  # (B, nT, S, D)
        position = spatial_position(height, width, grid[1:], x.shape[-1], self.config.input_sq_size)
        x = x + position.to(dtype).unsqueeze(1)
        # Clean frames are modulated by flow time 0, noisy ones by t, so both can stand in one video.
        time, clean_time, six = self._embed_time(t, fps, frame_mask)
        if isinstance(text, Tensor):
            text = PreparedText(TextTokens(self._embed_text(text.to(dtype), generator), text_mask))
        rotation = self.rope(x.shape[1])  # latent frames count from 0 in every segment, as in training
        if isinstance(inject, Injection):
            inject = inject.begin(BlockInputs(x, six, text.projected, rotation))
        for i, (spatial, temporal) in enumerate(self.blocks()):
            spatial_text, temporal_text = text.of_block(i)
            x = self._run(spatial, x, six, spatial_text, keep=self._draw_keep(i, x, generator))
            hook = None if inject is None else partial(inject, i)
            keep = self._draw_keep(i, x, generator)
            x = self._run(temporal, x, six, temporal_text, rotation=rotation, inject=hook, keep=keep)
        patches = self.final_layer(x, time, clean_time, frame_mask)
        # The released weights predict clean - noise; here the velocity is noise - clean.
        return -self._unpatchify(patches, grid, latent.shape[2:]).float()

    def _embed_time(self, t: Tensor, fps: Tensor, frame_mask: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Embedded time (B, D), embedded time 0 or None, six vectors for the blocks (B, nT or 1, 6, D)."""
        rate = self.fps_embedder(fps)
        time = self.t_embedder(TIME_SCALE * t.float()) + rate
        six = self.t_block(time).unflatten(-1, (1, 6, -1))
        if frame_mask is None:
            return time, None, six
        clean_time = self.t_embedder(torch.zeros_like(fps)) + rate
        clean_six = self.t_block(clean_time).unflatten(-1, (1, 6, -1))
        return time, clean_time, torch.where(frame_mask[:, :, None, None], six, clean_six)

    def _embed_text(self, text: Tensor, generator: Generators) -> Tensor:
        """Text (B, L, E) as (B, L, D); in training some captions become the null caption, mask unchanged."""
        if self.training and self.config.class_dropout_prob > 0 and not self.config.skip_y_embedder:
            drop = _draw(text.shape[0], text.device, generator) < self.config.class_dropout_prob
            text = torch.where(drop[:, None, None], self.null_text(text.shape[1]).to(text.dtype), text)
        return self._project_text(text)

    def _project_text(self, text: Tensor) -> Tensor:
        """Text (B, L, E) as (B, L, D)."""
        return text if self.config.skip_y_embedder else self.y_embedder(text)

    def _run(self, block: nn.Module, x: Tensor, *inputs: Any, **options: Any) -> Tensor:
        """Run one block; with gradient checkpointing it runs again in the backward pass."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(self.run_block, block, x, *inputs, use_reentrant=False, **options)
        return self.run_block(block, x, *inputs, **options)

    def _draw_keep(self, i: int, x: Tensor, generator: Generators) -> Tensor | None:
        """Stochastic depth of block i: 0 for a skipped branch, else 1 / probability of keeping it, (2, B)."""
        if not self.training or self.config.drop_path == 0:
            return None
        probability = self.config.drop_path * i / max(1, self.config.depth - 1)
        if probability >= 1:
            return x.new_zeros(2, x.shape[0])
        drawn = _draw(2 * x.shape[0], x.device, generator).view(-1, 2).T
        kept = drawn >= probability
        return kept.to(x.dtype) / (1 - probability)

    def _unpatchify(self, patches: Tensor, grid: tuple[int, int, int], size: torch.Size) -> Tensor:
        """Patches (B, nT, S, pt ph pw Cout) to the first C channels of a latent (B, C, T, H, W), cropped."""
        pt, ph, pw = self.config.patch_size
        values = patches.unflatten(-1, (pt, ph, pw, -1))[..., : self.config.in_channels]
        pattern = "b t (h w) pt ph pw c -> b c (t pt) (h ph) (w pw)"
        latent = rearrange(values, pattern, h=grid[1], w=grid[2])
        return latent[:, :, : size[0], : size[1], : size[2]]

    def _init_weights(self) -> None:
        """Initialise for training from scratch; temporal blocks and frame rate start without effect."""
        std = 1 / math.sqrt(self.config.hidden_size)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
                if name.startswith("temporal_blocks") and name.endswith((".proj", ".fc2")):
                    nn.init.zeros_(module.weight)
            elif isinstance(module, STDiT3Block | FinalLayer):
                nn.init.normal_(module.scale_shift_table, std=std)
        nn.init.normal_(self.fps_embedder.get_parameter("mlp.0.weight"), std=0.02)
        nn.init.zeros_(self.fps_embedder.get_parameter("mlp.2.weight"))

    def _freeze(self) -> None:
        """Freeze what the config says."""
        if self.config.only_train_temporal:
            self.requires_grad_(False)
            self.temporal_blocks.requires_grad_(True)
        if self.config.freeze_y_embedder:
            self.y_embedder.requires_grad_(False)

    def _check_inputs(
        self,
        latent: Tensor,
        t: Tensor,
        text: Tensor | PreparedText,
        text_mask: Tensor | None,
        frame_mask: Tensor | None,
    ) -> None:
        config = self.config
        if latent.ndim != 5 or latent.shape[1] != config.in_channels:
            raise ValueError(f"latent must be (B, {config.in_channels}, T, H, W), got {tuple(latent.shape)}")
        batch, frames = latent.shape[0], latent.shape[2]
        if t.shape != (batch,):
            raise ValueError(f"t must hold one flow time a sample, ({batch},), got {tuple(t.shape)}")
        if isinstance(text, Tensor):
            self._check_text(text, text_mask, batch)
        elif text_mask is not None:
            raise ValueError("a prepared text has its mask inside: give text_mask to prepare_text, not beside it")
        elif text.batch_size != batch:
            raise ValueError(f"the prepared text has {text.batch_size} samples, the latent has {batch}")
        _check_mask("frame_mask", frame_mask, (batch, frames))

    def _check_text(self, text: Tensor, text_mask: Tensor | None, batch: int) -> None:
        config = self.config
        width = config.hidden_size if config.skip_y_embedder else config.caption_channels
        if text.ndim != 3 or text.shape[0] != batch or text.shape[2] != width:
            raise ValueError(f"text must be (B, L, E) = ({batch}, L, {width}), got {tuple(text.shape)}")
        if text.shape[1] > config.model_max_length:
            raise ValueError(f"text has {text.shape[1]} tokens, at most {config.model_max_length} (model_max_length)")
        _check_mask("text_mask", text_mask, (batch, text.shape[1]))


def keep_tokens(text: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Move the real tokens of every sample to the front, in order, and cut behind the longest.

    Args:
        text: Text features, (B, L, E).
        text_mask: True = real text token, (B, L).

    Returns:
        Features (B, L', E), L' >= 1, and their mask (B, L'), None if it would be all True.
    """
    longest = max(1, int(text_mask.sum(dim=1).max()))
    order = text_mask.byte().argsort(dim=1, descending=True, stable=True)[:, :longest]
    text = text.gather(1, order.unsqueeze(-1).expand(-1, -1, text.shape[2]))
    kept = text_mask.gather(1, order)
    return text, None if bool(kept.all()) else kept


def _check_mask(name: str, mask: Tensor | None, shape: tuple[int, int]) -> None:
    if mask is not None and (mask.shape != shape or mask.dtype != torch.bool):
        hint = "; use mask.bool()" if mask.dtype != torch.bool else ""
        raise ValueError(f"{name} must be bool {shape}, got {mask.dtype} {tuple(mask.shape)}{hint}")


def _mask_patches(frame_mask: Tensor | None, patch: int) -> Tensor | None:
    """Mask of frames (B, T) as one of patches of `patch` frames, (B, nT); the last frame stands for those after it."""
    if frame_mask is None or patch == 1:
        return frame_mask
    padding = frame_mask[:, -1:].expand(-1, -frame_mask.shape[1] % patch)
    frames = torch.cat((frame_mask, padding), dim=1).unflatten(1, (-1, patch))
    mixed = (frames != frames[..., :1]).any(dim=-1)
    if bool(mixed.any()):
        sample, place = mixed.nonzero()[0].tolist()
        raise ValueError(
            f"frame_mask must agree within every patch of {patch} latent frames, but patch {place} of sample {sample} "
            "has noisy and clean ones"
        )
    return frames[..., 0]


def _per_sample(value: Tensor | float, latent: Tensor) -> Tensor:
    """A number, or one number a sample, as float32 (B,) on the device of the latent."""
    numbers = torch.as_tensor(value, dtype=torch.float32, device=latent.device)
    if numbers.shape not in {(), (1,), (latent.shape[0],)}:
        raise ValueError(
            f"fps, height and width must be numbers or tensors ({latent.shape[0]},), got shape {tuple(numbers.shape)}"
        )
    return numbers.expand(latent.shape[0])


def _draw(count: int, device: torch.device, generator: Generators) -> Tensor:
    """Uniform numbers (count,) from the generator, wherever it lives, or the global CPU one; on `device`.

    Several generators give an equal share each, in order.
    """
    if isinstance(generator, Sequence):
        return torch.cat([_draw(count // len(generator), device, one) for one in generator])
    source = torch.device("cpu") if generator is None else generator.device
    return torch.rand(count, generator=generator, device=source).to(device)
