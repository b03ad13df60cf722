"""VBench's rules and the networks behind them.

Source: Huang et al., "VBench: Comprehensive benchmark suite for video generative models", arXiv:2311.17982, and its
code where the paper leaves something open (preprocessing, thresholds). A backbone is a folder or hub id in the layout
of transformers, read from safetensors only; RAFT, MUSIQ and ViCLIP are files of weights, read as tensors only.
"""

from __future__ import annotations

import hashlib
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from arlon.checkpoint import read_json, resolve_model
from arlon.evaluation.viclip import ViCLIP

RULES = 2
"""Of what this module computes with networks: with other ones, such figures are computed again."""
FLOW_FPS = 8
"""Frames a second at which motion is looked at."""
FASTEST_SHARE = 0.05
DYNAMIC_PIXELS = 6.0
"""Shift from one frame to the next, in pixels of a frame with a short side of 256, that counts as motion."""
DYNAMIC_FRAMES = 0.25
INPUT_SIDE = 224
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
"""Of a shot, held against its prompt."""
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


# --- motion --------------------------------------------------------------------------------------------------


def flow_stride(fps: float) -> int:
    """Every how many frames motion is looked at."""
    return max(1, round(fps / FLOW_FPS))


def fastest_pixels(flow: Tensor) -> Tensor:
    """Mean length of the fastest 5 % of a flow (N, 2, pH, pW), in its unit, (N,)."""
    lengths = flow.norm(dim=1).flatten(1)
    count = max(1, int(lengths.shape[1] * FASTEST_SHARE))
    return lengths.topk(count, dim=1).values.mean(1)


def is_dynamic(pixels: Tensor, size: tuple[int, int], *, fps: float, num_frames: int) -> bool:
    """Whether enough frames move fast enough.

    Args:
        pixels: `fastest_pixels` of every pair of frames, (n,).
        size: Height and width of a frame.
        fps: Frames a second of the film.
        num_frames: Frames looked at.
    """
    threshold = max(1.0, FLOW_FPS / fps) * DYNAMIC_PIXELS * min(size) / 256
    return int((pixels > threshold).sum()) >= round(DYNAMIC_FRAMES * num_frames)


def consistency(features: Tensor) -> float:
    """Mean over frames from the second on of (cosine with the frame before + cosine with the first) / 2.

    Args:
        features: Of every frame, (pT, E); negative cosines count as 0.

    Returns:
        A value in [0, 1]; 1 for a single frame.
    """
    if len(features) < 2:
        return 1.0
    unit = F.normalize(features.double(), dim=-1)
    before = (unit[1:] * unit[:-1]).sum(-1).clamp(min=0)
    first = (unit[1:] @ unit[0]).clamp(min=0)
    return ((before + first) / 2).mean().item()


# --- backbones -----------------------------------------------------------------------------------------------


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
        _check_kind(folder, "vit", "a DINO vision transformer")
        from transformers import ViTModel

        self.description = _describe(folder)
        self._model = _load(ViTModel, folder, device, add_pooling_layer=False)

    @torch.inference_mode()
    def score(self, frames: np.ndarray, *, fps: float) -> float:
        """Consistency of the class tokens."""
        device = self._model.device
        features = []
        for start in range(0, len(frames), BATCH_SIZE):
            pictures = _prepare(frames[start : start + BATCH_SIZE], "bilinear", *_IMAGENET).to(device)
            out = self._model(pixel_values=pictures, interpolate_pos_encoding=True)
            features.append(out.last_hidden_state[:, 0].float().cpu())
        return consistency(torch.cat(features))


class ClipBackbone(Backbone):
    """Image embedding of CLIP: background consistency."""

    def __init__(self, folder: Path, device: str) -> None:
        _check_kind(folder, "clip", "a CLIP model")
        from transformers import CLIPVisionModelWithProjection

        self.description = _describe(folder)
        self.width = read_json(folder / "config.json", "a configuration").get("projection_dim", 512)
        self._model = _load(CLIPVisionModelWithProjection, folder, device, projection_dim=self.width)
        self.side = self._model.config.image_size

    def embed(self, frames: np.ndarray) -> Tensor:
        """Embeddings of frames, (pT, E) float32."""
        parts = (frames[start : start + BATCH_SIZE] for start in range(0, len(frames), BATCH_SIZE))
        pictures = (_centre(_prepare(part, "bicubic", *_CLIP, side=self.side), self.side) for part in parts)
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
        self.description += f", head {_hash(head)}"

    def score(self, frames: np.ndarray, *, fps: float) -> float:
        """Mean of the head over the frames."""
        embedded = F.normalize(self.embed(frames), dim=-1)
        return ((embedded @ self._weight + self._bias) / AESTHETIC_SCALE).mean().item()


