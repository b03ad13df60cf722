"""STDiT3, the diffusion transformer of Open-Sora v1.2, as a backbone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from arlon.backbones.base import FAMILIES, BackboneFamily, TimeShift
from arlon.components import load_component, read_config
from arlon.cost import dit_cost
from arlon.diffusion import flow, samplers
from arlon.models.injection import InjectionConfig
from arlon.models.stdit import Inject, Injection, PreparedText, STDiT3, STDiT3Config
from arlon.protocols import BackboneSpec, Cost, VideoSize

FAMILY = "STDiT3"


@dataclass(frozen=True, kw_only=True)
class STDiT3Spec(BackboneSpec):
    """Sizes and costs of an STDiT3."""

    config: STDiT3Config

    def cost(
        self, size: tuple[int, int, int], *, text_length: int, batch: int = 1, injection: InjectionConfig | None = None
    ) -> Cost:
        """Cost of one pass, counted on the meta device."""
        return dit_cost(self.config, size, text_length=text_length, batch=batch, injection=injection)


def spec_of(config: STDiT3Config) -> STDiT3Spec:
    """Sizes of an STDiT3 from its config."""
    return STDiT3Spec(
        family=FAMILY,
        channels=config.in_channels,
        patch_size=config.patch_size,
        width=config.hidden_size,
        num_injection_points=config.depth,
        # With `skip_y_embedder` text arrives projected to the width of the network.
        text_width=config.hidden_size if config.skip_y_embedder else config.caption_channels,
        max_text_length=config.model_max_length,
        config=config,
    )


class STDiT3Backbone:
    """An STDiT3 with its schedule of flow times.

    Args:
        dit: The network, in eval mode.
        shift: How flow times depend on the size of the video.
    """

    def __init__(self, dit: STDiT3, shift: TimeShift | None = None) -> None:
        self.dit, self.shift = dit, shift or TimeShift()

    @property
    def spec(self) -> STDiT3Spec:
        """Sizes of the network."""
        return spec_of(self.dit.config)

    def null_text(self, length: int) -> Tensor:
        """Learned null caption, (length, E)."""
        return self.dit.null_text(length)

    def prepare_text(self, tokens: Tensor, mask: Tensor | None) -> PreparedText:
        """Keys and values of every cross-attention; see `STDiT3.prepare_text`."""
        return self.dit.prepare_text(tokens, mask)

    def velocity(
        self,
        latent: Tensor,
        t: Tensor,
        text: PreparedText,
        *,
        size: VideoSize,
        frame_mask: Tensor | None = None,
        inject: Inject | Injection | None = None,
    ) -> Tensor:
        """Velocity of a noisy latent, (B, C, T, H, W); see `arlon.protocols.Backbone.velocity`."""
        velocity: Tensor = self.dit(
            latent,
            t,
            text,
            frame_mask=frame_mask,
            fps=size.fps,
            height=size.height,
            width=size.width,
            inject=inject,
        )
        return velocity

    def times(self, num_steps: int, *, size: VideoSize, num_frames: int) -> Tensor:
        """Even times, moved towards noise for large or long videos as in Open-Sora v1.2; (num_steps + 1,)."""
        shift = partial(
            flow.shift_times,
            height=size.height,
            width=size.width,
            num_frames=num_frames,
            base_size=self.shift.base_size,
            scale=self.shift.scale,
        )
        return samplers.make_times(num_steps, shift)


@FAMILIES.register(FAMILY)
class STDiT3Family(BackboneFamily):
    """STDiT3 in component folders of ours and released ones."""

    def read_spec(self, folder: Path) -> STDiT3Spec:
        """Sizes from `config.json`."""
        return spec_of(read_config(STDiT3, folder))

    def load(self, folder: Path, *, device: torch.device | str, shift: TimeShift) -> STDiT3Backbone:
        """Network with its weights, strictly loaded."""
        return STDiT3Backbone(load_component(STDiT3, folder, device=device), shift)
