# SPDX-License-Identifier: MIT
"""This processor's name, and the instruction sets that PyTorch's libraries use on it."""

import platform
from functools import cache
from pathlib import Path

import torch


def cpuinfo(key: str) -> str:
    """A field of /proc/cpuinfo for the first processor, such as "model name"; "" if there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(": ")[2] for line in lines if line.partition(":")[0].strip() == key), "")


@cache
def has_onednn() -> bool:
    """Return True if oneDNN has wider vectors than PyTorch's BLAS library: MKL on an AMD with AVX-512."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkl.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "AuthenticAMD" in (cpuinfo("vendor_id") or platform.processor())
    )


@cache
def has_bfloat16() -> bool:
    """Return True if oneDNN multiplies bfloat16 on this CPU; elsewhere float32 is ten times as fast."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@cache
def has_amx() -> bool:
    """Return True if this CPU multiplies bfloat16 in tiles, so fast that half a product takes as long."""
    return bool(torch.cpu._is_amx_tile_supported())
