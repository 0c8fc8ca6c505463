"""What this machine's CPU computes natively.

    has_bfloat16()      # True on Intel with AMX or AVX-512 BF16, and on AMD since Zen 4

A CPU without bfloat16 emulates it: a small matrix product took 8 times as long as in float32.
"""

from __future__ import annotations

from functools import cache

from cpuinfo import get_cpu_info

BFLOAT16 = ("amx_bf16", "avx512_bf16", "bf16", "svebf16")  # Intel and AMD, then ARM


@cache
def has_bfloat16() -> bool:
    """Tells whether the CPU multiplies matrices in bfloat16. False if its features cannot be read."""
    flags = get_cpu_info().get("flags", [])
    return any(flag in flags for flag in BFLOAT16)
