"""Where tensors lie: freed memory is kept for the next one, and weights lie alike after every load.

glibc gives a large block back to the system when it is freed, and asks for it again at the next call; the system then
maps and zeroes every page of it anew. A network that allocates its activations step by step pays for that in every
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
"""Environment variables that choose or tune the allocator; where one is set, it has its way."""


def keep_freed_memory() -> bool:
    """Tell the allocator of this process to keep freed memory for later tensors.

    Does nothing where the C library is not glibc, or where a variable of `CHOSEN_BY_USER` is set.

    Returns:
        Whether the allocator took all settings.
    """
    if not _is_glibc() or any(name in os.environ for name in CHOSEN_BY_USER):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(parameter, value) == 1 for parameter, value in SETTINGS.items()])


def give_back_memory() -> None:
    """Collect what nobody refers to, and give free memory back: to the system, and to other users of a GPU.

    For the end of something large; it works after `keep_freed_memory` too. Elsewhere than with glibc, the C library
    decides what the system gets.
    """
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    if _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def align_weights(module: nn.Module) -> None:
    """Move weights and buffers on the CPU that do not lie at a multiple of 64 bytes to memory of PyTorch, which does.

    Kernels of matrix products add up in another order where memory is not aligned as they like it, and the last bits of
    a result differ. Libraries that read weights into memory of their own put them elsewhere in every load.
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
