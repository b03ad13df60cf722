"""The networks behind VBench.

A backbone is a folder or hub id in the layout of transformers; RAFT and MUSIQ are files of weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from arlon.checkpoint import read_json, resolve_model
from arlon.errors import did_you_mean, one_line
from arlon.evaluation.vbench.network_files import (
    check_kind,
    describe,
    load_network,
    load_tokenizer,
    read_tensors,
    short_hash,
    short_message,
    tokens_of,
    weight_file,
)
from arlon.evaluation.vbench.rules import (
    CLIP,
    IMAGENET,
    centre,
    consistency,
    fastest_pixels,
    flow_stride,
    is_dynamic,
    pad_to_eighths,
    prepare_for_prompt,
    prepare_pictures,
)

BATCH_SIZE = 16
AESTHETIC_HEAD = "aesthetic_head.safetensors"
AESTHETIC_SCALE = 10
RAFT_UPDATES = 20
RAFT_MIN_SIDE = 128
"""Pixels: features are an eighth of it, and the coarsest level of their pyramid an eighth of that."""
RAFT_BATCH_SIZE = 4
MUSIQ_LONGEST_SIDE = 512
MUSIQ_SCALE = 100
CONSISTENCY_FRAMES = 8
"""Frames of a shot that are compared with its prompt."""


class Backbone(ABC):
    """A network that gives a film one figure.

    Attributes:
        description: What it is, without any path: class, sizes, hash of the weights.
    """

    description: str

    @abstractmethod
    def score(self, frames: np.ndarray, *, fps: float) -> float:
        """The figure of frames (pT, pH, pW, 3) uint8, `fps` of them a second.

        Raises:
            ValueError: If it cannot be computed of such frames; the message says why.
        """


class PromptBackbone(Backbone):
    """A network that holds a shot against its prompt."""

    @abstractmethod
    def agreement(self, frames: np.ndarray, prompt: str) -> float:
        """Cosine of frames (pT, pH, pW, 3) uint8 and a prompt, [-1, 1]."""

    def score(self, frames: np.ndarray, *, fps: float) -> float:
        """Refused: `agreement` needs a prompt."""
        raise ValueError("it needs the prompt of every shot")


class DinoBackbone(Backbone):
    """Class token of a vision transformer: subject consistency."""

    def __init__(self, folder: Path, device: str) -> None:
        check_kind(folder, "vit", "a DINO vision transformer")
        from transformers import ViTModel

        self.description = describe(folder)
        self._model = load_network(ViTModel, folder, device, add_pooling_layer=False)

    @torch.inference_mode()
    def score(self, frames: np.ndarray, *, fps: float) -> float:
        """Consistency of the class tokens."""
        device = self._model.device
        features = []
        for start in range(0, len(frames), BATCH_SIZE):
            pictures = prepare_pictures(frames[start : start + BATCH_SIZE], "bilinear", *IMAGENET).to(device)
            out = self._model(pixel_values=pictures, interpolate_pos_encoding=True)
            features.append(out.last_hidden_state[:, 0].float().cpu())
        return consistency(torch.cat(features))


class ClipBackbone(Backbone):
    """Image embedding of CLIP: background consistency."""

    def __init__(self, folder: Path, device: str) -> None:
        check_kind(folder, "clip", "a CLIP model")
        from transformers import CLIPVisionModelWithProjection

        self.description = describe(folder)
        self.width = read_json(folder / "config.json", "a configuration").get("projection_dim", 512)
        self._model = load_network(CLIPVisionModelWithProjection, folder, device, projection_dim=self.width)
        self.side = self._model.config.image_size

    def embed(self, frames: np.ndarray) -> Tensor:
        """Embeddings of frames, (pT, E) float32."""
        parts = (frames[start : start + BATCH_SIZE] for start in range(0, len(frames), BATCH_SIZE))
        pictures = (centre(prepare_pictures(part, "bicubic", *CLIP, side=self.side), self.side) for part in parts)
        return torch.cat([self.embed_pictures(batch) for batch in pictures])

    @torch.inference_mode()
    def embed_pictures(self, pictures: Tensor) -> Tensor:
        """Embeddings (n, E) float32 of normalised pictures (n, 3, side, side)."""
        return self._model(pixel_values=pictures.to(self._model.device)).image_embeds.float().cpu()

    def score(self, frames: np.ndarray, *, fps: float) -> float:
        """Consistency of the embeddings."""
        return consistency(self.embed(frames))


class AestheticBackbone(ClipBackbone):
    """CLIP with a linear head, `aesthetic_head.safetensors` (weight (1, E), bias (1,)) in its folder."""

    def __init__(self, folder: Path, device: str) -> None:
        head = folder / AESTHETIC_HEAD
        if not head.is_file():
            raise ValueError(f"'{folder}' has no {AESTHETIC_HEAD}: store weight (1, E) and bias (1,) of the head there")
        super().__init__(folder, device)
        try:
            tensors = safetensors.torch.load(head.read_bytes())
        except safetensors.SafetensorError as error:
            raise ValueError(f"'{head}' is damaged: {error}") from error
        width = self._model.config.projection_dim
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if shapes != {"weight": (1, width), "bias": (1,)}:
            raise ValueError(f"'{head}' must hold weight (1, {width}) and bias (1,), got {shapes}")
        self._weight, self._bias = tensors["weight"].float()[0], tensors["bias"].float()
        self.description += f", head {short_hash(head)}"

    def score(self, frames: np.ndarray, *, fps: float) -> float:
        """Mean of the head over the frames."""
        embedded = F.normalize(self.embed(frames), dim=-1)
        return ((embedded @ self._weight + self._bias) / AESTHETIC_SCALE).mean().item()


class RaftBackbone(Backbone):
    """Optical flow of torchvision's RAFT: dynamic degree, of the film as a whole as in VBench, cuts included."""

    def __init__(self, source: Path, device: str) -> None:
        file = weight_file(source)  # a wrong folder is told first, whatever is installed
        try:
            from torchvision.models.optical_flow import raft_large
        except (ImportError, RuntimeError) as error:  # one made for another torch fails in its own way
            raise ValueError(
                f"RAFT's architecture comes from torchvision, which cannot be imported ({one_line(error)}): install "
                "the extra 'vbench', in the version that fits this torch"
            ) from error
        tensors = read_tensors(file)
        self._model = raft_large(weights=None, progress=False)
        try:
            self._model.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(
                f"'{file}' does not hold the weights of torchvision's raft_large: {short_message(error)}. The original "
                "RAFT names its weights otherwise; raft_large_C_T_V1 holds those of raft-things"
            ) from error
        self._model = self._model.eval().requires_grad_(False).to(device)
        self._device = device
        self.description = f"raft, weights {short_hash(file)}"

    @torch.inference_mode()
    def score(self, frames: np.ndarray, *, fps: float) -> float:
        """1 if enough frames move fast enough, or else 0."""
        picked = frames[:: flow_stride(fps)]
        if len(picked) < 2:
            return 0.0
        size = picked.shape[1], picked.shape[2]
        if min(size) <= RAFT_MIN_SIDE - 8:
            raise ValueError(
                f"RAFT needs frames of more than {RAFT_MIN_SIDE - 8} pixels a side, got {size[1]} x {size[0]}"
            )
        pixels = []
        for start in range(0, len(picked) - 1, RAFT_BATCH_SIZE):
            part = torch.from_numpy(np.ascontiguousarray(picked[start : start + RAFT_BATCH_SIZE + 1]))
            pictures = pad_to_eighths(part.permute(0, 3, 1, 2).float() / 127.5 - 1).to(self._device)
            flow = self._model(pictures[:-1], pictures[1:], num_flow_updates=RAFT_UPDATES)[-1]
            pixels.append(fastest_pixels(flow.float().cpu()))
        return float(is_dynamic(torch.cat(pixels), size, fps=fps, num_frames=len(picked)))