class RaftBackbone(Backbone):
    """Optical flow of torchvision's RAFT: dynamic degree, of the film as a whole as in VBench, cuts included."""

    def __init__(self, source: Path, device: str) -> None:
        try:
            from torchvision.models.optical_flow import raft_large
        except (ImportError, RuntimeError) as error:  # one made for another torch fails in its own way
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"RAFT's architecture comes from torchvision, which cannot be imported ({reason}): install the extra "
                "'vbench', in the version that fits this torch"
            ) from error
        file = _weight_file(source)
        tensors = _read_tensors(file)
        self._model = raft_large(weights=None, progress=False)
        try:
            self._model.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(
                f"'{file}' does not hold the weights of torchvision's raft_large: {_first_lines(error)}. The original "
                "RAFT names its weights otherwise; raft_large_C_T_V1 holds those of raft-things"
            ) from error
        self._model = self._model.eval().requires_grad_(False).to(device)
        self._device = device
        self.description = f"raft, weights {_hash(file)}"

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
            pictures = _pad_to_eighths(part.permute(0, 3, 1, 2).float() / 127.5 - 1).to(self._device)
            flow = self._model(pictures[:-1], pictures[1:], num_flow_updates=RAFT_UPDATES)[-1]
            pixels.append(fastest_pixels(flow.float().cpu()))
        return float(is_dynamic(torch.cat(pixels), size, fps=fps, num_frames=len(picked)))


class MusiqBackbone(Backbone):
    """Quality of single frames by pyiqa's MUSIQ: imaging quality."""

    def __init__(self, source: Path, device: str) -> None:
        try:
            from pyiqa.archs.musiq_arch import MUSIQ
        except Exception as error:  # it wants a transformers of its own, and fails in its own way with another
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"MUSIQ's architecture comes from pyiqa, which cannot be imported ({reason})") from error
        file = _weight_file(source)
        tensors = _read_tensors(file)
        self._model = MUSIQ(pretrained=False)
        try:
            self._model.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"'{file}' does not hold the weights of pyiqa's MUSIQ: {_first_lines(error)}") from error
        self._model = self._model.eval().requires_grad_(False).to(device)
        self._device = device
        self.description = f"musiq, weights {_hash(file)}"

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


class ViclipBackbone(PromptBackbone):
    """ViCLIP: a file of its weights beside the files of CLIP's tokenizer."""

    def __init__(self, folder: Path, device: str) -> None:
        if not folder.is_dir():
            raise ValueError(f"'{folder}' is a file: name the folder with the weights and CLIP's tokenizer")
        file = _weight_file(folder)
        tensors = _read_tensors(file)
        try:
            self._model = ViCLIP(tensors)
        except ValueError as error:
            raise ValueError(f"'{file}': {error}") from error
        self._model = self._model.eval().requires_grad_(False).to(device)
        self._tokenizer = _load_tokenizer(folder, self._model.num_words)
        self._device = device
        self.description = f"viclip, weights {_hash(file)}"

    @torch.inference_mode()
    def agreement(self, frames: np.ndarray, prompt: str) -> float:
        """Cosine of both embeddings."""
        model = self._model
        pictures = _prepare_for_prompt(frames, model.num_frames, model.image_size).to(self._device)
        tokens = torch.zeros(1, model.num_tokens, dtype=torch.long)
        words = _tokens(self._tokenizer, prompt, model.num_tokens)
        tokens[0, : len(words)] = torch.tensor(words)
        video, text = model.embed_videos(pictures.transpose(0, 1)[None]), model.embed_texts(tokens.to(self._device))
        return F.cosine_similarity(video.float(), text.float()).item()


