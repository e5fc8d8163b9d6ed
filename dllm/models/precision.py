"""Which dtype a device computes in.

A CPU without instructions for bfloat16 multiplies in it at a fifth of its rate in float32, as it converts every operand
at every use. There float32 is faster, and more exact than what was asked for. What is stored keeps the dtype of the
recipe: exports, cached features.
"""

from __future__ import annotations

import functools
import platform

import torch


def compute_dtype(asked: torch.dtype | str, device: torch.device | str) -> torch.dtype:
    """Return the dtype to compute in where `asked` is asked for: float32 on a CPU that has no instructions for it."""
    dtype: torch.dtype = getattr(torch, asked) if isinstance(asked, str) else asked
    if torch.device(device).type != "cpu" or dtype.itemsize != 2 or _multiplies_in(dtype):
        return dtype
    return torch.float32


def name_of(dtype: torch.dtype) -> str:
    """Return a dtype's name as params.yaml has it."""
    return str(dtype).removeprefix("torch.")


def note(asked: torch.dtype | str, device: torch.device | str) -> str | None:
    """Say that a device computes in another dtype than was asked for; None where it does not."""
    dtype = compute_dtype(asked, device)
    name = asked if isinstance(asked, str) else name_of(asked)
    if name == name_of(dtype):
        return None
    return f"this CPU has no instructions for {name}: computing in float32, several times as fast"


@functools.cache
def _multiplies_in(dtype: torch.dtype) -> bool:
    """Whether the CPU has instructions that multiply in a dtype of 16 bits, and torch uses them."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        has = {
            torch.bfloat16: ("_is_avx512_bf16_supported", "_is_amx_tile_supported"),
            torch.float16: ("_is_amx_fp16_supported",),
        }
        return any(getattr(torch.cpu, name, bool)() for name in has[dtype])
    supported = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    return torch.backends.mkldnn.is_available() and bool(getattr(torch.ops.mkldnn, supported)())
