# SPDX-License-Identifier: MIT
"""Tiles of the matrix kernels: the rule that chooses them, and when PyTorch's library computes.

The rule takes the tiles with the least estimated time. Its numbers come from machine code and data
sheets. An H200 has measured where it is right (docs/tuning.md). `autotune` measures.
"""

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .device import Device, device

_WITH_TMA = (90, 100, 103)  # sm_120 has too little shared memory for tiles that gain by it
# With fewer rows, a matrix has few tiles for the multiprocessors; of 4 × 4 tiles the kernel skips
# only 6. The best known kernel of this kind, quack's, has 0.31 times cuBLAS's speed at 512 rows,
# 0.78 at 1024, 1.02 at 2048. A batch has more tiles, and follows the same
# rule.
FEWEST_ROWS = 1024
# Products that an H100's multiprocessor makes, 2048 a cycle, while the L2 cache sends it a number
# of 16 bits, at 64 bytes a cycle. By this, a tile of 128 × 256 takes seven eighths of the time of
# two of 128 × 128.
LOAD = 64


class Tiles(NamedTuple):
    """Tile sizes and launch options of a matrix kernel.

    The variants:

    - "pointers": an address for each element, or for each 16 bytes. Any GPU.
    - "tma": persistent programs that load by TMA, for `_WITH_TMA`. If block_n is 2·block_m,
      `symmetric_matmul` has such tiles below the diagonal and square ones on it.
    - "flat": as "tma", with wide tiles on the diagonal, too, and the loops over tiles and over k
      merged: the next tile is loaded while the last one is stored. `symmetric_matmul`.
    - "split_k": as "pointers", with several programs for a tile (`split_k`). `linear_sigmoid`.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    variant: str = "pointers"

    @property
    def by_tma(self) -> bool:
        return self.variant in ("tma", "flat")


class Kind(NamedTuple):
    """A kind of operands, and the tiles for it.

    ``launch``: columns of a 64 × 64 tile that take as long as a launch, such as the one that adds
    the parts of a split sum: 4 µs, an estimate, at the speed of an H200 by NVIDIA's data sheet.

    ``most_k``: the longest sums for which `linear_sigmoid` is expected to win. Its products take
    some 17% longer than cuBLAS's, an estimate from the machine code, and it saves the sigmoid's
    pass through memory. The two are equal at k = 2155 in 16 bits and TF32, and at 656 in float64,
    on an H200 with 788, 394 and 60 TFLOP/s and 4.3 TB/s. The number is a power of 2 below that. No
    library has tf32x3.
    """

    dtype: torch.dtype
    precision: str
    launch: int
    most_k: int
    unaligned: Tiles  # an address per element takes registers: larger tiles would spill
    tiles: tuple[Tiles, ...]


# Of tiles with the same estimate the first are taken.
_16_BIT = (
    # Where it takes no more waves; with a fourth stage, it would not fit beside the result's tile.
    Tiles(128, 256, 64, 8, 3, "flat"),
    Tiles(128, 256, 64, 8, 4, "tma"),  # the largest that do not spill: 224 of 227 KB
    # Two programs a multiprocessor: one multiplies while the other stores.
    Tiles(64, 128, 64, 4, 4, "tma"),
    # Where the last wave of 128 × 256 would be almost empty; sm_100.
    Tiles(128, 128, 64, 8, 4, "tma"),
    Tiles(128, 128, 64, 8, 3),  # 96 KB, so that two run on an H100's multiprocessor
    Tiles(64, 128, 64, 4, 3),  # where tiles of 128 × 128 leave the last wave almost empty
    Tiles(64, 64, 64, 4, 3),  # small products do not repay the making of descriptors
    # Where pointers would load single elements, and few rows are long.
    Tiles(64, 64, 128, 4, 3, "tma"),
    Tiles(64, 64, 64, 4, 4, "split_k"),  # few tiles: several programs share one
)
# Elements of twice the size: half the columns fill as many bytes of shared memory. With a fourth
# stage, transposed operands and a matrix C would not fit into sm_100's shared memory.
_TF32 = tuple(
    tiles._replace(block_k=tiles.block_k // 2, num_stages=3)
    for tiles in _16_BIT
    if tiles.variant != "flat"  # twice the result's bytes would not fit beside three stages
)
# Three products of TF32 for each of float32: the operands are split in registers, so that larger
# tiles would spill.
_TF32X3 = (
    Tiles(128, 128, 32, 8, 3, "tma"),
    Tiles(64, 128, 32, 4, 3, "tma"),
    Tiles(128, 128, 32, 8, 3),
    Tiles(64, 64, 32, 4, 3),
    Tiles(64, 64, 32, 4, 3, "split_k"),
)
# On FMA units. A tile of 64 × 64 by 8 warps would read shared memory for 1.8 times as long as it
# multiplies, one by 4 warps for 1.3 times, and the others for less.
_FLOAT32 = (
    Tiles(128, 128, 16, 8, 3),
    Tiles(64, 128, 16, 8, 3),
    Tiles(64, 64, 16, 4, 3),
    Tiles(64, 64, 16, 4, 3, "split_k"),
)
_FLOAT64 = (  # A sum takes two registers: a tile of 128 × 128 would spill.
    Tiles(64, 128, 16, 8, 3),
    Tiles(64, 64, 16, 4, 3),
    Tiles(64, 64, 32, 8, 3),
    Tiles(64, 64, 32, 8, 3, "split_k"),
)
KERNELS = ("symmetric_matmul", "linear_sigmoid")
PRECISIONS = ("ieee", "tf32", "tf32x3")  # of float32
KINDS = {
    "bfloat16": Kind(torch.bfloat16, "ieee", 1200, 2048, Tiles(64, 64, 32, 8, 3), _16_BIT),
    "float16": Kind(torch.float16, "ieee", 1200, 2048, Tiles(64, 64, 32, 8, 3), _16_BIT),
    "tf32": Kind(torch.float32, "tf32", 600, 2048, Tiles(64, 64, 16, 4, 3), _TF32),
    "tf32x3": Kind(torch.float32, "tf32x3", 200, 2**30, Tiles(64, 64, 16, 4, 3), _TF32X3),
    "float32": Kind(torch.float32, "ieee", 80, 0, Tiles(64, 64, 16, 4, 3), _FLOAT32),
    "float64": Kind(torch.float64, "ieee", 80, 512, Tiles(64, 64, 16, 4, 3), _FLOAT64),
}


def kind_of(dtype: torch.dtype, precision: str) -> str:
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}, expected one of {PRECISIONS}")
    if dtype == torch.float32 and precision != "ieee":
        return precision
    return str(dtype).removeprefix("torch.")


def configurations(kernel: str, dtype: torch.dtype, precision: str, capability: int) -> list[Tiles]:
    """The configurations of ``kernel`` that a device of ``capability`` can run."""

    def exists(tiles: Tiles) -> bool:
        if tiles.variant == "flat" and kernel != "symmetric_matmul":
            return False
        if tiles.by_tma:  # outside sm_90 tiles of other widths spill
            return capability == 90 or (capability in _WITH_TMA and tiles.block_n == 128)
        square = tiles.block_m == tiles.block_n and tiles.variant == "pointers"
        return square or kernel == "linear_sigmoid"

    return [tiles for tiles in KINDS[kind_of(dtype, precision)].tiles if exists(tiles)]


def count_tiles(tiles: Tiles, m: int, n: int, symmetric: bool) -> int:
    """The number of tiles of a result; if it is symmetric, only on and below the diagonal."""
    rows: int = triton.cdiv(m, tiles.block_m)
    columns: int = triton.cdiv(n, tiles.block_n)
    if not symmetric:
        return rows * columns
    if tiles.block_m == tiles.block_n:
        return rows * (rows + 1) // 2
    if tiles.variant == "flat":
        return columns * (columns + 1)
    # Wide tiles, and pairs of square ones on the diagonal.
    return columns * columns + (columns + 1) // 2


def resident_programs(tiles: Tiles) -> int:
    """The number of persistent programs that a multiprocessor runs at a time."""
    return 2 if tiles.num_warps == 4 else 1


def split_k(tiles: Tiles, present: Device, m: int, n: int, k: int) -> tuple[int, int]:
    """The number of programs that sum a tile, and the columns of x that each program takes.

    The number is 1 for other variants than "split_k", and for symbolic sizes: another number would
    make a guard.
    """
    if tiles.variant != "split_k" or any(isinstance(size, torch.SymInt) for size in (m, n, k)):
        return 1, k
    units = max(1, count_tiles(tiles, m, n, symmetric=False))
    steps = ceil(k / tiles.block_k)
    count = max(1, min(present.multiprocessors // units, steps // 4, 16))
    steps_each = ceil(steps / count)
    return ceil(steps / steps_each), steps_each * tiles.block_k


def aligned(t: Tensor, unit: int) -> bool:
    """Whether ``t`` begins on 16 bytes, and its rows or columns at multiples of ``unit`` elements.

    The rows, or the columns, must be contiguous. By pointers Triton loads 16 bytes at a time where
    ``unit`` is 16, for it asks for no other divisor.
    """
    steps = [
        size if stride == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True)
    ]
    return 1 in t.stride() and all(step % unit == 0 for step in steps) and _begins_on_16_bytes(t)


def loads_by_tma(t: Tensor) -> bool:
    """Whether a TMA descriptor can describe the matrices of ``t (*, rows, cols)`` or ``t.mT``."""
    *batch, row, col = t.stride()
    if any(isinstance(size, int) and not 1 < size < 2**31 for size in t.shape[-2:]):
        # Triton makes a size of 1 a constant, and takes no larger ones in a descriptor.
        return False
    unit = 16 // t.element_size()
    steps = (row if col == 1 else col, *(s for s, n in zip(batch, t.shape, strict=False) if n != 1))
    return (
        1 in (row, col) and all(s > 0 and s % unit == 0 for s in steps) and _begins_on_16_bytes(t)
    )


def _begins_on_16_bytes(t: Tensor) -> bool:
    try:
        return t.data_ptr() % 16 == 0
    except RuntimeError:  # a tracer's tensor has no address; the compiler will allocate it aligned
        return bool(t.storage_offset() * t.element_size() % 16 == 0)


def allows_tma(kernel: str, n: int, *operands: Tensor) -> bool:
    """Whether a kernel by TMA takes the operands, and can store ``n`` columns.

    A symmetric product stores by TMA, and a linear layer also by pointers.
    """
    stores = kernel == "linear_sigmoid" or n * operands[0].element_size() % 16 == 0
    return stores and operands[0].dtype != torch.float64 and all(map(loads_by_tma, operands))


def suits(tiles: Tiles, kernel: str, n: int, *operands: Tensor, tma: bool = True) -> bool:
    """Whether ``tiles`` load the operands, and store ``n`` columns, without spills.

    A small tile of a linear layer may store single elements: their addresses are few.
    """
    unit = 16 // operands[0].element_size()
    if tiles.by_tma:
        loads = tma and allows_tma(kernel, n, *operands)
    else:
        unit = 16 if unit == 8 else unit  # single elements of 2 bytes are not loaded asynchronously
        loads = all(aligned(t, unit) for t in operands)
    small = kernel == "linear_sigmoid" and tiles.block_m * tiles.block_n <= 64 * 128
    return loads and bool(small or n % unit == 0)


def check_variant(tiles: Tiles, kernel: str, n: int, *operands: Tensor) -> None:
    """Raise a ValueError if ``tiles`` are of a shape or variant that cannot take the operands."""
    symmetric = kernel == "symmetric_matmul"
    variants = ("pointers", "tma", "flat" if symmetric else "split_k")
    if tiles.variant not in variants:
        raise ValueError(f"{kernel} has no {tiles}, expected one of the variants {variants}")
    widths = {"pointers": (1,), "tma": (1, 2), "flat": (2,)}.get(tiles.variant, ())
    if symmetric and tiles.block_n not in [tiles.block_m * width for width in widths]:
        expected = " or ".join(f"{width}·block_m" for width in widths)
        raise ValueError(f"{kernel} has no {tiles}, expected a block_n of {expected}")
    if tiles.by_tma and not allows_tma(kernel, n, *operands):
        raise ValueError(
            f"{kernel} cannot take these operands by {tiles}, expected the variant pointers"
        )


def tile_cost(rows: int, columns: int) -> int:
    """The cost of a tile for each column of x: its products, and `LOAD` for each number loaded."""
    return rows * columns + LOAD * (rows + columns)


def suitable(
    kernel: str, precision: str, n: int, *operands: Tensor, tma: bool = True
) -> list[Tiles]:
    """The configurations of the operands' device that suit them, and ``n`` columns of a result."""
    possible = configurations(kernel, operands[0].dtype, precision, device(operands[0]).capability)
    return [tiles for tiles in possible if suits(tiles, kernel, n, *operands, tma=tma)]


