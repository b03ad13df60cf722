"""The exact form in which a component was stored, so that it can be saved as the same files.

Files of a released folder that fine-tuning does not change are saved byte for byte, so their hashes stay: the text of
`config.json`, names and order of tensors, precisions, shards, and the metadata in the headers. `safetensors` itself
writes a header of its own, so the files are put together here from the header that was read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

READ_PRECISIONS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
"""Types that floating-point tensors may be stored in: name in safetensors -> name in PyTorch. Others, such as float8,
need scales that no component here has."""
STORED_TYPES: dict[str, torch.dtype] = {
    **{name: getattr(torch, dtype) for name, dtype in READ_PRECISIONS.items()},
    **{f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)},
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types of tensors that are written again as they were read."""
HEADER_LENGTH = 8
"""Bytes at the start of a safetensors file that say how long its header is (little-endian)."""


@dataclass(frozen=True)
class StoredForm:
    """Everything about a component folder except the values of its tensors; plain data."""

    config: Any
    """Config dataclass that `config_text` stands for."""
    config_text: str
    """Text of `config.json`."""
    headers: dict[str, bytes]
    """File name -> header of that safetensors file, the length in front included: names, places, metadata."""
    index: dict[str, str]
    """File name -> text of the shard index; empty if the weights are one file."""

    @classmethod
    def read(cls, config: Any, config_file: Path, weights: Iterable[Path], index: Path | None) -> StoredForm:
        """Form of a component on disk.

        Args:
            config: Config dataclass that `config_file` stands for.
            config_file: Its `config.json`.
            weights: Its safetensors files.
            index: The shard index that names them, if there is one.
        """
        headers = {}
        for path in weights:
            with path.open("rb") as file:
                length = file.read(HEADER_LENGTH)
                headers[path.name] = length + file.read(int.from_bytes(length, "little"))
        # Bytes are decoded by hand: reading as text would translate line ends.
        texts = {} if index is None else {index.name: index.read_bytes().decode()}
        return cls(config=config, config_text=config_file.read_bytes().decode(), headers=headers, index=texts)

    def tensors_in(self, file: str) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
        """Precision and shape of each tensor of a file, in the order of their bytes; None for an unknown type."""
        entries = json.loads(self.headers[file][HEADER_LENGTH:])
        entries.pop("__metadata__", None)
        ordered = sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
        return {name: (STORED_TYPES.get(entry["dtype"]), tuple(entry["shape"])) for name, entry in ordered}

    def dtypes(self) -> dict[str, torch.dtype]:
        """Precision of each tensor of the component, by name."""
        kinds = [item for file in self.headers for item in self.tensors_in(file).items()]
        return {name: dtype for name, (dtype, _) in kinds if dtype is not None}

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether the headers describe exactly these tensors: same names, precisions and shapes."""
        stored = {name: kind for file in self.headers for name, kind in self.tensors_in(file).items()}
        return stored == {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}

    def write_weights(self, file: str, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write one safetensors file in the stored form.

        Args:
            file: Name of the file, as in `headers`.
            path: Where to write it.
            tensors: Contiguous tensors on the CPU; at least those that the header names.
        """
        with path.open("wb") as stream:
            stream.write(self.headers[file])
            for name in self.tensors_in(file):
                stream.write(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
