"""The folder of one run: everything a film is made from, in files that appear whole or not at all.

    run.json                     the resolved storyboard, the plan, the model's hash, settings, versions
    codes.safetensors            codes of every take: take_0000 (1, cT, cH, cW) int32, ...
    segments/0007/
        latents.safetensors      latent (1, C, T, H, W) float32 of the new latent frames
        fragment.mp4             the new video frames; plays by itself
        segment.json             hashes of all inputs and outputs; written last, it is the commit
    events.jsonl                 what happened when, one JSON object a line
    film.mp4, film.json          the film and its sidecar, where no other place was asked for

A file is written under a temporary name, flushed to disk and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

FORMAT = 1
RUN_NAME = "run.json"
CODES_NAME = "codes.safetensors"
EVENTS_NAME = "events.jsonl"
SEGMENTS_NAME = "segments"
LATENTS_NAME = "latents.safetensors"
FRAGMENT_NAME = "fragment.mp4"
SEGMENT_NAME = "segment.json"


class RunFolderError(ValueError):
    """A run folder that is damaged or does not hold what was asked for."""


@dataclass(frozen=True, kw_only=True)
class SegmentRecord:
    """What `segment.json` says."""

    index: int
    inputs: dict[str, Any]
    """Everything the segment was made from, large things by their hash."""
    outputs: dict[str, str]
    """SHA-256 of each file beside it."""


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file that appears complete or not at all: temporary name beside it, fsync, rename."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file, as `write_bytes` does."""
    write_bytes(path, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())


def hash_bytes(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def hash_tensor(tensor: Tensor) -> str:
    """SHA-256 over type, shape and content of a tensor of any device."""
    tensor = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


class RunFolder:
    """Reading and writing of one run folder.

    Args:
        path: The folder. It is not touched before something is written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def has_run(self) -> bool:
        """Whether a run was started here."""
        return (self.path / RUN_NAME).exists()

    def start(self, record: Mapping[str, Any]) -> None:
        """Make the folder ready for a new run: remove an earlier run, write `run.json`."""
        self.discard()
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / RUN_NAME, {"format": FORMAT, **record})

    def discard(self) -> None:
        """Remove the run, and the folder if nothing else is in it; a folder without a run is left alone."""
        if not self.has_run():
            return
        if (self.path / SEGMENTS_NAME).is_dir():
            shutil.rmtree(self.path / SEGMENTS_NAME)
        for name in (CODES_NAME, EVENTS_NAME, RUN_NAME):  # run.json last: until then this is a run
            (self.path / name).unlink(missing_ok=True)
        with suppress(OSError):  # not empty, or where we are
            self.path.rmdir()

    def read_run(self) -> dict[str, Any]:
        """Content of `run.json`.

        Raises:
            FileNotFoundError: If there is none.
            RunFolderError: If it is damaged or of another format.
        """
        return self._read_json(self.path / RUN_NAME)

    def write_codes(self, codes: Mapping[int, Tensor]) -> None:
        """Store the codes (1, cT, cH, cW) of all takes, by take."""
        tensors = {f"take_{take:04d}": c.to(torch.int32).contiguous() for take, c in codes.items()}
        write_bytes(self.path / CODES_NAME, safetensors.torch.save(tensors))

    def read_codes(self) -> dict[int, Tensor]:
        """Codes (1, cT, cH, cW) int64 of all takes, by take.

        Raises:
            FileNotFoundError: If they were not written yet.
            RunFolderError: If the file is damaged.
        """
        tensors = _load_tensors(self.path / CODES_NAME)
        return {int(name.removeprefix("take_")): codes.long() for name, codes in sorted(tensors.items())}

    def segment_dir(self, index: int) -> Path:
        """Folder of a segment."""
        return self.path / SEGMENTS_NAME / f"{index:04d}"

    def commit_segment(
        self, index: int, *, latent: Tensor, fragment: bytes, inputs: Mapping[str, Any]
    ) -> SegmentRecord:
        """Store a segment; it counts once this returns.

        Args:
            index: Of the segment in the film.
            latent: New latent frames, (1, C, T, H, W).
            fragment: The encoded new video frames.
            inputs: Everything the segment was made from, as plain values.
        """
        folder = self.segment_dir(index)
        folder.mkdir(parents=True, exist_ok=True)
        files = {
            LATENTS_NAME: safetensors.torch.save({"latent": latent.detach().float().cpu().contiguous()}),
            FRAGMENT_NAME: fragment,
        }
        for name, data in files.items():
            write_bytes(folder / name, data)
        outputs = {name: hash_bytes(data) for name, data in files.items()}
        record = SegmentRecord(index=index, inputs=dict(inputs), outputs=outputs)
        values = {"format": FORMAT, "index": index, "inputs": record.inputs, "outputs": outputs}
        write_json(folder / SEGMENT_NAME, values)
        return record

    def has_segment(self, index: int) -> bool:
        """Whether a segment is committed."""
        return (self.segment_dir(index) / SEGMENT_NAME).exists()

    def read_segment(self, index: int, *, verify: bool = True) -> SegmentRecord:
        """The record of a committed segment.

        Args:
            index: Of the segment in the film.
            verify: Hash its files again and refuse a difference.

        Raises:
            FileNotFoundError: If it is not committed.
            RunFolderError: If the record or a file is damaged.
        """
        folder = self.segment_dir(index)
        values = self._read_json(folder / SEGMENT_NAME)
        for name, stored in values["outputs"].items() if verify else ():
            if not (folder / name).is_file() or hash_bytes((folder / name).read_bytes()) != stored:
                raise RunFolderError(f"'{folder / name}' is missing or differs from its record: make it again")
        return SegmentRecord(index=values["index"], inputs=values["inputs"], outputs=values["outputs"])

    def read_latent(self, index: int) -> Tensor:
        """New latent frames (1, C, T, H, W) float32 of a committed segment.

        Raises:
            FileNotFoundError: If there are none.
            RunFolderError: If the file is damaged.
        """
        return _load_tensors(self.segment_dir(index) / LATENTS_NAME)["latent"]

    def log(self, event: str, **values: Any) -> None:
        """Add a line to `events.jsonl`."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **values}, ensure_ascii=False)
        with (self.path / EVENTS_NAME).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _read_json(self, path: Path) -> dict[str, Any]:
        if not path.is_file():
            raise FileNotFoundError(f"no {path.name} in '{path.parent}'")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunFolderError(f"'{path}' is not valid JSON: {error}") from error
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise RunFolderError(f"'{path}' has not the format {FORMAT} that this version reads")
        return values


def _load_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in '{path.parent}'")
    try:
        return safetensors.torch.load(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise RunFolderError(f"'{path}' is damaged or cut off: {error}") from error
