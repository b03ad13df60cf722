"""Processor threads: how many cores there are, and how the threads of PyTorch wait for the next operation.

Between two operations, OpenMP's threads spin for milliseconds instead of sleeping, which has the lowest latency when
every thread has its own core. If another process needs that core, the busy thread has to wait for a spinning one, and
networks of many small operations get five to thirty times slower. GNU's OpenMP spins 300,000 times by default, and 1000
times if it knows that there are more threads than cores, but it knows nothing of other processes. Spinning less changes
no bit of a result.
"""

from __future__ import annotations

import os
import sys

SHORT_SPIN = {"GOMP_SPINCOUNT": "1000"}
CHOSEN_BY_USER = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")
"""Environment variables that say how OpenMP waits; if one is already set, it is left unchanged."""


def limit_spinning() -> bool:
    """Let the OpenMP threads of this process, and of processes it starts, spin briefly and then sleep.

    Entry points call this before PyTorch is imported, because OpenMP reads its variables once.

    Returns:
        Whether the setting takes effect in this process.
    """
    if any(name in os.environ for name in CHOSEN_BY_USER):
        return False
    os.environ.update(SHORT_SPIN)
    return "torch" not in sys.modules


def available_cores() -> int:
    """Number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
