"""Latent VQ-VAE: a latent as a small grid of codes and back, blurry by design.

Source: ARLON, arXiv:2410.20502, latent VQ-VAE: a 3D encoder, one codebook and a decoder nested between the
encoder and the decoder of the frozen video VAE. One class serves both ratios, the fine one (codes that the AR
model writes) and the coarser one (reconstructions that the DiT is trained on).

Our choices for what the paper leaves open:
- 3D convolutions are factorised into 1x3x3 and 3x1x1; grids change by non-overlapping patches, so that a code
  frame covers exactly `ratio[0]` latent frames.
- Norms see one position at a time. Nothing has statistics over time or space, so decoding a window with a
  halo of `receptive_halo` code frames gives what decoding the whole film gives.
- The codebook is an exponential moving average with restart of dead codes and, by default, cosine look-up in
  few dimensions (van den Oord et al., arXiv:1711.00937; Yu et al., arXiv:2110.04627).

Dimension key
    B batch    C latent channels    T, H, W latent grid    cT, cH, cW code grid    K codebook size
    D width of the level at hand    d code dimension
Inside, features are (B, T, H, W, D): channels last, the fast layout of convolutions and linear maps on a CPU.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from arlon.components import Component
from arlon.grids import ceil_div, code_grid
from arlon.models.codebook import Codebook
from arlon.models.vqvae_layers import Levels, build_decoder, build_encoder


@dataclass(frozen=True, kw_only=True)
class LatentVQVAEConfig:
    """Shape of a latent VQ-VAE and of its codebook."""

    latent_channels: int = 16
    """C, channels of the normalised latent."""
    ratio: tuple[int, int, int] = (2, 2, 2)
    """Latent positions a code covers along (t, h, w); powers of two."""
    hidden_dim: int = 96
    """Width on the code grid; every finer level is half as wide, down to 32."""
    num_res_blocks: int = 3
    """Residual blocks on the code grid; each finer level has one."""
    codebook_size: int = 1024
    """K."""
    code_dim: int = 16
    """Width in which codes are looked up."""
    commitment_weight: float = 0.25
    """Weight of the commitment term in the loss (beta)."""
    decay: float = 0.99
    """Decay of the moving averages behind the codebook."""
    use_cosine_sim: bool = True
    """Compare directions (codes on the unit sphere) rather than Euclidean distance."""
    dead_code_threshold: float = 0.1
    """Codes whose moving average of uses a batch falls below this restart from the batch; 0 never restarts.

    Choose it well below the mean number of uses, B * cT * cH * cW / K.
    """
    kmeans_init: bool = True
    """Start the codebook from k-means of the first training batch rather than at random."""
    kmeans_iters: int = 10
    """Rounds of that k-means."""
    rotation_trick: bool = True
    """Pass gradients through the look-up by rotation (arXiv:2410.06424) rather than straight through."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be at least 1, got {value}"
            for name in (
                "latent_channels",
                "hidden_dim",
                "num_res_blocks",
                "codebook_size",
                "code_dim",
                "kmeans_iters",
            )
            if (value := getattr(self, name)) < 1
        ]
        if len(self.ratio) != 3 or any(r < 1 or r & (r - 1) for r in self.ratio):
            problems.append(f"ratio must be three powers of two (t, h, w), such as (2, 4, 4), got {tuple(self.ratio)}")
        if not 0 < self.decay < 1:
            problems.append(f"decay must lie between 0 and 1, such as 0.99, got {self.decay}")
        if self.commitment_weight < 0 or self.dead_code_threshold < 0:
            problems.append(
                "commitment_weight and dead_code_threshold must not be negative, "
                f"got {self.commitment_weight} and {self.dead_code_threshold}"
            )
        if problems:
            raise ValueError("LatentVQVAEConfig: " + "; ".join(problems))

    @property
    def receptive_halo(self) -> int:
        """Code frames on either side of a code frame that its decoded latent frames depend on."""
        halo = 0
        for t, _, _ in Levels(self.ratio, self.hidden_dim).strides:
            halo = ceil_div(halo + 1, t)  # one block on this level, then one patch of the next coarser level
        return halo + self.num_res_blocks