class ClipPromptBackbone(PromptBackbone):
    """A CLIP in place of ViCLIP: the mean of the embeddings of single frames, which knows nothing of motion."""

    def __init__(self, folder: Path, device: str) -> None:
        from transformers import CLIPTextModelWithProjection

        self._vision = ClipBackbone(folder, device)
        width = self._vision.width
        self._text = _load(CLIPTextModelWithProjection, folder, device, projection_dim=width)
        self._tokenizer = _load_tokenizer(folder, self._text.config.vocab_size)
        self.description = f"{self._vision.description}, mean of {CONSISTENCY_FRAMES} single frames"

    @torch.inference_mode()
    def agreement(self, frames: np.ndarray, prompt: str) -> float:
        """Cosine of the mean of the frames' unit embeddings and that of the prompt."""
        pictures = _prepare_for_prompt(frames, CONSISTENCY_FRAMES, self._vision.side)
        video = F.normalize(self._vision.embed_pictures(pictures), dim=-1).mean(0)
        words = _tokens(self._tokenizer, prompt, self._text.config.max_position_embeddings)
        text = self._text(input_ids=torch.tensor([words], device=self._text.device)).text_embeds[0].float().cpu()
        return F.cosine_similarity(video, text, dim=0).item()


def _prompt_backbone(source: Path, device: str) -> PromptBackbone:
    """ViCLIP, or a CLIP if the folder says that it holds one."""
    is_clip = source.is_dir() and (source / "config.json").is_file()
    return ClipPromptBackbone(source, device) if is_clip else ViclipBackbone(source, device)


BACKBONE_KINDS: Mapping[str, Callable[[Path, str], Backbone]] = {
    "subject_consistency": DinoBackbone,
    "background_consistency": ClipBackbone,
    "aesthetic_quality": AestheticBackbone,
    "dynamic_degree": RaftBackbone,
    "imaging_quality": MusiqBackbone,
    "overall_consistency": _prompt_backbone,
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
        raise ValueError(f"no backbone can be given for {dimension!r}, choose from {', '.join(BACKBONE_KINDS)}")
    try:
        place = Path(source).expanduser() if Path(source).expanduser().is_file() else resolve_model(source)
        return BACKBONE_KINDS[dimension](place, device)
    except FileNotFoundError as error:
        raise ValueError(f"'{source}' is neither a folder nor a model of the hub: {error}") from error


def _check_kind(folder: Path, kind: str, wanted: str) -> None:
    """Refuse a folder that is not a network of a kind, by the type its configuration names."""
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"'{folder}' is not {wanted}: it has no config.json")
    found = read_json(config, "a configuration").get("model_type")
    if found != kind:
        raise ValueError(f"'{folder}' is not {wanted}: its model_type is {found!r}, expected {kind!r}")
    if not list(folder.glob("*.safetensors")):
        raise ValueError(f"'{folder}' has no weights in safetensors; other formats are not loaded")


def _load(model_class: Any, folder: Path, device: str, **options: Any) -> Any:
    """A network with every weight from the folder; transformers would make up those that are missing."""
    from transformers.utils import logging

    verbosity, shows_progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # what is missing is reported below, and a text tower that is left out is no news
    logging.disable_progress_bar()
    try:
        model, info = model_class.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True, **options
        )
    except Exception as error:  # errors of several libraries
        raise ValueError(f"cannot load '{folder}': {str(error).strip().splitlines()[0][:200]}") from error
    finally:
        logging.set_verbosity(verbosity)
        if shows_progress:
            logging.enable_progress_bar()
    missing = [*info["missing_keys"], *map(str, info.get("mismatched_keys", ()))]
    if missing:
        raise ValueError(f"'{folder}' lacks {len(missing)} weights, such as {sorted(missing)[0]}")
    return model.eval().requires_grad_(False).to(device)


