"""Pictures and videos that a film is given: how they are checked, what becomes of them, and where they are kept.

    image        the first frame of a shot that starts a take
    video        a shot that starts a take goes on from the end of a video, whose last frames it begins with
    end_image    the last frames of a shot

Each is scaled until it covers the frame and cut to its centre, never stretched, and encoded once, before a run starts.
Its latent frames are kept in the run folder (`references.safetensors`), so that a film can be gone on with, changed and
verified where the files are gone. They are held clean while the segment around them is made. The code model goes on
from the codes of what a take begins with, so that codes and frames agree: the complete code frames of a video, one code
frame of an image that stands still.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from pipelines.plan import Plan
from pipelines.runs.run_folder import RunFolder
from pipelines.storyboard import REFERENCE_KINDS, Storyboard, StoryboardError

if TYPE_CHECKING:
    from arlon.data.transforms import CoverFit
    from pipelines.requests import Job

Kind = Literal["image", "end_image", "video"]
CODES = "codes"
"""Name, beside those of `Kind`, under which the code frames are kept that a take begins with."""
MAX_PIXELS = 100_000_000
MARGIN_FRAMES = 8
"""How much more of the end of a video is read than is needed: its frames are counted by its mean rate."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A file that a shot is given, checked."""

    shot: int
    kind: Kind
    path: Path
    fit: CoverFit
    num_frames: int
    """Frames of a video at the rate of the film; 1 of an image."""
    note: str = ""
    """How much of a video is used, in words."""

    def describe(self) -> str:
        """What becomes of it, in words."""
        note = f", {self.note}" if self.note else ""
        return f"shot {self.shot + 1} {self.kind}: {self.path.name}, {self.fit.describe()}{note}"


def check_references(plan: Plan, *, first_shot: int = 0) -> tuple[Reference, ...]:
    """Look at every file that a storyboard names, from a shot on.

    Raises:
        StoryboardError: With every problem: a file that is missing, is no picture or video, or stands where it cannot.
    """
    problems = reference_problems(plan.storyboard)
    found = []
    for shot, kind, path in _named(plan.storyboard):
        if shot < first_shot:
            continue
        try:
            found.append(_check(plan, shot, kind, Path(path).expanduser()))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            problems.append(f"shots[{shot}].{kind} '{path}': {reason}")
    if problems:
        raise StoryboardError(problems)
    return tuple(found)


def reference_problems(storyboard: Storyboard) -> list[str]:
    """What is wrong with where a storyboard has its references; no file is looked at."""
    problems = []
    for index, shot in enumerate(storyboard.shots):
        starts_take = index == 0 or shot.transition == "cut"
        if shot.image and shot.video:
            problems.append(f"shots[{index}] has an image and a video to begin with: give one of them")
        for kind in ("image", "video"):
            if getattr(shot, kind) and not starts_take:
                problems.append(
                    f"shots[{index}].{kind}: this shot goes on from the one before it; "
                    "give it `transition: cut` to begin with something else"
                )
    return problems


def reference_names(storyboard: Storyboard) -> list[str]:
    """Keys of the files that a storyboard names, each once."""
    return list(dict.fromkeys(kind for _, kind, _ in _named(storyboard)))


def _named(storyboard: Storyboard) -> list[tuple[int, Kind, str]]:
    return [
        (index, kind, path)
        for index, shot in enumerate(storyboard.shots)
        for kind in REFERENCE_KINDS
        if (path := getattr(shot, kind)) is not None
    ]


def _check(plan: Plan, shot: int, kind: Kind, path: Path) -> Reference:
    from arlon.data.transforms import plan_cover
    from arlon.data.video_io import probe
    from arlon.diffusion.references import given_span

    target = (plan.frame_fit.made_height, plan.frame_fit.made_width)
    if not path.is_file():
        raise FileNotFoundError("there is no such file" if not path.exists() else "this is no file")
    if kind != "video":
        fit = plan_cover(read_picture(path).shape[1:3], target)
        return Reference(shot=shot, kind=kind, path=path, fit=fit, num_frames=1)
    info = probe(path)
    num_frames = max(1, int(info.num_frames / info.fps * plan.fps + 1e-6))
    return Reference(
        shot=shot,
        kind=kind,
        path=path,
        fit=plan_cover((info.height, info.width), target),
        num_frames=num_frames,
        note=given_span(num_frames, plan.geometry.grid).describe(num_frames),
    )