@dataclass(frozen=True)
class VQVAEOutput:
    """What one pass through the VQ-VAE gives."""

    reconstruction: Tensor
    """Coarse latent, (B, C, T, H, W)."""
    codes: Tensor
    """(B, cT, cH, cW) int64."""
    loss: Tensor
    """Scalar: reconstruction_loss + commitment_weight * commitment_loss."""
    reconstruction_loss: Tensor
    """Scalar: mean squared error on the latent."""
    commitment_loss: Tensor
    """Scalar: mean squared distance of the encoder output to its code, unweighted."""


@dataclass(frozen=True)
class CodebookUsage:
    """How much of a codebook a set of codes uses."""

    used_share: float
    """Share of the codebook that occurs at all, 0..1."""
    perplexity: float
    """exp(entropy of the code frequencies in nats), 1..K."""


def codebook_usage(codes: Tensor, codebook_size: int) -> CodebookUsage:
    """Measure how many of `codebook_size` codes occur in `codes` (any shape, int64) and how evenly.

    Raises:
        ValueError: If there are no codes, or one lies outside [0, codebook_size).
    """
    if codes.numel() == 0:
        raise ValueError("codebook usage needs at least one code, got none")
    _check_codes(codes, codebook_size)
    frequency = torch.bincount(codes.flatten(), minlength=codebook_size).double() / codes.numel()
    entropy = -torch.special.xlogy(frequency, frequency).sum()
    return CodebookUsage((frequency > 0).double().mean().item(), entropy.exp().item())


