"""The folder of one run: everything a film is made from, in files that appear whole or not at all.

    run.json                     the resolved storyboard, the plan, the model's hash, settings, versions
    references.safetensors       latent frames of the pictures and videos it was given, if any
    codes.safetensors            codes of every take: take_0000 (1, cT, cH, cW) int32, ...
    codes.jsonl                  codes written since; it goes when codes.safetensors has them all
    segments/0007/
        latents.safetensors      latent (1, C, T, H, W) float32 of the new latent frames
        fragment.mp4             the new video frames; plays by itself
        segment.json             hashes of all inputs and outputs; written last, it is the commit
    events.jsonl                 what happened when, one JSON object a line
    versions/0001/               what the run was before it was changed, as a run folder of its own
    run.lock                     there while a process works on the run
    writer.lock                  there while a Ray writer writes for it
    film.mp4, film.json          the film and its sidecar, where no other place was asked for

`run.json` and `segment.json` hold their own hash, so that a change by hand is noticed. See `docs/engine.md` for what is
on disk when, and `arlon.files` for how files get there.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from arlon.errors import ArlonError
from arlon.files import (
    append_line,
    hash_bytes,
    hash_file,
    hash_plain,
    hash_tensor,
    make_folder,
    read_lines,
    sweep,
    sync_folder,
    write_bytes,
    write_json,
)

FORMAT = 2
RUN_NAME = "run.json"
CODES_NAME = "codes.safetensors"
CODES_LOG_NAME = "codes.jsonl"
REFERENCES_NAME = "references.safetensors"
EVENTS_NAME = "events.jsonl"
SEGMENTS_NAME = "segments"
VERSIONS_NAME = "versions"
LATENTS_NAME = "latents.safetensors"
FRAGMENT_NAME = "fragment.mp4"
SEGMENT_NAME = "segment.json"
FRAMES = "frames"
"""Name of the hash of the frames among the outputs in `segment.json`; no file holds the frames themselves."""


class RunFolderError(ArlonError, ValueError):
    """A run folder that is damaged, was changed by hand, or does not hold what was asked for."""


@dataclass(frozen=True, kw_only=True)
class SegmentRecord:
    """Content of `segment.json`: what a segment was made from, and the hashes of what came out."""

    index: int
    """Number of the segment in the film, from 0."""
    inputs: dict[str, Any]
    """Everything that the segment was made from; tensors by their hash."""
    outputs: dict[str, str]
    """SHA-256 of each file of the segment, by name, and of its frames before they were encoded, as `FRAMES`.

    Records of the first version lack `FRAMES`.
    """
    look: dict[str, Any] = field(default_factory=dict)
    """Colour and contrast of the frames; see `arlon.film.appearance`."""


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

    def start(self, record: Mapping[str, Any], references: Mapping[str, Tensor] | None = None) -> None:
        """Make the folder ready for a new run: remove an earlier run, write what it is given, then `run.json`."""
        self.discard()
        make_folder(self.path)
        sweep([self.path], (RUN_NAME, REFERENCES_NAME))
        if references:
            self.write_references(references)
        self.write_run(record)

    def write_run(self, record: Mapping[str, Any]) -> None:
        """Write `run.json` in place of what it was."""
        write_json(self.path / RUN_NAME, _sealed({**record, "format": FORMAT}))

    def discard(self) -> None:
        """Remove the run, and the folder if nothing else is in it; a folder without a run is left alone."""
        if not self.has_run():
            return
        for name in (SEGMENTS_NAME, VERSIONS_NAME):
            if (self.path / name).is_dir():
                shutil.rmtree(self.path / name)
        # run.json last: until then this is a run
        for name in (CODES_LOG_NAME, CODES_NAME, REFERENCES_NAME, EVENTS_NAME, RUN_NAME):
            (self.path / name).unlink(missing_ok=True)
        with suppress(OSError):  # not empty, or where we are
            self.path.rmdir()

    def holds_work(self) -> bool:
        """Whether there are codes or segments to go on from."""
        has_codes = any((self.path / name).exists() for name in (CODES_NAME, CODES_LOG_NAME))
        return has_codes or next(self.committed_indices(), None) is not None

    def sweep(self) -> None:
        """Remove what a crash left: temporary files, and segments that were not committed."""
        segments = self.path / SEGMENTS_NAME
        folders = [f for f in segments.iterdir() if f.name.isdecimal()] if segments.is_dir() else []
        sweep([self.path], (RUN_NAME, CODES_NAME, CODES_LOG_NAME, REFERENCES_NAME))
        sweep([self.path / VERSIONS_NAME], [f"{number:04d}" for number in range(1, self.num_versions() + 2)])
        sweep(folders, (LATENTS_NAME, FRAGMENT_NAME, SEGMENT_NAME))
        for folder in folders:
            if not (folder / SEGMENT_NAME).exists():
                self._remove_files(folder)

    def is_ours(self) -> bool:
        """Whether `run.json` tells of a film, in whatever format."""
        try:
            values = json.loads((self.path / RUN_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(values, dict) and {"format", "storyboard"} <= values.keys()

    def read_run(self) -> dict[str, Any]:
        """Content of `run.json`.

        Raises:
            FileNotFoundError: If there is none.
            RunFolderError: If it is damaged, changed by hand or of another format.
        """
        return _read_sealed(self.path / RUN_NAME)

    # --- what it is given ------------------------------------------------------------------------------------

    def write_references(self, tensors: Mapping[str, Tensor]) -> None:
        """Store latent and code frames of what the film is given, by `SHOT/KIND`; see `arlon.film.take_media`."""
        plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
        data = safetensors.torch.save(plain, metadata={"sha256": _hash_tensors(plain)})
        write_bytes(self.path / REFERENCES_NAME, data)

    def has_references(self) -> bool:
        """Whether the film is given anything."""
        return (self.path / REFERENCES_NAME).exists()

    def read_references(self) -> dict[str, Tensor]:
        """What `write_references` stored.

        Raises:
            FileNotFoundError: If there is nothing.
            RunFolderError: If the file is damaged or was changed.
        """
        path = self.path / REFERENCES_NAME
        tensors = _load_tensors(path)
        with safetensors.safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("sha256") != _hash_tensors(tensors):
                raise RunFolderError(f"'{path}' was changed: its hash does not fit")
        return tensors

    # --- codes -----------------------------------------------------------------------------------------------

    def append_codes(self, take: int, start: int, codes: Tensor) -> None:
        """Store code frames (1, n, cH, cW) of a take, of which `start` are stored; they are kept from here on."""
        line = {"take": take, "start": start, "codes": codes[0].tolist()}
        append_line(self.path / CODES_LOG_NAME, line | {"sha256": hash_plain(line)}, sync=True)

    def has_logged_codes(self) -> bool:
        """Whether there are codes that are not in `codes.safetensors` yet."""
        return (self.path / CODES_LOG_NAME).exists()

    def write_codes(self, codes: Mapping[int, Tensor]) -> None:
        """Store the codes (1, cT, cH, cW) of all takes, by take, in one file in place of all stored before."""
        tensors = {f"take_{take:04d}": c.to(torch.int32).contiguous() for take, c in codes.items()}
        data = safetensors.torch.save(tensors, metadata={"sha256": _hash_codes(codes)})
        write_bytes(self.path / CODES_NAME, data)
        (self.path / CODES_LOG_NAME).unlink(missing_ok=True)
        sync_folder(self.path)

    def read_codes(self) -> dict[int, Tensor]:
        """Codes (1, n, cH, cW) int64 that are stored, by take.

        Raises:
            FileNotFoundError: If none were written yet.
            RunFolderError: If a file is damaged.
        """
        path, log = self.path / CODES_NAME, self.path / CODES_LOG_NAME
        if not path.exists() and not log.exists():
            raise FileNotFoundError(f"no {CODES_NAME} in '{self.path}'")
        codes: dict[int, Tensor] = {}
        if path.exists():
            tensors = _load_tensors(path)
            codes = {int(name.removeprefix("take_")): c.long() for name, c in sorted(tensors.items())}
            with safetensors.safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("sha256") != _hash_codes(codes):
                    raise RunFolderError(
                        f"'{path}' was changed: its hash does not fit; delete it to have it made again"
                    )
        for take, frames in self._logged_codes(codes).items():
            codes[take] = torch.stack(frames)[None]
        return dict(sorted(codes.items()))

    def _logged_codes(self, stored: Mapping[int, Tensor]) -> dict[int, list[Tensor]]:
        """Code frames (cH, cW) of every take that the log adds to; a line replaces what stood from its start on."""
        path = self.path / CODES_LOG_NAME
        takes: dict[int, list[Tensor]] = {}
        for line in read_lines(path):
            seal = line.pop("sha256", None)
            if hash_plain(line) != seal:
                raise RunFolderError(f"'{path}' was changed: a hash does not fit; delete it to have it made again")
            take, start = line["take"], line["start"]
            frames = takes.setdefault(take, list(stored[take][0]) if take in stored else [])
            if start > len(frames):
                raise RunFolderError(f"'{path}' lacks code frames of take {take}: delete it to have it made again")
            frames[start:] = torch.tensor(line["codes"], dtype=torch.int64)
        return takes

    # --- segments --------------------------------------------------------------------------------------------

    def segment_dir(self, index: int) -> Path:
        """Folder of a segment."""
        return self.path / SEGMENTS_NAME / f"{index:04d}"

    def commit_segment(
        self,
        index: int,
        *,
        latent: Tensor,
        fragment: bytes,
        inputs: Mapping[str, Any],
        frames_hash: str | None = None,
        look: Mapping[str, Any] | None = None,
    ) -> SegmentRecord:
        """Store a segment. Its record is written last: once it is there, the segment is committed.

        Args:
            index: Number of the segment in the film, from 0.
            latent: New latent frames, (1, C, T, H, W).
            fragment: The encoded new video frames.
            inputs: Everything the segment was made from, as plain values.
            frames_hash: SHA-256 of the new video frames before they were encoded; None if it is not known.
            look: Colour and contrast of the frames.
        """
        folder = self.segment_dir(index)
        make_folder(folder)
        files = {
            LATENTS_NAME: safetensors.torch.save({"latent": latent.detach().float().cpu().contiguous()}),
            FRAGMENT_NAME: fragment,
        }
        for name, data in files.items():
            write_bytes(folder / name, data)
        outputs = {name: hash_bytes(data) for name, data in files.items()}
        if frames_hash is not None:
            outputs[FRAMES] = frames_hash
        record = SegmentRecord(index=index, inputs=dict(inputs), outputs=outputs, look=dict(look or {}))
        write_json(folder / SEGMENT_NAME, _sealed({"format": FORMAT, **vars(record)}))
        return record

    def has_segment(self, index: int) -> bool:
        """Whether a segment is committed."""
        return (self.segment_dir(index) / SEGMENT_NAME).exists()

    def committed_indices(self) -> Iterator[int]:
        """Indices of the committed segments, in order."""
        folder = self.path / SEGMENTS_NAME
        names = [f.name for f in folder.iterdir()] if folder.is_dir() else []
        for index in sorted(int(name) for name in names if name.isdecimal()):
            if self.has_segment(index):
                yield index

    def read_segment(self, index: int, *, verify: bool = True) -> SegmentRecord:
        """Read the record of a committed segment.

        Args:
            index: Number of the segment in the film, from 0.
            verify: Hash the files of the segment too, and refuse one that differs from the record.

        Raises:
            FileNotFoundError: If it is not committed.
            RunFolderError: If the record or a file is damaged.
        """
        folder = self.segment_dir(index)
        values = _read_sealed(folder / SEGMENT_NAME)
        for name in (LATENTS_NAME, FRAGMENT_NAME) if verify else ():
            if not (folder / name).is_file() or hash_file(folder / name) != values["outputs"][name]:
                raise RunFolderError(
                    f"'{folder / name}' is missing or differs from its record: "
                    f"delete '{folder}' to have the segment made again"
                )
        return SegmentRecord(**{name: values[name] for name in ("index", "inputs", "outputs", "look")})

    def read_latent(self, index: int) -> Tensor:
        """New latent frames (1, C, T, H, W) float32 of a committed segment.

        Raises:
            FileNotFoundError: If there are none.
            RunFolderError: If the file is damaged.
        """
        return _load_tensors(self.segment_dir(index) / LATENTS_NAME)["latent"]

    def read_fragment(self, index: int) -> bytes:
        """The encoded frames of a committed segment."""
        return (self.segment_dir(index) / FRAGMENT_NAME).read_bytes()

    def remove_segment(self, index: int) -> None:
        """Take a segment back; its record goes first, so that it is never committed without its files."""
        folder = self.segment_dir(index)
        (folder / SEGMENT_NAME).unlink(missing_ok=True)
        sync_folder(folder)
        self._remove_files(folder)

    def _remove_files(self, folder: Path) -> None:
        for name in (LATENTS_NAME, FRAGMENT_NAME):
            (folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # something else is in it: not ours
            folder.rmdir()

    # --- the rest --------------------------------------------------------------------------------------------

    def num_versions(self) -> int:
        """The number of the newest version that was kept; 0: none."""
        folder = self.path / VERSIONS_NAME
        names = [f.name for f in folder.iterdir()] if folder.is_dir() else []
        return max((int(name) for name in names if name.isdecimal()), default=0)

    def log(self, event: str, **values: Any) -> None:
        """Add a line to `events.jsonl`, if there is room: no film is stopped for its log."""
        with suppress(OSError):
            append_line(self.path / EVENTS_NAME, {"time": round(time.time(), 3), "event": event, **values})

    def events(self) -> Iterator[dict[str, Any]]:
        """What `events.jsonl` says."""
        return read_lines(self.path / EVENTS_NAME)


def _hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    return hash_plain({name: hash_tensor(tensor) for name, tensor in sorted(tensors.items())})


def _hash_codes(codes: Mapping[int, Tensor]) -> str:
    return hash_plain({str(take): hash_tensor(c.to(torch.int32)) for take, c in codes.items()})


def _sealed(values: dict[str, Any]) -> dict[str, Any]:
    """Add a hash of all values, under `sha256`."""
    return values | {"sha256": hash_plain(values)}


def _read_sealed(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in '{path.parent}'")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RunFolderError(f"'{path}' is not valid JSON: {error}") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise RunFolderError(f"'{path}' has not the format {FORMAT} that this version reads")
    if values.pop("sha256", None) != hash_plain(values):
        raise RunFolderError(f"'{path}' was changed after it was written: its hash does not fit its content")
    return values


def _load_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in '{path.parent}'")
    try:
        return safetensors.torch.load(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise RunFolderError(f"'{path}' is damaged or cut off: {error}") from error
