"""Allocator settings: reuse freed memory, and give weights the same alignment on every load.

glibc gives a large block back to the system when it is freed, and asks for it again at the next call; the system then
maps and zeroes every page of it again. A network that allocates its activations step by step pays for that in every
step. `keep_freed_memory` tells glibc to keep such blocks. Results do not change by a bit. The process then stays about
as large as it once was, until it ends; its peak may rise a little, as free blocks are cut up.

Entry points call it, once, before tensors are made; nothing happens on import.
"""

from __future__ import annotations

import ctypes
import gc
import os
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn  # takes a second to import, and the command line calls this module first

MIB = 2**20
ALIGNMENT = 64
"""Bytes, of all memory that PyTorch gives to tensors on a CPU."""
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""Parameters of mallopt(3); numbers from malloc.h of glibc."""
SETTINGS = {
    M_MMAP_THRESHOLD: 1024 * MIB,  # smaller blocks come from the heap, and stay there
    M_TRIM_THRESHOLD: 2**31 - 1,  # the largest int: free memory at its end that is not given back
    M_TOP_PAD: 64 * MIB,  # by which it grows at once
}
CHOSEN_BY_USER = (
    "GLIBC_TUNABLES",
    "LD_PRELOAD",
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "MALLOC_TRIM_THRESHOLD_",
)
"""Environment variables that choose or tune the allocator; if one is already set, it is left unchanged."""


def keep_freed_memory() -> bool:
    """Tell the allocator of this process to keep freed memory for later tensors.

    Does nothing if the C library is not glibc, or if a variable of `CHOSEN_BY_USER` is set.

    Returns:
        Whether the allocator took all settings.
    """
    if not _is_glibc() or any(name in os.environ for name in CHOSEN_BY_USER):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(parameter, value) == 1 for parameter, value in SETTINGS.items()])


def release_memory() -> None:
    """Collect unreachable objects and return free memory to the system, and to other users of a GPU.

    Meant for the moment when something large has ended; it works after `keep_freed_memory` too. With a C library other
    than glibc, that library decides what the system gets back.
    """
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    if _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def align_weights(module: nn.Module) -> None:
    """Copy weights and buffers on the CPU that are not aligned to 64 bytes into memory of PyTorch, which is.

    Kernels of matrix products sum in another order if memory is not aligned, and the last bits of a result differ.
    Libraries that read weights into memory of their own align them differently in every load.
    """
    for tensor in chain(module.parameters(), module.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


def _is_glibc() -> bool:
    """Whether the C library of this process is glibc."""
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):
        return False