class LatentVQVAE(Component):
    """Encode a latent into codes and decode codes into a coarse latent of the same shape.

    Sizes that the ratio does not divide are padded at the end by repeating the last frame, row or column, and
    cropped again by `decode`. `encode` and `decode` are deterministic in either mode; the codebook changes
    only in `forward` in training mode.
    """

    config_class = LatentVQVAEConfig

    def __init__(self, config: LatentVQVAEConfig) -> None:
        super().__init__()
        self.config = config
        levels = Levels(config.ratio, config.hidden_dim)
        sizes = {"code_dim": config.code_dim, "num_res_blocks": config.num_res_blocks}
        self.encoder = build_encoder(config.latent_channels, levels, **sizes)
        self.quantizer = Codebook(config)
        self.decoder = build_decoder(config.latent_channels, levels, **sizes)

    @property
    def receptive_halo(self) -> int:
        """Code frames on either side of a code frame that its decoded latent frames depend on."""
        return self.config.receptive_halo

    def forward(self, latent: Tensor, generator: torch.Generator | None = None) -> VQVAEOutput:
        """Reconstruct a latent through the codebook, with the losses of training.

        loss = mean (latent - reconstruction)^2 + beta mean (z - sg(e))^2: arXiv:1711.00937 eq. 3 with moving
        averages for the codebook term. In training mode they are updated and dead codes restarted.

        Args:
            latent: Normalised latent, (B, C, T, H, W).
            generator: CPU generator that k-means and restarts draw from in training; the global one if None.

        Raises:
            ValueError: If `latent` has the wrong shape.
        """
        z = self._encode(latent)
        with _full_precision(z.device):
            vectors, codes, commitment = self.quantizer(z.float().flatten(0, 3), generator)
        reconstruction = self._decode(vectors.to(z.dtype).view(z.shape), latent.shape[2:])
        error = (reconstruction.float() - latent.float()).square().mean()
        loss = error + self.config.commitment_weight * commitment
        return VQVAEOutput(reconstruction, codes.view(z.shape[:-1]), loss, error, commitment)

    @torch.no_grad()
    def encode(self, latent: Tensor) -> Tensor:
        """Codes (B, cT, cH, cW) int64 of a normalised latent (B, C, T, H, W); ratios round up.

        Raises:
            ValueError: If `latent` has the wrong shape.
        """
        z = self._encode(latent)
        with _full_precision(z.device):
            return self.quantizer.nearest(z.float())

    def decode(
        self, codes: Tensor, num_latent_frames: int | None = None, *, grid: tuple[int, int] | None = None
    ) -> Tensor:
        """Decode codes of a whole film at once.

        Args:
            codes: (B, cT, cH, cW) int64 in [0, K).
            num_latent_frames: T, if it is not a multiple of the ratio; cT * ratio if None.
            grid: (H, W), if they are not multiples of the ratio; (cH, cW) * ratio if None.

        Returns:
            Coarse latent, (B, C, T, H, W).

        Raises:
            ValueError: If codes have the wrong shape or range, or do not belong to a latent of that size.
        """
        size = self._latent_size(codes, num_latent_frames, grid)
        return self._decode(self._look_up(codes), size)

    def decode_frames(
        self,
        codes: Tensor,
        start: int,
        stop: int,
        *,
        num_latent_frames: int | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """Latent frames [start, stop) of what `decode` gives, from just the codes that matter for them.

        Args:
            codes: Codes of the whole film, (B, cT, cH, cW) int64.
            start: First latent frame.
            stop: One past the last latent frame.
            num_latent_frames: T of the whole film; cT * ratio if None.
            grid: (H, W); (cH, cW) * ratio if None.

        Returns:
            (B, C, stop - start, H, W).

        Raises:
            ValueError: As `decode`, or if [start, stop) is empty or reaches outside the film.
        """
        num_frames, height, width = self._latent_size(codes, num_latent_frames, grid)
        if not 0 <= start < stop <= num_frames:
            raise ValueError(f"latent frames [{start}, {stop}) are empty or outside the film of {num_frames} frames")
        ratio = self.config.ratio[0]
        first = max(0, start // ratio - self.receptive_halo)
        last = min(codes.shape[1], ceil_div(stop, ratio) + self.receptive_halo)
        window = self._decode(self._look_up(codes[:, first:last]), ((last - first) * ratio, height, width))
        return window[:, :, start - first * ratio : stop - first * ratio]

    def _encode(self, latent: Tensor) -> Tensor:
        """Encoder output (B, cT, cH, cW, d) of a latent (B, C, T, H, W)."""
        channels = self.config.latent_channels
        if latent.ndim != 5 or latent.shape[1] != channels or latent.numel() == 0:
            raise ValueError(f"expected a latent (B, {channels}, T, H, W), got {tuple(latent.shape)}")
        pad = [-size % r for size, r in zip(latent.shape[2:], self.config.ratio, strict=True)]
        if any(pad):
            latent = F.pad(latent, (0, pad[2], 0, pad[1], 0, pad[0]), mode="replicate")
        return self.encoder(rearrange(latent, "b c t h w -> b t h w c"))

    def _decode(self, quantized: Tensor, size: tuple[int, ...]) -> Tensor:
        """Coarse latent (B, C, *size) of code vectors (B, cT, cH, cW, d), cropped at the end."""
        num_frames, height, width = size
        x = self.decoder(quantized)[:, :num_frames, :height, :width]
        return rearrange(x, "b t h w c -> b c t h w")

    def _look_up(self, codes: Tensor) -> Tensor:
        """Code vectors (B, cT, cH, cW, d) of codes (B, cT, cH, cW)."""
        return self.quantizer.vectors[codes]

    def _latent_size(
        self, codes: Tensor, num_latent_frames: int | None, grid: tuple[int, int] | None
    ) -> tuple[int, int, int]:
        """Check codes and the size (T, H, W) of the latent they stand for."""
        if codes.ndim != 4 or codes.numel() == 0:
            raise ValueError(f"expected codes (B, cT, cH, cW), got {tuple(codes.shape)}")
        _check_codes(codes, self.config.codebook_size)
        t, h, w = (n * r for n, r in zip(codes.shape[1:], self.config.ratio, strict=True))
        size = (t if num_latent_frames is None else num_latent_frames, *(grid or (h, w)))
        if code_grid(size, self.config.ratio) != tuple(codes.shape[1:]):
            raise ValueError(
                f"a latent of (T, H, W) = {size} has a code grid of {code_grid(size, self.config.ratio)} at "
                f"ratio {tuple(self.config.ratio)}, but the codes have {tuple(codes.shape[1:])}"
            )
        return size


def _full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Inside, autocast is off: code look-up in bfloat16 would pick wrong codes."""
    if not torch.amp.is_autocast_available(device.type):  # the meta device
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _check_codes(codes: Tensor, codebook_size: int) -> None:
    """Refuse codes that are not int64 in [0, codebook_size); ranges are not read on the meta device."""
    if codes.dtype != torch.int64:
        raise ValueError(f"codes must be int64, got {codes.dtype}")
    if codes.is_meta:
        return
    low, high = codes.aminmax()
    if low < 0 or high >= codebook_size:
        raise ValueError(f"codes must lie in [0, {codebook_size}), got {int(low)}..{int(high)}")
