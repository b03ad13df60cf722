"""Encoding of the pictures and videos that a film is given: latent frames with the VAE, code frames with the VQ-VAE.

It happens once, before a run starts. The result is stored in the run folder (`references.safetensors`), so that a film
can be resumed, changed and verified after the files are gone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from arlon.data.pictures import read_picture
from arlon.data.transforms import resize_and_crop
from arlon.data.video_io import read_video
from arlon.diffusion.references import (
    encode_continued,
    encode_end_image,
    encode_image,
    encode_reference,
    given_span,
)
from arlon.film.media import Reference, tensor_name
from arlon.film.messages import Job
from arlon.film.plan import Plan
from arlon.film.take_media import CODES, media_of_shot
from arlon.film.workers import load_vae, torch_threads

if TYPE_CHECKING:
    from arlon.models.vqvae import LatentVQVAE

MARGIN_FRAMES = 8
"""Frames read before the ones needed at the end of a video, whose length is only estimated from its mean frame rate."""


@torch.inference_mode()
def encode_references(job: Job, references: Sequence[Reference]) -> dict[str, Tensor]:
    """Encode checked files.

    Returns:
        Latent frames (1, C, n, H, W) float32 by `SHOT/KIND`, and code frames (1, n, cH, cW) int64 by `SHOT/codes`.
    """
    if not references:
        return {}
    tensors: dict[str, Tensor] = {}
    with torch_threads(job.settings.num_threads):
        codec = _Codec(job)
        for reference in references:
            tensors[reference.name] = codec.latent(reference).float().cpu().contiguous()
        for shot, files in groupby(references, key=lambda reference: reference.shot):
            codes = codec.codes_of_head(shot, list(files), tensors)
            if codes is not None:
                tensors[tensor_name(shot, CODES)] = codes.cpu().contiguous()
    return tensors


class _Codec:
    """The two autoencoders of a film, each loaded once.

    Args:
        job: The film.
    """

    def __init__(self, job: Job) -> None:
        self.plan, self.device, self.tile = job.plan, job.settings.device, job.settings.vae_tile
        self._vqvae_path = job.component("vqvae")
        self.vae = load_vae(job)

    @cached_property
    def vqvae(self) -> LatentVQVAE:
        """The VQ-VAE, loaded when the first codes are needed: end images and a base alone need none."""
        from arlon.models.vqvae import LatentVQVAE  # takes seconds to import

        return LatentVQVAE.from_pretrained(self._vqvae_path).to(self.device)

    def encode(self, video: Tensor) -> Tensor:
        """Latent (1, C, T, H, W) of a video (1, 3, pT, pH, pW) in [-1, 1]."""
        return self.vae.encode(video.to(self.device), tile=self.tile)

    def latent(self, reference: Reference) -> Tensor:
        """Latent frames (1, C, n, H, W) of a file in its role."""
        grid, video = self.plan.geometry.grid, _read_pixels(reference, self.plan)
        by_kind = {
            "video": encode_continued,
            "image": encode_image,
            "end_image": encode_end_image,
            "references": encode_reference,
        }
        return by_kind[reference.kind](self.encode, video, grid)

    def codes_of_head(self, shot: int, references: Sequence[Reference], latents: Mapping[str, Tensor]) -> Tensor | None:
        """Code frames (1, n, cH, cW) of what a take begins with; None if it begins with less than a code frame.

        Args:
            shot: The shot that starts the take.
            references: Its files.
            latents: Latent frames of the files by name.
        """
        if not self.plan.geometry.has_codes:
            return None
        ratio = self.plan.geometry.code_ratio[0]
        picture: Reference | None = None
        head: Tensor | None = None
        for reference in references:
            if reference.kind == "video":
                head = latents[reference.name]
            elif reference.kind == "image":
                picture = reference
        if any(reference.kind == "references" for reference in references):
            head = _kept_head(self.plan, shot, latents)
            if head is not None and head.shape[2] == 1 and ratio > 1:
                stills = (r for r in references if r.kind == "references" and not r.is_video)
                picture = next((still for still in stills if torch.equal(latents[still.name], head)), None)
        if picture is not None:
            # One latent frame is less than a code frame: the picture is held for a chunk, as it stands still there.
            still = _read_pixels(picture, self.plan)
            return self._codes(self.encode(still.expand(-1, self.plan.geometry.grid.chunk_frames, -1, -1)[None]), 1)
        count = 0 if head is None else head.shape[2] // ratio
        return self._codes(head.to(self.device), count) if head is not None and count else None

    def _codes(self, latent: Tensor, count: int) -> Tensor:
        """The first `count` code frames (1, count, cH, cW) of a latent (1, C, T, H, W)."""
        return self.vqvae.encode(latent.float())[:, :count]


def _kept_head(plan: Plan, shot: int, latents: Mapping[str, Tensor]) -> Tensor | None:
    """Latent frames (1, C, n, H, W) that the references of a shot keep unchanged from the start of its take on."""
    first = next(segment for segment in plan.segments if segment.shot == shot)
    conditioning = media_of_shot(plan, shot, latents).conditioning_for(first, plan.geometry.grid)
    if conditioning is None:
        return None
    latent, edit_ratio = conditioning
    kept = int((edit_ratio[0] == 0).long().cumprod(0).sum())  # frames before the first that may change
    return latent[:, :, :kept] if kept else None


def _read_pixels(reference: Reference, plan: Plan) -> Tensor:
    """Pixels (3, pT, pH, pW) in [-1, 1] of the part of a file that is used, at the size of computed frames."""
    height, width = plan.frame_fit.made_height, plan.frame_fit.made_width
    if not reference.is_video:
        return resize_and_crop(read_picture(reference.path), height=height, width=width, filter="bicubic")
    if reference.kind == "references":
        frames = read_video(reference.path, fps=plan.fps)[: reference.num_frames]
    else:
        needed = given_span(reference.num_frames, plan.geometry.grid).frames
        start = max(0, reference.num_frames - needed - MARGIN_FRAMES)
        frames = read_video(reference.path, start=start, fps=plan.fps)[-needed:]
    return resize_and_crop(frames, height=height, width=width)