class MusiqBackbone(Backbone):
    """Quality of single frames by pyiqa's MUSIQ: imaging quality."""

    def __init__(self, source: Path, device: str) -> None:
        try:
            from pyiqa.archs.musiq_arch import MUSIQ
        except Exception as error:  # it wants a transformers of its own, and fails in its own way with another
            raise ValueError(
                f"MUSIQ's architecture comes from pyiqa, which cannot be imported ({one_line(error)})"
            ) from error
        file = weight_file(source)
        tensors = read_tensors(file)
        self._model = MUSIQ(pretrained=False)
        try:
            self._model.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"'{file}' does not hold the weights of pyiqa's MUSIQ: {short_message(error)}") from error
        self._model = self._model.eval().requires_grad_(False).to(device)
        self._device = device
        self.description = f"musiq, weights {short_hash(file)}"

    @torch.inference_mode()
    def score(self, frames: np.ndarray, *, fps: float) -> float:
        """Mean quality of the frames, which are reduced if a side is longer than 512 pixels."""
        height, width = frames.shape[1:3]
        scale = min(1.0, MUSIQ_LONGEST_SIDE / max(height, width))
        total = 0.0
        for frame in frames:
            picture = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None].float()
            if scale < 1:
                picture = F.interpolate(picture, size=(int(scale * height), int(scale * width)), mode="bilinear")
            total += float(self._model((picture / 255).to(self._device)))
        return total / len(frames) / MUSIQ_SCALE


