"""Training clips from the video files of a manifest."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from arlon.data.manifest import Clip, ManifestError, read_manifest
from arlon.data.transforms import resize_and_crop

log = logging.getLogger(__name__)


class VideoClips(Dataset):
    """Windows of `num_frames` frames at `fps`, cut side by side out of every file of a manifest.

    A sample is {"video": (3, pT, pH, pW) float32 in [-1, 1], "caption": str, "fps": float}. Sample i is
    always the same. Files are resampled by the clock, scaled with their aspect ratio kept, and cropped at the
    centre. What is left at the end of a file is not used; files shorter than one window are left out, with
    one warning for all of them. A picture is a window of one frame.
    """

    def __init__(
        self, manifest: str | Path | Sequence[Clip], *, num_frames: int, height: int, width: int, fps: float
    ) -> None:
        """Read the manifest and count the windows.

        Args:
            manifest: A manifest file (validated, each video opened), or clips.
            num_frames: Frames of a sample.
            height: Pixels.
            width: Pixels.
            fps: Frames a second of a sample.

        Raises:
            FileNotFoundError: If there is no such manifest.
            ManifestError: If the manifest is not usable, or no file is long enough.
            ValueError: If a size is not positive.
        """
        if min(num_frames, height, width) < 1 or not fps > 0:
            raise ValueError(
                f"num_frames, height, width and fps must be positive, got {num_frames}, {height}, {width} and {fps}"
            )
        self.num_frames, self.height, self.width, self.fps = num_frames, height, width, float(fps)
        clips = read_manifest(manifest) if isinstance(manifest, str | Path) else list(manifest)
        self._windows = [(clip, k * num_frames) for clip in clips for k in range(self._count(clip))]
        short = sum(self._count(clip) == 0 for clip in clips)
        if not self._windows:
            raise ManifestError(
                f"none of {len(clips)} clips is long enough for {num_frames} frames at {fps:g} fps "
                f"({num_frames / fps:.2f} s): use longer clips or fewer frames"
            )
        if short:
            log.warning("%d of %d clips are shorter than %.2f s: left out", short, len(clips), num_frames / fps)

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the content of the samples, for caches: settings and a hash of files and captions.

        Files are known by path, size on disk and modification time, not by content.
        """
        files = {clip.path: clip.path.stat() for clip, _ in self._windows}
        rows = [
            (str(c.path), c.text, start, files[c.path].st_size, files[c.path].st_mtime_ns) for c, start in self._windows
        ]
        settings = {name: getattr(self, name) for name in ("num_frames", "height", "width", "fps")}
        return {**settings, "files": hashlib.sha256(json.dumps(rows).encode()).hexdigest()}

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Decode sample `index`.

        Raises:
            IndexError: If there is no such sample.
            ValueError: If the file cannot be read; the message names it.
        """
        clip, start = self._windows[index]
        frames = clip.read(start=start, num_frames=self.num_frames, fps=self.fps)
        video = resize_and_crop(frames, height=self.height, width=self.width, filter=clip.filter)
        return {"video": video, "caption": clip.text, "fps": self.fps}

    def _count(self, clip: Clip) -> int:
        """Whole windows in a clip; the small term keeps an exact fit in spite of rounding."""
        if clip.is_picture_file:
            return int(self.num_frames == 1)
        return int(clip.num_frames / clip.fps * self.fps + 1e-6) // self.num_frames