def read_picture(path: Path) -> np.ndarray:
    """The frame (1, pH, pW, 3) uint8 of a picture file, turned as its camera was.

    Raises:
        ValueError: If it is no picture, or larger than `MAX_PIXELS`.
        OSError: If it cannot be read.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise ValueError(f"at most {MAX_PIXELS} pixels, got {picture.width} x {picture.height}")
                return np.array(ImageOps.exif_transpose(picture).convert("RGB"))[None]
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, EOFError) as error:
        raise ValueError("this is no picture that can be read, such as a PNG or a JPEG") from error
    except OSError as error:
        raise ValueError(f"the picture cannot be read: {error.strerror or error}") from error


@torch.inference_mode()
def encode_references(job: Job, references: Sequence[Reference]) -> dict[str, Tensor]:
    """Latent frames (1, C, n, H, W) float32 by `SHOT/KIND`, and code frames (1, n, cH, cW) int64 by `SHOT/codes`."""
    from arlon.diffusion.references import encode_continued, encode_end_image, encode_image
    from arlon.models.video_vae import VideoVAE
    from pipelines.workers import torch_threads

    if not references:
        return {}
    grid, device = job.plan.geometry.grid, job.settings.device
    tensors: dict[str, Tensor] = {}
    with torch_threads(job.settings.num_threads):
        vae = VideoVAE.from_pretrained(job.component("vae")).to(device)

        def encode(video: Tensor) -> Tensor:
            return vae.encode(video.to(device), tile=job.settings.vae_tile)

        for given in references:
            video = _pixels(given, job.plan)
            if given.kind == "video":
                latent = encode_continued(encode, video, grid)
                codes = _codes(job, latent, latent.shape[2] // job.plan.geometry.code_ratio[0])
            elif given.kind == "image":
                latent = encode_image(encode, video, grid)
                still = encode(video.expand(-1, grid.chunk_frames, -1, -1)[None])
                codes = _codes(job, still, 1)
            else:
                latent, codes = encode_end_image(encode, video, grid), None
            tensors[f"{given.shot}/{given.kind}"] = latent.float().cpu().contiguous()
            if codes is not None:
                tensors[f"{given.shot}/{CODES}"] = codes.cpu().contiguous()
    return tensors


def _pixels(given: Reference, plan: Plan) -> Tensor:
    """Video (3, pT, pH, pW) in [-1, 1] of the size at which the film is computed."""
    from arlon.data.transforms import resize_and_crop
    from arlon.data.video_io import read_video
    from arlon.diffusion.references import given_span

    size = {"height": plan.frame_fit.made_height, "width": plan.frame_fit.made_width}
    if given.kind != "video":
        return resize_and_crop(read_picture(given.path), **size, filter="bicubic")
    needed = given_span(given.num_frames, plan.geometry.grid).frames
    start = max(0, given.num_frames - needed - MARGIN_FRAMES)
    return resize_and_crop(read_video(given.path, start=start, fps=plan.fps)[-needed:], **size)


def _codes(job: Job, latent: Tensor, count: int) -> Tensor | None:
    """The first `count` code frames of a latent; None without any, or for a base alone."""
    if not job.plan.geometry.has_codes or not count:
        return None
    from arlon.models.vqvae import LatentVQVAE

    vqvae = LatentVQVAE.from_pretrained(job.component("vqvae")).to(job.settings.device)
    return vqvae.encode(latent.float())[:, :count]


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a shot is given."""

    head: Tensor | None = None
    """Its first latent frames, (1, C, n, H, W)."""
    tail: Tensor | None = None
    """Its last latent frames, (1, C, n, H, W)."""
    codes: Tensor | None = None
    """The code frames that its take begins with, (1, n, cH, cW) int64."""


NOTHING = Given()


def read_given(job: Job) -> Mapping[int, Given]:
    """What the shots of a film are given, by shot, from its run folder.

    Raises:
        FileNotFoundError, RunFolderError: If that is not there, or damaged.
    """
    named = _named(job.plan.storyboard)
    if not named:
        return {}
    tensors = RunFolder(job.run_dir).read_references()
    shots = dict.fromkeys(shot for shot, _, _ in named)

    def of(shot: int, name: str) -> Any:
        return tensors.get(f"{shot}/{name}")

    return {
        shot: Given(
            head=of(shot, "image") if of(shot, "video") is None else of(shot, "video"),
            tail=of(shot, "end_image"),
            codes=of(shot, CODES),
        )
        for shot in shots
    }
