"""Takes: training videos without a cut, whose caption may change at a known frame.

Every stage learns from takes. Shapes world renders them; a manifest of one's own clips gives takes of one
caption. Take `i` of a source is always the same, in whatever order takes are asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from arlon.data.transforms import frames_to_video, video_to_frames
from arlon.errors import did_you_mean
from arlon.grids import CHUNK_FRAMES
from arlon.shapes import captions
from arlon.shapes import world as shapes_world


@dataclass(frozen=True, kw_only=True)
class CaptionSpan:
    """Captions that each describe a take from video frame `start_frame` on."""

    start_frame: int
    captions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Take:
    """A training video (3, pT, pH, pW) in [-1, 1] at `fps`, and its captions; the first starts at frame 0."""

    video: Tensor
    spans: tuple[CaptionSpan, ...]
    fps: float


class TakeSource(Protocol):
    """A numbered set of takes of one size; `identity` (JSON-able) decides their content, not their number."""

    @property
    def identity(self) -> Mapping[str, Any]: ...

    def __len__(self) -> int: ...

    def take(self, index: int) -> Take: ...


@dataclass(frozen=True, kw_only=True)
class ShapesTakesConfig:
    """Settings of the rendered takes of shapes world."""

    num_takes: int = 12000
    """Takes in the set. A larger number keeps the takes there were."""
    num_frames: int = 51
    """Video frames of a take, a multiple of 17."""
    height: int = 64
    """Pixels."""
    width: int = 64
    """Pixels."""
    fps: float = 8.0
    """Frames a second."""
    split: shapes_world.Split = "train"
    """`train` never shows the held-out attribute pairs and phrasings, `held_out` does."""
    seed: int = 0
    """Seed of the whole set; a validation set has another one."""
    switch_prob: float = 0.35
    """Probability of a prompt switch at each 17-frame border that may have one."""
    min_span_chunks: int = 2
    """Shortest stay after a switch, in 17-frame chunks: the new frames of one segment."""
    two_objects_prob: float = 0.3
    """Share of takes with two objects."""
    captions_per_shot: int = 2
    """Phrasings stored of each shot."""
    more_colours: bool = False
    """Objects have the colours of the whole palette, twice as many as prompts of the evaluation name."""
    more_shapes: bool = False
    """Objects have ten shapes instead of the four that prompts of the evaluation name."""

    def __post_init__(self) -> None:
        problems = []
        if self.num_frames < CHUNK_FRAMES or self.num_frames % CHUNK_FRAMES:
            problems.append(f"num_frames ({self.num_frames}) must be a positive multiple of {CHUNK_FRAMES}")
        if self.split not in ("train", "held_out"):
            problems.append(f"unknown split {self.split!r}, {did_you_mean(self.split, ('train', 'held_out'))}")
        if self.num_takes < 1 or self.captions_per_shot < 1 or self.min_span_chunks < 1:
            problems.append("num_takes, captions_per_shot and min_span_chunks must be at least 1")
        for name in ("switch_prob", "two_objects_prob"):
            if not 0 <= getattr(self, name) <= 1:
                problems.append(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if problems:
            raise ValueError("\n".join(problems))


class ShapesTakes:
    """Takes rendered from shapes world. Take i is drawn from a generator seeded by (seed, i)."""

    def __init__(self, config: ShapesTakesConfig) -> None:
        self.config = config

    def __len__(self) -> int:
        return self.config.num_takes

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The configuration, and a fingerprint that changes when the renderer or the grammar does."""
        settings = {name: value for name, value in asdict(self.config).items() if name != "num_takes"}
        for name in ("more_colours", "more_shapes"):
            if not settings[name]:  # sets made before there were more keep their identity
                del settings[name]
        digest = hashlib.sha256()
        for index in range(3):
            take = self.take(index)
            digest.update(np.moveaxis(video_to_frames(take.video), -1, 0).tobytes())  # colour by colour
            digest.update("\n".join(text for span in take.spans for text in span.captions).encode())
        return {"kind": "shapes_world", **settings, "fingerprint": digest.hexdigest()[:16]}

    def take(self, index: int) -> Take:
        """Render take `index`.

        Raises:
            IndexError: If there is no such take.
        """
        config = self.config
        if not 0 <= index < max(len(self), 3):
            raise IndexError(f"take {index} of a set of {len(self)}")
        rng = np.random.default_rng([config.seed, index])
        starts = self._span_starts(rng)
        ends = [*starts[1:], config.num_frames]
        scene = shapes_world.sample_scene(
            rng,
            seconds=[(end - start) / config.fps for start, end in zip(starts, ends, strict=True)],
            split=config.split,
            two_objects_prob=config.two_objects_prob,
            aspect=config.width / config.height,
            colours=tuple(shapes_world.PALETTE if config.more_colours else shapes_world.COLOURS),
            shapes=shapes_world.ALL_SHAPES if config.more_shapes else shapes_world.SHAPES,
        )
        rendered = shapes_world.render_scene(
            scene, height=config.height, width=config.width, fps=config.fps, num_frames=config.num_frames
        )
        spans = tuple(
            CaptionSpan(start_frame=start, captions=self._captions(rng, shot))
            for start, shot in zip(starts, scene.shots, strict=True)
        )
        return Take(video=frames_to_video(rendered.frames), spans=spans, fps=config.fps)

    def _span_starts(self, rng: np.random.Generator) -> list[int]:
        """First frame of each span: 17-frame borders, `min_span_chunks` chunks after each switch."""
        chunks, starts, chunk = self.config.num_frames // CHUNK_FRAMES, [0], 1
        while chunk + self.config.min_span_chunks <= chunks:
            switch = rng.random() < self.config.switch_prob
            if switch:
                starts.append(chunk * CHUNK_FRAMES)
            chunk += self.config.min_span_chunks if switch else 1
        return starts

    def _captions(self, rng: np.random.Generator, shot: shapes_world.Shot) -> tuple[str, ...]:
        texts = (captions.caption(shot, rng, self.config.split) for _ in range(self.config.captions_per_shot))
        return tuple(dict.fromkeys(texts))


class ClipDataset(Protocol):
    """Sample i is {"video": (3, pT, pH, pW) in [-1, 1], "caption": str, "fps": float}."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


class VideoTakes:
    """Takes from a data set of captioned clips, such as those of a manifest; none has a prompt switch."""

    def __init__(self, dataset: ClipDataset, identity: Mapping[str, Any]) -> None:
        """Wrap `dataset`; `identity` names its files and sizes, and changes when they do."""
        self._dataset, self.identity = dataset, {"kind": "clips", **identity}

    def __len__(self) -> int:
        return len(self._dataset)

    def take(self, index: int) -> Take:
        """Decode take `index`."""
        sample = self._dataset[index]
        span = CaptionSpan(start_frame=0, captions=(str(sample["caption"]),))
        return Take(video=sample["video"], spans=(span,), fps=float(sample["fps"]))