def choose_tiles(
    kernel: str, precision: str, sizes: Sequence[int], *operands: Tensor, tma: bool = True
) -> Tiles:
    """The tiles with the least estimated time for products of ``sizes`` (m, n, k and batch).

    A compiled graph keeps the tiles of the sizes that it was traced with; only their alignment is
    guarded.
    """
    present, kind = device(operands[0]), KINDS[kind_of(operands[0].dtype, precision)]
    possible = suitable(kernel, precision, sizes[1], *operands, tma=tma)
    return min(
        possible,
        key=lambda tiles: estimate(tiles, kernel, kind, present, sizes),
        default=kind.unaligned,
    )


def estimate(tiles: Tiles, kernel: str, kind: Kind, present: Device, sizes: Sequence[int]) -> int:
    """The waves of tiles over the multiprocessors, times the columns of x, times a tile's cost.

    The second launch of a split product is added.
    """
    m, n, _, batch = map(hint, sizes)
    count, columns = split_k(tiles, present, *sizes[:3])
    units = count_tiles(tiles, m, n, kernel == "symmetric_matmul") * batch * count
    waves = ceil(units / present.multiprocessors)
    cost = tile_cost(tiles.block_m, tiles.block_n)
    return (waves * hint(columns) + kind.launch * (count > 1)) * cost


