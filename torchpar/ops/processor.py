# SPDX-License-Identifier: MIT
"""Instruction sets that PyTorch's libraries use on this processor."""

from functools import cache

import torch

from torchpar.ops.environment import cpuinfo


@cache
def prefers_onednn() -> bool:
    """Return True where oneDNN's float32 products are twice as fast as PyTorch's: on AMD's Zen 5.

    Later processors of AMD count as Zen 5. PyTorch calls MKL, which uses AVX2 on AMD's processors.
    oneDNN uses AVX-512. In one clock cycle Zen 4 computes half a vector of AVX-512, and Zen 5 a
    full vector. GFLOP/s of one thread at 1024³ (torch 2.14.1):

                                    MKL  oneDNN
        Zen 4 (EPYC, family 25)      93     109     PyTorch's: chains would lose what oneDNN gains
        Zen 5 (EPYC, family 26)     110     238     oneDNN
    """
    is_zen_5_or_later = (
        cpuinfo("vendor_id") == "AuthenticAMD" and int(cpuinfo("cpu family") or 0) >= 26
    )
    is_wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return (
        is_zen_5_or_later
        and is_wide
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkl.is_available()
    )


@cache
def has_bfloat16() -> bool:
    """Return True if oneDNN multiplies bfloat16 on this CPU.

    Elsewhere products of float32 are ten times as fast.
    """
    return torch.backends.mkldnn.is_available() and bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


@cache
def has_amx() -> bool:
    """Return True if this CPU multiplies bfloat16 in tiles.

    Tiles are so fast that half of a product in blocks takes as long as the whole product.
    """
    return bool(torch.cpu._is_amx_tile_supported())
