"""Pictures: one frame from one prompt, made in this process as a PNG, without a run folder.

The diffusion transformer makes one latent frame, under the frame rate that stands for pictures (Open-Sora v1.2), and
the VAE decodes it as one frame. A model with codes writes one frame of codes first. The PNG carries its record as a
film does, under the same key.
"""

from __future__ import annotations

import io
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from arlon.files import make_folder, write_bytes
from arlon.film.media import reference_names
from arlon.film.messages import Job, TextRequest
from arlon.film.plan import clip_plan
from arlon.film.prepare import make_settings, plan_film
from arlon.film.record import film_record, film_tags
from arlon.film.schedule import film_requests
from arlon.film.storyboard import Storyboard, UsageError
from arlon.film.workers import CodeWorker, DecodeWorker, RefineWorker, TextWorker, torch_threads
from pipelines.deliver.paths import check_output_folder, slug

SUFFIX = ".png"


@dataclass(frozen=True, kw_only=True)
class PreparedPicture:
    """A picture that can be made, because it has passed every check."""

    job: Job
    path: Path
    record: dict[str, Any]
    """What the picture is made from."""
    tags: Mapping[str, str]
    """Metadata that is written into the picture."""


@dataclass(frozen=True, kw_only=True)
class PictureResult:
    """A finished picture."""

    picture: Path
    seed: int
    elapsed_s: float

    def to_plain(self) -> dict[str, Any]:
        """Convert to plain values for JSON."""
        return {"picture": str(self.picture), "seed": self.seed, "elapsed_s": self.elapsed_s}


def is_picture(storyboard: Storyboard, output: str | Path | None) -> bool:
    """Whether a storyboard asks for a picture: one shot of one frame.

    Raises:
        UsageError: If the name of the output says otherwise.
    """
    is_one = len(storyboard.shots) == 1 and storyboard.shots[0].duration.frames == 1
    output = Path("" if output is None else output)
    suffix = output.suffix.lower()
    if suffix == SUFFIX and not is_one:
        raise UsageError(
            f"'{output}' would be a picture, which is one frame of one prompt: give --num-frames 1, or name a film .mp4"
        )
    if is_one and suffix not in ("", SUFFIX):
        raise UsageError(f"one frame is a picture: name the output '{output.with_suffix(SUFFIX)}'")
    return is_one


def check_picture(storyboard: Storyboard) -> None:
    """Refuse a storyboard whose shot names pictures or videos, which one frame has no room for.

    Raises:
        UsageError: If it does.
    """
    if kinds := reference_names(storyboard):
        raise UsageError(f"a picture is made from its prompt alone: leave out {', '.join(kinds)}")


def prepare_picture(
    storyboard: Storyboard,
    *,
    model: str | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    settings: Mapping[str, Any] | None = None,
    metadata: bool = True,
) -> PreparedPicture:
    """Check everything that can be checked before a picture is made.

    Args:
        storyboard: The picture, one shot of one frame.
        model: Name or path of the model. Default: the one that the storyboard names, or `shapes`.
        output: Path of the picture (`.png`) or of a folder. Default: a file under `outputs`.
        overwrite: Whether a file that is already there may be replaced.
        settings: Values of `Settings` that differ from the model's.
        metadata: Whether to store the record in the picture.

    Raises:
        UsageError: If something asked for is not possible.
        OSError: If the output cannot be written.
        CheckpointError: If the model is damaged.
    """
    check_picture(storyboard)
    planned = plan_film(storyboard, model)
    plan = clip_plan(planned.plan, 1)
    checked = make_settings(plan.geometry, settings or {})
    film = plan.storyboard
    path = Path("outputs") / f"{slug(film.shots[0].prompt)}-{film.seed}{SUFFIX}" if output is None else Path(output)
    path = path.expanduser() if path.suffix else path.expanduser() / f"picture{SUFFIX}"
    if path.is_dir() or (path.exists() and not overwrite):
        raise UsageError(f"'{path}' exists: choose another --output, or replace it with --overwrite")
    check_output_folder(path.parent)
    record = film_record(plan, planned.identity, checked)
    job = Job(
        plan=plan,
        settings=checked,
        model_path=str(planned.model.path.resolve()),
        model_hash=planned.identity["hash"],
    )
    tags = film_tags(record, film.shots[0].prompt) if metadata else {}
    return PreparedPicture(job=job, path=path, record=record, tags=tags)


def make_picture(prepared: PreparedPicture) -> PictureResult:
    """Make a picture; the file appears complete."""
    started_s = time.perf_counter()
    job = prepared.job
    request = next(iter(film_requests(job)))
    with torch_threads(job.settings.num_threads):
        prompts = tuple(dict.fromkeys((*request.code.prompts, *request.refine.prompts)))
        text = TextWorker(job).run(TextRequest(prompts=prompts))
        codes = CodeWorker(job).run(replace(request.code, text=text))
        refined = RefineWorker(job).run(replace(request.refine, text=text, codes=codes))
        frames = DecodeWorker(job).run(replace(request.decode, refined=refined)).frames
    make_folder(prepared.path.parent)
    write_bytes(prepared.path, _png(frames[0], prepared.tags))
    seed = job.plan.storyboard.seed
    return PictureResult(picture=prepared.path, seed=seed, elapsed_s=time.perf_counter() - started_s)


def _png(frame: np.ndarray, tags: Mapping[str, str]) -> bytes:
    """Encode a frame (pH, pW, 3) uint8 as PNG, with tags as text chunks."""
    info, buffer = PngInfo(), io.BytesIO()
    for name, text in tags.items():
        info.add_itxt(name, text)
    Image.fromarray(frame).save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()