class ClipPromptBackbone(PromptBackbone):
    """CLIP in place of VBench's ViCLIP: the mean of the embeddings of single frames, which knows nothing of motion."""

    def __init__(self, folder: Path, device: str) -> None:
        from transformers import CLIPTextModelWithProjection

        self._vision = ClipBackbone(folder, device)
        width = self._vision.width
        self._text = load_network(CLIPTextModelWithProjection, folder, device, projection_dim=width)
        self._tokenizer = load_tokenizer(folder, self._text.config.vocab_size)
        self.description = f"{self._vision.description}, mean of {CONSISTENCY_FRAMES} single frames"

    @torch.inference_mode()
    def agreement(self, frames: np.ndarray, prompt: str) -> float:
        """Cosine of the mean of the frames' unit embeddings and that of the prompt."""
        pictures = prepare_for_prompt(frames, CONSISTENCY_FRAMES, self._vision.side)
        video = F.normalize(self._vision.embed_pictures(pictures), dim=-1).mean(0)
        words = tokens_of(self._tokenizer, prompt, self._text.config.max_position_embeddings)
        text = self._text(input_ids=torch.tensor([words], device=self._text.device)).text_embeds[0].float().cpu()
        return F.cosine_similarity(video, text, dim=0).item()


BACKBONE_KINDS: Mapping[str, Callable[[Path, str], Backbone]] = {
    "subject_consistency": DinoBackbone,
    "background_consistency": ClipBackbone,
    "aesthetic_quality": AestheticBackbone,
    "dynamic_degree": RaftBackbone,
    "imaging_quality": MusiqBackbone,
    "overall_consistency": ClipPromptBackbone,
}
"""The dimensions for which a backbone can be given."""
NO_ARCHITECTURE: Mapping[str, str] = {
    "motion_smoothness": "whose architecture is in its authors' repository alone",
}
"""Why none can be given for the others."""


def load_backbone(dimension: str, source: str, *, device: str = "cpu") -> Backbone:
    """Load the network of a dimension.

    Args:
        dimension: One of `BACKBONE_KINDS`.
        source: A folder, or a hub id; of `dynamic_degree` and `imaging_quality` a file of weights, or its folder.
        device: Where it computes.

    Raises:
        ValueError: If there is no such dimension, or the source is no such network; the message says why.
    """
    if dimension not in BACKBONE_KINDS:
        raise ValueError(f"no backbone can be given for {dimension!r}, {did_you_mean(dimension, BACKBONE_KINDS)}")
    try:
        place = Path(source).expanduser() if Path(source).expanduser().is_file() else resolve_model(source)
        return BACKBONE_KINDS[dimension](place, device)
    except FileNotFoundError as error:
        raise ValueError(f"'{source}' is neither a folder nor a model of the hub: {error}") from error
