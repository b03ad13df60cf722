"""How the threads of PyTorch wait for the next operation.

Between two operations, OpenMP's threads spin for milliseconds rather than sleep, which is soonest where each has a core
of its own. Where another process wants that core, whoever has work waits for one who spins: networks of many small
operations get five to thirty times slower. OpenMP of GNU spins 300,000 times by itself, and 1000 times where it knows
that there are more threads than cores; of other processes it knows nothing. Results do not change by a bit.
"""

from __future__ import annotations

import os
import sys

SPIN_BRIEFLY = {"GOMP_SPINCOUNT": "1000"}
CHOSEN_BY_USER = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")
"""Environment variables that say how OpenMP waits; where one is set, it has its way."""


def spin_briefly() -> bool:
    """Let OpenMP's threads of this process, and of those it starts, spin briefly and then sleep.

    Entry points call it, before PyTorch is imported: OpenMP reads its variables once.

    Returns:
        Whether they will.
    """
    if any(name in os.environ for name in CHOSEN_BY_USER):
        return False
    os.environ.update(SPIN_BRIEFLY)
    return "torch" not in sys.modules
