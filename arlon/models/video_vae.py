"""Video VAE: a per-frame KL autoencoder followed by a causal 3D autoencoder of its latents.

Source: Open-Sora v1.2, `VideoAutoencoderPipeline` (spatial part: diffusers AutoencoderKL, x8 in space; temporal part:
`VAE_Temporal_SD`, x4 in time). State-dict keys are the released ones.

Departures: encoding returns the posterior mean unless a generator is given (the original always samples); chunks go
through both parts one after another, so that memory does not grow with the length of a video; and two options, off
unless asked for, which the original does not have:

Blending. Chunks of 17 frames know nothing of each other, so the picture jumps from one to the next. With
`blend_frames`, the frames around a border (3 before and 6 after it; 7 and 10 for more than 3 blended frames) are
encoded and decoded once more as a chunk of their own: the border falls in the middle of the four frames that share a
latent frame, so both sides come from the same numbers. The result is faded in over the last `blend_frames` frames
before the border and out again over as many after it. All of that happens in per-frame latents; every frame still
passes the spatial decoder once. (Decoding latents from both sides of a border as one window makes the jump larger,
not smaller: the first latent frame of a chunk holds one frame, the others hold four, and the decoder tells them apart
by the zeros in front.)

Tiling. With `tile`, both parts run on overlapping squares of that many pixels, feathered into each other.

Dimension key
    B  batch    pT pH pW  video frames, height, width    T H W  latent frames, height, width
    C  channels of the final latent    F  channels of the per-frame latent
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from arlon.components import Component
from arlon.grids import ceil_div, num_latent_frames
from arlon.models.spatial_vae import SpatialVAE, SpatialVAEConfig, channels_last
from arlon.models.temporal_vae import (
    Posterior,
    ResBlock,
    TemporalVAE,
    TemporalVAEConfig,
    full_precision,
    like_weights,
)
from arlon.models.video_pieces import MIN_TILE, border_window, by_tile, checked_pieces, ramp, regroup, within

__all__ = [
    "Posterior",
    "SpatialVAEConfig",
    "TemporalVAE",
    "TemporalVAEConfig",
    "VideoVAE",
    "VideoVAEConfig",
    "latent_statistics",
]

RELEASED_KEYS = {
    "vae_2d": frozenset({"type", "from_pretrained", "subfolder", "cache_dir", "local_files_only", "micro_batch_size"}),
    "vae_temporal": frozenset({"type", "from_pretrained"}),
}
"""Parts of a released config.json, and what they say beside sizes."""
RELEASED_PARTS = RELEASED_KEYS.keys()


@dataclass(frozen=True, kw_only=True)
class VideoVAEConfig:
    """Both parts, the chunk length and the normalisation of the final latent, `(z - shift) / scale` per channel."""

    spatial: SpatialVAEConfig = field(default_factory=SpatialVAEConfig)
    temporal: TemporalVAEConfig = field(default_factory=TemporalVAEConfig)
    micro_frame_size: int | None = 17
    """Frames of one temporal chunk; None encodes a whole video as one chunk."""
    micro_batch_size: int | None = 4
    """Frames that pass the spatial part together; bounds memory, changes nothing else. None: all of a chunk."""
    shift: tuple[float, ...] = (-0.10, 0.34, 0.27, 0.98)
    scale: tuple[float, ...] = (3.85, 2.32, 2.33, 3.06)

    def __post_init__(self) -> None:
        if self.spatial.latent_channels != self.temporal.in_out_channels:
            raise ValueError(
                f"spatial.latent_channels ({self.spatial.latent_channels}) must equal temporal.in_out_channels "
                f"({self.temporal.in_out_channels})"
            )
        if not len(self.shift) == len(self.scale) == self.temporal.embed_dim:
            raise ValueError(
                f"shift and scale need one entry per latent channel: expected {self.temporal.embed_dim}, "
                f"got {len(self.shift)} and {len(self.scale)}"
            )

    @property
    def latent_channels(self) -> int:
        """Channels of the final latent."""
        return self.temporal.embed_dim

    @property
    def space_stride(self) -> int:
        """Pixels per latent row or column (8)."""
        return 2 ** (len(self.spatial.block_out_channels) - 1)

    @property
    def chunk_latents(self) -> int | None:
        """Latent frames of one temporal chunk (5); None: all."""
        return None if self.micro_frame_size is None else ceil_div(self.micro_frame_size, self.temporal.time_stride)

    @property
    def max_blend_frames(self) -> int:
        """Most frames on each side of a chunk border that blending can change (7); 0: blending is not possible."""
        chunk, stride = self.micro_frame_size, self.temporal.time_stride
        return 0 if chunk is None or chunk <= stride else min(border_window(chunk, stride, chunk, chunk)[0], chunk // 2)


class VideoVAE(Component):
    """Pixels <-> normalised latents.

    Both parts run in the precision of their weights; what goes in may have another one. Between them, and in what comes
    out, numbers are float32: `shift` and `scale` stay in it when the module is converted.
    """

    config_class = VideoVAEConfig
    scale: Tensor
    shift: Tensor

    def __init__(self, config: VideoVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.spatial_vae = SpatialVAE(config.spatial)
        self.temporal_vae = TemporalVAE(config.temporal)
        self.register_buffer("scale", torch.tensor(config.scale).view(1, -1, 1, 1, 1))
        self.register_buffer("shift", torch.tensor(config.shift).view(1, -1, 1, 1, 1))
        self._init_weights()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> VideoVAE:
        before = {"scale": self.scale, "shift": self.shift}
        super()._apply(fn, recurse)
        for name, value in before.items():
            after: Tensor = getattr(self, name)
            if after.dtype != value.dtype and not value.is_meta:
                self._buffers[name] = value.to(after.device)
        return self

    def _init_weights(self) -> None:
        """Start every residual block as its skip: a fresh network is nearly linear, and learns faster."""
        for name, module in self.named_modules():
            if isinstance(module, ResBlock):
                nn.init.zeros_(module.conv2.conv.weight)
            elif name.rpartition(".")[0].endswith("resnets"):
                nn.init.zeros_(module.conv2.weight)

    @staticmethod
    def translate_config(values: Mapping[str, Any]) -> dict[str, Any]:
        """Config values of this class from a config.json in the released layout (`vae_2d`, `vae_temporal`).

        Sizes stated for a part are those of our config for it, other names are refused when that is built. What the
        file leaves out is as the original reads it: one chunk, latents as they are.
        """
        if not RELEASED_PARTS & values.keys():
            return dict(values)
        stated = {name: dict(values.get(name) or {}) for name in RELEASED_PARTS}
        sizes = {
            ours: {key: value for key, value in stated[theirs].items() if key not in RELEASED_KEYS[theirs]}
            for theirs, ours in (("vae_2d", "spatial"), ("vae_temporal", "temporal"))
        }
        channels = sizes["temporal"].get("embed_dim", TemporalVAEConfig.embed_dim)
        statistics = {
            name: [value] * channels if isinstance(value, int | float) else value
            for name, value in (("shift", values.get("shift", 0.0)), ("scale", values.get("scale", 1.0)))
        }
        chunks = {
            "micro_frame_size": values.get("micro_frame_size"),
            "micro_batch_size": stated["vae_2d"].get("micro_batch_size", 4),
        }
        return chunks | statistics | {name: part for name, part in sizes.items() if part}

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T, H, W) of a video of this size; height and width are rounded down to whole latents."""
        stride = self.config.space_stride
        frames = num_latent_frames(num_frames, self.config.micro_frame_size, self.config.temporal.time_stride)
        return self.config.latent_channels, frames, height // stride, width // stride

    def encode(self, video: Tensor, generator: torch.Generator | None = None, *, tile: int | None = None) -> Tensor:
        """Encode a video.

        Args:
            video: (B, 3, pT, pH, pW) in [-1, 1]; surplus rows and columns that fill no latent are dropped.
            generator: If given, both posteriors are sampled from it; otherwise their means are used.
            tile: Side of the tiles, pixels, a multiple of the space stride. None: whole frames.

        Returns:
            Normalised latent (B, C, T, H, W), float32.

        Raises:
            ValueError: If the video has another shape, no frames, fewer rows or columns than one latent takes, or whole
                numbers; or if `tile` is no possible side.
        """
        self._check_video(video)
        if not video.shape[2]:
            raise ValueError(f"a video to encode needs at least one frame, got {tuple(video.shape)}")
        return torch.cat(list(self.encode_stream([video], generator, tile=tile)), dim=2)

    def encode_stream(
        self, videos: Iterable[Tensor], generator: torch.Generator | None = None, *, tile: int | None = None
    ) -> Iterator[Tensor]:
        """Encode a video that comes in pieces, a chunk at a time.

        Memory does not grow with the length of the video, unless gradients are recorded or `micro_frame_size` is None.

        Args:
            videos: Consecutive pieces (B, 3, n, pH, pW) of a video, each of any length.
            generator: As in `encode`.
            tile: As in `encode`.

        Returns:
            Consecutive pieces of the normalised latent, one a chunk; together exactly what `encode` makes of the whole.

        Raises:
            ValueError: If `tile` is no possible side; on the way, if a piece is none that `encode` takes, or has
                another size than the first.
        """
        self._tile_side(tile)  # a wrong one is refused here, not when the first latent is asked for
        return (
            (self._encode_chunk(chunk, generator, tile) - self.shift) / self.scale
            for chunk in regroup(checked_pieces(videos, self._check_video), self.config.micro_frame_size)
        )

    def decode(
        self,
        latent: Tensor,
        num_frames: int | None = None,
        *,
        blend_frames: int = 0,
        tile: int | None = None,
        part: slice = slice(None),
    ) -> Tensor:
        """Decode a normalised latent.

        Args:
            latent: (B, C, T, H, W).
            num_frames: Frames of the video it is of, a whole number of any type. None: as many as the latent holds.
            blend_frames: Frames on each side of a chunk border that are blended (see the module), at most
                `config.max_blend_frames`; the `shapes` model takes 3. 0: chunks stay as they are.
            tile: Side of the tiles, pixels, a multiple of the space stride. None: whole frames.
            part: Frames that are wanted, consecutive ones; the spatial part decodes no others.

        Returns:
            Video (B, 3, frames of `part`, pH, pW), about [-1, 1], float32.

        Raises:
            ValueError: If the latent has another shape or no frames, `num_frames` video frames do not make T latent
                frames, an option is out of range, or `part` has no frames.
        """
        self._check_latent(latent)
        if not latent.shape[2]:
            raise ValueError(f"a latent to decode needs at least one frame, got {tuple(latent.shape)}")
        num_frames = _whole(num_frames)
        expected = latent.shape[2]
        if num_frames is not None:
            expected = num_latent_frames(num_frames, self.config.micro_frame_size, self.config.temporal.time_stride)
        if expected != latent.shape[2]:
            raise ValueError(
                f"num_frames={num_frames} makes {expected} latent frames, but the latent has {latent.shape[2]}"
            )
        pieces = list(self.decode_stream([latent], num_frames, blend_frames=blend_frames, tile=tile, part=part))
        if not pieces:
            raise ValueError(f"{part} has none of the frames of the video")
        return torch.cat(pieces, dim=2)

    def decode_stream(
        self,
        latents: Iterable[Tensor],
        num_frames: int | None = None,
        *,
        blend_frames: int = 0,
        tile: int | None = None,
        part: slice = slice(None),
    ) -> Iterator[Tensor]:
        """Decode a latent that comes in pieces, a chunk at a time.

        Memory does not grow with the length of the video, unless gradients are recorded or `micro_frame_size` is None.
        With blending, a chunk is handed out once the next one has come.

        Args:
            latents: Consecutive pieces (B, C, n, H, W) of a normalised latent, each of any length.
            num_frames: Frames of the video. None: as many as the latent holds.
            blend_frames: As in `decode`.
            tile: As in `decode`.
            part: As in `decode`, counted from the start of the video.

        Returns:
            Consecutive pieces of the video, one a chunk; together exactly what `decode` makes of the whole.

        Raises:
            ValueError: If an option is out of range; on the way, if a piece is none that `decode` takes, has another
                size than the first, or `num_frames` does not fit the latent.
        """
        num_frames = _whole(num_frames)
        limit = self.config.max_blend_frames
        if not 0 <= blend_frames <= limit:
            raise ValueError(
                f"blend_frames ({blend_frames}) must be 0..{limit} with chunks of {self.config.micro_frame_size} frames"
            )
        side = self._tile_side(tile)
        frames = self._decode_chunks(checked_pieces(latents, self._check_latent), num_frames, side)
        if blend_frames:
            frames = self._blend_borders(frames, blend_frames, side)
        if part != slice(None):
            frames = within(frames, part)
        return (self.decode_frames(chunk, tile=tile) for chunk in frames)

    def encode_frames(
        self, video: Tensor, generator: torch.Generator | None = None, *, tile: int | None = None
    ) -> Tensor:
        """Spatial part alone: (B, 3, pT, pH, pW) -> scaled per-frame latents (B, F, pT, H, W)."""
        module = self.spatial_vae.module

        def moments(part: Tensor) -> Tensor:
            return self._by_frame(lambda frames: module.quant_conv(module.encoder(frames)), part)

        # Tiles are joined before anything is drawn: noise of two tiles, averaged where they meet, would be too weak.
        joined = by_tile(moments, video, self._tile_side(tile), unit_in=self.config.space_stride)
        return self._draw(Posterior.from_moments(joined), generator) * self.config.spatial.scaling_factor

    def decode_frames(self, frames: Tensor, *, tile: int | None = None) -> Tensor:
        """Spatial part alone: scaled per-frame latents (B, F, pT, H, W) -> (B, 3, pT, pH, pW)."""
        module = self.spatial_vae.module

        def pixels(part: Tensor) -> Tensor:
            return self._by_frame(lambda z: module.decoder(module.post_quant_conv(channels_last(z))), part)

        frames = full_precision(frames) / self.config.spatial.scaling_factor
        return by_tile(pixels, frames, self._tile_side(tile), unit_out=self.config.space_stride)

    def _check_video(self, video: Tensor) -> None:
        side = self.config.space_stride
        if video.ndim != 5 or video.shape[1] != 3 or min(video.shape[3:]) < side:
            raise ValueError(
                f"a video must be (B, 3, frames, height, width), at least {side} x {side} pixels, got "
                f"{tuple(video.shape)}"
            )
        if not video.is_floating_point():
            raise ValueError(f"a video must hold floating-point numbers in [-1, 1], got {video.dtype}")

    def _check_latent(self, latent: Tensor) -> None:
        channels = self.config.latent_channels
        if latent.ndim != 5 or latent.shape[1] != channels or min(latent.shape[3:]) < 1:
            raise ValueError(
                f"a latent must be (B, {channels}, T, H, W), at least one row and column, got {tuple(latent.shape)}"
            )

    def _tile_side(self, tile: int | None) -> int | None:
        """Side of the tiles in latents."""
        stride = self.config.space_stride
        if tile is not None and (tile % stride or tile < MIN_TILE * stride):
            raise ValueError(f"tile ({tile}) must be a multiple of {stride} pixels and at least {MIN_TILE * stride}")
        return None if tile is None else tile // stride

    def _encode_chunk(self, video: Tensor, generator: torch.Generator | None, tile: int | None) -> Tensor:
        """(B, 3, n, pH, pW), one temporal chunk -> latents that are not normalised yet."""
        frames = self.encode_frames(video, generator, tile=tile)
        moments = by_tile(self.temporal_vae.moments, frames, self._tile_side(tile))
        return self._draw(Posterior.from_moments(moments), generator)

    def _decode_chunks(self, latents: Iterable[Tensor], num_frames: int | None, side: int | None) -> Iterator[Tensor]:
        """Per-frame latents (B, F, n, H, W) of each temporal chunk of a normalised latent."""
        config, done = self.config, 0
        for latent in regroup(latents, config.chunk_latents):
            count = latent.shape[2] * config.temporal.time_stride
            if config.micro_frame_size is not None:
                count = min(count, config.micro_frame_size)
            if num_frames is not None:
                count = min(count, num_frames - done)
            if count < 1:
                raise ValueError(f"num_frames={num_frames} are decoded, but there are latent frames left")
            z = full_precision(latent) * self.scale + self.shift
            yield by_tile(functools.partial(self.temporal_vae.decode, num_frames=count), z, side)
            done += count
        if num_frames is not None and done != num_frames:
            raise ValueError(f"num_frames={num_frames} were asked for, but the latents hold {done}")

    def _blend_borders(self, chunks: Iterator[Tensor], blend_frames: int, side: int | None) -> Iterator[Tensor]:
        """Chunks of per-frame latents (B, F, n, H, W) with their borders blended; see the module."""
        last: Tensor | None = None
        waiting: list[Tensor] = []  # `last` with its first border blended, until the next chunk blends its second one
        for chunk in chunks:
            blended = chunk
            if last is not None:
                done, blended = self._blend_border(last, chunk, waiting.pop(), blend_frames, side)
                yield done
            waiting.append(blended)
            last = chunk
        yield from waiting

    def _blend_border(
        self, left: Tensor, right: Tensor, left_blended: Tensor, blend_frames: int, side: int | None
    ) -> tuple[Tensor, Tensor]:
        """Both sides of a border, blended; `left_blended` is `left` with its other border done already."""
        stride = self.config.temporal.time_stride
        before, after = border_window(left.shape[2], stride, right.shape[2], blend_frames)
        around = torch.cat([left[:, :, left.shape[2] - before :], right[:, :, :after]], dim=2)

        def again(part: Tensor) -> Tensor:
            return self.temporal_vae.decode(self.temporal_vae.encode(part).mean, before + after)

        bridge = by_tile(again, around, side)
        rising = min(blend_frames, before)
        falling = min(blend_frames, after)
        head, tail = left_blended.split([left.shape[2] - rising, rising], dim=2)
        tail = torch.lerp(tail, bridge[:, :, before - rising : before], ramp(rising, tail))
        start, rest = right.split([falling, right.shape[2] - falling], dim=2)
        start = torch.lerp(start, bridge[:, :, before : before + falling], ramp(falling, start).flip(0))
        return torch.cat([head, tail], dim=2), torch.cat([start, rest], dim=2)

    def _by_frame(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Apply `run` to (n, C, H, W) micro batches of the frames of (B, C, pT, H, W)."""
        batch, frames = x.shape[0], x.shape[2]
        flat = like_weights(x.transpose(1, 2).flatten(0, 1), self.spatial_vae)
        size = self.config.micro_batch_size or len(flat)
        done = [full_precision(run(part)) for part in flat.split(size)]
        flat = done[0] if len(done) == 1 else torch.cat(done)
        return flat.unflatten(0, (batch, frames)).transpose(1, 2)

    @staticmethod
    def _draw(posterior: Posterior, generator: torch.Generator | None) -> Tensor:
        return posterior.mean if generator is None else posterior.sample(generator)


def _whole(num_frames: Any) -> int | None:
    """A number of frames, such as an int, a NumPy integer or a tensor with one, as an int."""
    try:
        return None if num_frames is None else operator.index(num_frames)
    except TypeError:
        raise ValueError(f"num_frames must be a whole number, got {num_frames!r}") from None


def latent_statistics(latents: Sequence[Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel mean and standard deviation of unnormalised latents (B, C, T, H, W): a VAE's `shift` and `scale`."""
    flat = torch.cat([z.transpose(0, 1).flatten(1) for z in latents], dim=1).double()
    return tuple(flat.mean(1).tolist()), tuple(flat.std(1).tolist())