def library_is_faster(
    kernel: str, precision: str, sizes: Sequence[int], *operands: Tensor, tma: bool = True
) -> bool:
    """Whether the kernel is not expected to win, so that PyTorch's library computes.

    docs/tuning.md has the reasons.
    """
    m, _, k, _ = map(hint, sizes)
    name = kind_of(operands[0].dtype, precision)
    if kernel == "linear_sigmoid" and name == "float32":
        # Copies by columns are two more launches, and the products are no faster than cuBLAS's.
        return True
    if kernel == "linear_sigmoid" and _saves_a_launch(
        KINDS[name], precision, sizes, *operands, tma=tma
    ):
        return False
    fitting = suitable(kernel, precision, sizes[1], *operands, tma=tma)
    if not fitting or sizes[1] * operands[0].element_size() % 16 != 0:
        return True  # an address, or a store, for each element
    return m < FEWEST_ROWS if kernel == "symmetric_matmul" else k > KINDS[name].most_k


def _saves_a_launch(
    kind: Kind, precision: str, sizes: Sequence[int], *operands: Tensor, tma: bool = True
) -> bool:
    """Whether one launch of `linear_sigmoid` is expected to beat the library's two launches.

    The library launches addmm and the sigmoid. A kernel that takes twice as long as addmm wins up
    to a time T of two launches, where T = T/2 + a launch.
    """
    tiles = choose_tiles("linear_sigmoid", precision, sizes, *operands, tma=tma)
    if tiles.variant == "split_k":  # it launches twice, too
        return False
    time = estimate(tiles, "linear_sigmoid", kind, device(operands[0]), sizes)
    return time <= 2 * kind.launch * tile_cost(64, 64)


def hint(size: int) -> int:
    """The value that a symbolic size was traced with, without a guard; 1024 where there is none."""
    return size.node.hint or 1024 if isinstance(size, torch.SymInt) else size