def _weight_file(source: Path) -> Path:
    """The file itself, or the only file of weights in a folder."""
    if source.is_file():
        return source
    files = sorted(file for file in source.iterdir() if file.suffix in (".safetensors", ".pth", ".pt"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise ValueError(f"'{source}' must hold one file of weights (.safetensors, .pth), found {found}: name the file")
    return files[0]


def _read_tensors(file: Path) -> dict[str, Tensor]:
    """Tensors by name; nothing in the file is run."""
    try:
        if file.suffix == ".safetensors":
            tensors = safetensors.torch.load(file.read_bytes())
        else:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"'{file}' is damaged, or holds more than weights: {_first_lines(error)}") from error
    if isinstance(tensors, dict) and isinstance(tensors.get("model"), dict):  # as ViCLIP's are stored
        tensors = tensors["model"]
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"'{file}' must hold tensors by name, and nothing else")
    return tensors


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


def _load_tokenizer(folder: Path, num_words: int) -> Any:
    """CLIP's tokenizer, from the files of transformers in a folder."""
    from transformers import CLIPTokenizer

    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        raise ValueError(f"'{folder}' has no tokenizer: put CLIP's vocab.json and merges.txt, or tokenizer.json, there")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # errors of several libraries
        raise ValueError(f"cannot load the tokenizer in '{folder}': {_first_lines(error)}") from error
    if len(tokenizer) > num_words:
        raise ValueError(f"the tokenizer in '{folder}' has {len(tokenizer)} tokens, the network {num_words}")
    return tokenizer


def _tokens(tokenizer: Any, prompt: str, longest: int) -> list[int]:
    """Tokens of a prompt with start and end; of a longer one the first ones, and the end."""
    tokens = tokenizer(prompt)["input_ids"]
    return tokens if len(tokens) <= longest else [*tokens[: longest - 1], tokens[-1]]


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _pad_to_eighths(pictures: Tensor) -> Tensor:
    """Pictures (n, 3, h, w) with sides that are multiples of 8, edges repeated on both sides alike."""
    down, right = (-length % 8 for length in pictures.shape[-2:])
    return F.pad(pictures, (right // 2, right - right // 2, down // 2, down - down // 2), mode="replicate")


def _describe(folder: Path) -> str:
    """Kind, sizes and hash of the weights; VBench's own figures hold for VBench's weights only."""
    config = read_json(folder / "config.json", "a configuration")
    sizes = config.get("vision_config", config)
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    names = ("num_hidden_layers", "hidden_size", "patch_size")
    layers, width, patch = (sizes.get(name, "?") for name in names)
    return f"{config['model_type']}, {layers} layers of {width}, patch {patch}, weights {digest.hexdigest()[:12]}"


def _prepare(
    frames: np.ndarray,
    mode: str,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    *,
    side: int = INPUT_SIDE,
    in_levels: bool = False,
) -> Tensor:
    """Frames (n, pH, pW, 3) uint8 to normalised pictures (n, 3, h, w) whose shorter side is `side`.

    As torchvision does it for VBench: without anti-aliasing, and what bicubic filtering makes of edges is not clamped
    unless the result is to be `in_levels`, as that of pictures in uint8 is.
    """
    pictures = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()
    height, width = pictures.shape[-2:]
    size = (side, side * width // height) if height <= width else (side * height // width, side)
    pictures = F.interpolate(pictures, size=size, mode=mode, align_corners=False)
    pictures = (pictures.clamp(0, 255).round() if in_levels else pictures) / 255
    shape = (1, 3, 1, 1)
    return (pictures - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)


def _prepare_for_prompt(frames: np.ndarray, count: int, side: int) -> Tensor:
    """The middle frame of each of `count` parts of a shot, the last again if it has fewer, (count, 3, side, side)."""
    ends = np.linspace(0, len(frames), min(count, len(frames)) + 1).astype(int)
    middle = [(start + end - 1) // 2 for start, end in pairwise(ends)]
    picked = frames[[*middle, *middle[-1:] * (count - len(middle))]]
    return _centre(_prepare(picked, "bicubic", *_CLIP, side=side, in_levels=True), side)


def _centre(pictures: Tensor, side: int) -> Tensor:
    """The middle (side, side) of pictures (n, 3, h, w), where torchvision finds it: halves are rounded to even."""
    top, left = (round((length - side) / 2) for length in pictures.shape[-2:])
    return pictures[..., top : top + side, left : left + side]
