"""Which devices compute in bfloat16 in hardware.

A processor without it emulates bfloat16, 10 to 80 times slower than float32, so whatever is set to `auto` asks here.
"""

from __future__ import annotations

import torch


def has_fast_bfloat16(device: torch.device | str) -> bool:
    """True where matrix products in bfloat16 run in hardware: CUDA from Ampere on, x86 with AVX-512 BF16 or AMX."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu":
        able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    return False


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 where it is fast, else float32."""
    return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
