# SPDX-License-Identifier: MIT
"""The kind of this processor: its vendor, and the instruction sets that PyTorch's libraries use."""

import platform
from functools import cache
from pathlib import Path

import torch

_VENDORS = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}


@cache
def has_onednn() -> bool:
    """Return True if oneDNN has wider vectors than PyTorch's BLAS library: MKL on an AMD with AVX-512."""
    try:
        vendor = Path("/proc/cpuinfo").read_text()
    except OSError:
        vendor = platform.processor()
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkl.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "AuthenticAMD" in vendor
    )


@cache
def has_bfloat16() -> bool:
    """Return True if oneDNN multiplies bfloat16 on this CPU; elsewhere float32 is ten times as fast."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@cache
def has_amx() -> bool:
    """Return True if this CPU multiplies bfloat16 in tiles, so fast that half a product takes as long."""
    return bool(torch.cpu._is_amx_tile_supported())


@cache
def processor_kind() -> str:
    """The vendor, and the instruction sets that PyTorch uses, such as "intel-avx512-amx"."""
    vendor = platform.machine().lower()
    flags: set[str] = set()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "vendor_id":
            vendor = _VENDORS.get(value.strip(), value.strip().lower())
        elif key.strip() == "flags":
            flags = set(value.split())
    capability = torch.backends.cpu.get_cpu_capability().lower()
    vnni = capability == "avx512" and "avx512_vnni" in flags
    names = {"vnni": vnni, "bf16": has_bfloat16(), "amx": has_amx()}
    return "-".join([vendor, capability.replace(" ", ""), *(name for name, has in names.items() if has)])
