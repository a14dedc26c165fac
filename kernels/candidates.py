# SPDX-License-Identifier: MIT
"""Tiles of the matrix kernels: the configurations, and which of them a device can run."""

from functools import cache
from math import ceil
from typing import NamedTuple

import torch
import triton
from torch import Tensor

# Bytes of shared memory per block, by capability (CUDA C++ Programming Guide, "Technical Specifications per
# Compute Capability"). 0 stands for gfx942; sm_86, sm_89 and sm_120 have 101376.
SHARED_MEMORY = {0: 65536, 80: 166912, 87: 166912, 90: 232448, 100: 232448, 103: 232448}

_WITH_TMA = (90, 100, 103)  # sm_120 has too little shared memory for tiles that gain by it


class Tiles(NamedTuple):
    """Tile sizes and launch options of a matrix kernel.

    The variants:

    - "pointers": an address for each element, or for each 16 bytes. Any GPU.
    - "tma": persistent programs that load by TMA, for `_WITH_TMA`. If block_n is 2·block_m,
      `symmetric_product` has such tiles below the diagonal and square ones on it.
    - "specialized": as "tma", with warps that only load. `symmetric_product` on sm_90.
    - "split_k": as "pointers", with several programs for a tile (`split_k`). `linear_sigmoid`.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    variant: str = "pointers"


class Device(NamedTuple):
    """The properties of a device on which tiles depend; capability 90 is sm_90, and 0 is no NVIDIA GPU."""

    name: str
    capability: int
    multiprocessors: int


class Kind(NamedTuple):
    """A kind of operands, and the tiles for it.

    ``speed``: multiply-adds per µs of a multiprocessor, of the 132 of an H200, by NVIDIA's data sheet: 989
    TFLOP/s of 16 bits, 495 of TF32, 67 of float32 and float64.
    """

    dtype: torch.dtype
    precision: str
    speed: float
    unaligned: Tiles  # an address per element takes registers: larger tiles would spill
    tiles: tuple[Tiles, ...]


# symmetric_product takes square tiles of "pointers". Without a table, the first tiles of a shape are taken.
_16_BIT = (
    Tiles(128, 256, 64, 8, 4, "tma"),
    Tiles(64, 128, 64, 4, 4, "tma"),
    Tiles(128, 128, 64, 8, 4, "tma"),
    Tiles(128, 128, 64, 4, 3, "tma"),
    Tiles(128, 256, 64, 8, 3),
    Tiles(256, 128, 64, 8, 3),
    Tiles(128, 128, 64, 8, 3),
    Tiles(64, 128, 64, 4, 3),
    Tiles(64, 64, 64, 4, 3),  # small products do not repay the making of descriptors
    Tiles(64, 64, 128, 4, 3),
    Tiles(64, 64, 32, 8, 3),
    Tiles(64, 64, 128, 4, 3, "tma"),
    Tiles(64, 64, 64, 4, 4, "split_k"),
    Tiles(128, 128, 64, 4, 3, "specialized"),
)
_TF32 = (  # with a fourth stage, transposed operands and a matrix C would not fit into sm_100's shared memory
    *dict.fromkeys(tiles._replace(block_k=tiles.block_k // 2, num_stages=3) for tiles in _16_BIT),
    Tiles(64, 64, 16, 4, 3),
)
_FLOAT32 = (
    Tiles(128, 128, 16, 8, 3),
    Tiles(64, 128, 16, 8, 2),
    Tiles(64, 64, 16, 8, 2),
    Tiles(64, 64, 32, 8, 2),
    Tiles(64, 64, 16, 8, 2, "split_k"),
)
_FLOAT64 = (
    Tiles(64, 128, 16, 8, 2),
    Tiles(64, 64, 16, 4, 2),
    Tiles(64, 64, 32, 8, 2),
    Tiles(64, 64, 16, 4, 3),
    Tiles(64, 64, 32, 8, 2, "split_k"),
)
KERNELS = ("symmetric_product", "linear_sigmoid")
KINDS = {
    "bfloat16": Kind(torch.bfloat16, "ieee", 3.75e6, Tiles(64, 64, 32, 8, 3), _16_BIT),
    "float16": Kind(torch.float16, "ieee", 3.75e6, Tiles(64, 64, 32, 8, 3), _16_BIT),
    "tf32": Kind(torch.float32, "tf32", 1.87e6, Tiles(64, 64, 16, 4, 3), _TF32),
    "float32": Kind(torch.float32, "ieee", 2.54e5, Tiles(64, 64, 16, 8, 3), _FLOAT32),
    "float64": Kind(torch.float64, "ieee", 2.54e5, Tiles(64, 64, 16, 4, 3), _FLOAT64),
}


def device(t: Tensor) -> Device:
    """The current device, or Triton's interpreter where ``t`` is on a CPU."""
    if t.device.type == "cpu":
        return Device("interpreter", 0, 3)
    return _device(triton.runtime.driver.active.get_current_device())


@cache
def _device(index: int) -> Device:
    target = triton.runtime.driver.active.get_current_target()
    capability = target.arch if target.backend == "cuda" else 0
    if index >= torch.cuda.device_count():  # a kernel is compiled for a device that is not here
        return Device(f"{target.backend} {target.arch}", capability, 132)
    present = torch.cuda.get_device_properties(index)
    return Device(present.name, capability, present.multi_processor_count)


@cache
def kind_of(dtype: torch.dtype, precision: str) -> str:
    return "tf32" if (dtype, precision) == (torch.float32, "tf32") else str(dtype).removeprefix("torch.")


def configurations(kernel: str, dtype: torch.dtype, precision: str, capability: int) -> list[Tiles]:
    """The configurations of ``kernel`` that a device of ``capability`` can run."""
    usable = []
    for tiles in KINDS[kind_of(dtype, precision)].tiles:
        m, n, k, _, stages, variant = tiles
        symmetric = kernel == "symmetric_product"
        exists = {
            # 128 × 256 spills on sm_80, and 256 × 128 on sm_90 and later.
            "pointers": m == n if symmetric else m + n < 384 or (m > n) == (capability < 90),
            "split_k": not symmetric,
            "tma": capability == 90 or (capability in _WITH_TMA and n == 128),  # elsewhere the others spill
            "specialized": symmetric and capability == 90,  # Triton 3.6 compiles it for no other
        }[variant]
        elements = (stages - (capability == 0)) * (m + n) * k  # AMD keeps a stage in registers
        if variant in ("tma", "specialized"):  # which store from shared memory
            elements += m * m if symmetric else m * n // 2
        programs = resident_programs(tiles)
        if exists and programs * elements * dtype.itemsize <= SHARED_MEMORY.get(capability, 101376):
            usable.append(tiles)
    return usable


def split_k(tiles: Tiles, present: Device, m: int, n: int, k: int) -> tuple[int, int]:
    """The number of programs that share a tile, and the columns of x that each takes.

    It is 1 for symbolic sizes: another number would be a guard.
    """
    if any(isinstance(size, torch.SymInt) for size in (m, n, k)):
        return 1, k
    units = max(1, ceil(m / tiles.block_m) * ceil(n / tiles.block_n))
    steps = ceil(k / tiles.block_k)
    count = max(1, min(present.multiprocessors // units, steps // 4, 16))
    steps_each = ceil(steps / count)
    return ceil(steps / steps_each), steps_each * tiles.block_k


def resident_programs(tiles: Tiles) -> int:
    """The number of persistent programs that a multiprocessor runs at a time."""
    return 2 if tiles.num_warps == 4 and tiles.variant == "tma" else 1
