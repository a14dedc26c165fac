# SPDX-License-Identifier: MIT
"""What the matrix kernels share: the order of tiles, and the loop over k."""

from collections.abc import Callable
from contextvars import copy_context

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = 8  # tile rows walked together, so that their operands stay in the L2 cache


@triton.jit
def grouped_tile(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile, walking GROUP tile rows together, column by column."""
    in_group = GROUP * tiles_n
    first_row = tile // in_group * GROUP
    group_rows = min(tiles_m - first_row, GROUP)
    return first_row + tile % in_group % group_rows, tile % in_group // group_rows


@triton.jit
def triangle_by_rows(tile):
    """Row and column of a tile of the lower triangle, counted along its rows: r(r + 1)/2 + c = tile."""
    row = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int64)  # row * row overflows int32 from 46341 on
    # The float square root may be off by one either way.
    row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)
    return row, tile - row * (row + 1) // 2


@triton.jit
def triangle_tile(tile, tile_rows, GROUP: tl.constexpr):
    """Row and column of a tile of the lower triangle, walking GROUP tile rows together, column by column.

    The rows of a group end in a small triangle, which comes last, row by row.
    """
    first_row = triangle_by_rows(tile)[0] // GROUP * GROUP
    in_group = tile - first_row * (first_row + 1) // 2
    group_rows = tl.minimum(tile_rows - first_row, GROUP)
    rectangle = first_row * group_rows
    row, col = triangle_by_rows(tl.maximum(in_group - rectangle, 0))
    row = tl.where(in_group < rectangle, in_group % group_rows, row)
    col = tl.where(in_group < rectangle, in_group // group_rows, first_row + col)
    return (first_row + row).to(tl.int32), col.to(tl.int32)


@triton.jit
def dot_rows(
    a_ptr,
    b_ptr,
    a_rows,
    b_rows,
    m,
    n,
    k,
    a_row,
    a_col,
    b_row,
    b_col,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    SYMMETRIZE: tl.constexpr = False,
):
    """The tile ``A[a_rows] · B[b_rows]ᵀ`` of ``A (m, k)`` and ``B (n, k)``; rows past the end are 0.

    SYMMETRIZE puts ``A + Aᵀ`` in A's place (m = k); in float16 it adds Aᵀ's own product. Strides, named
    after the dimension they step along, are widened before they multiply: operands may hold more than
    2³¹ elements.
    """
    dtype: tl.constexpr = a_ptr.dtype.element_ty
    acc_dtype: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    a_rows = a_rows.to(tl.int64)
    b_rows = b_rows.to(tl.int64)
    cols = tl.arange(0, BLOCK_K)
    wide = cols.to(tl.int64)
    step = tl.full((), BLOCK_K, tl.int64)
    a_tile = a_ptr + ((a_rows * a_row)[:, None] + (wide * a_col)[None, :])
    b_tile = b_ptr + ((b_rows * b_row)[None, :] + (wide * b_col)[:, None])
    mirror_tile = a_ptr + ((a_rows * a_col)[:, None] + (wide * a_row)[None, :])
    a_inside = (a_rows < m)[:, None]
    b_inside = (b_rows < n)[None, :]
    acc = tl.zeros((a_rows.shape[0], b_rows.shape[0]), dtype=acc_dtype)
    for start in range(0, k, BLOCK_K):
        if EVEN_K:
            a_mask = a_inside
            b_mask = b_inside
        else:
            a_mask = a_inside & (cols < k - start)[None, :]
            b_mask = b_inside & (cols < k - start)[:, None]
        a = tl.load(a_tile, mask=a_mask, other=0.0)
        b = tl.load(b_tile, mask=b_mask, other=0.0)
        if SYMMETRIZE:
            mirror = tl.load(mirror_tile, mask=a_mask, other=0.0)
            mirror_tile += step * a_row
            if dtype == tl.float16:  # whose range a scaled loss fills: the sum would overflow
                acc = tl.dot(mirror, b, acc, input_precision=PRECISION, out_dtype=acc_dtype)
            else:
                a = (a.to(acc_dtype) + mirror.to(acc_dtype)).to(dtype)
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc_dtype)
        a_tile += step * a_col
        b_tile += step * b_col
    return acc


@triton.jit
def tile_descriptor(
    ptr,
    rows,
    cols,
    row_stride,
    col_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """What TMA needs to know to copy tiles of a matrix whose rows (N) or columns (T) are contiguous."""
    if LAYOUT == "T":
        tiles = tl.make_tensor_descriptor(ptr, [cols, rows], [col_stride, 1], [BLOCK_COLS, BLOCK_ROWS])
    else:
        tiles = tl.make_tensor_descriptor(ptr, [rows, cols], [row_stride, 1], [BLOCK_ROWS, BLOCK_COLS])
    return tiles


@triton.jit
def load_tile(tiles, row, col, LAYOUT: tl.constexpr):
    return tiles.load([col, row]).T if LAYOUT == "T" else tiles.load([row, col])


@triton.jit
def dot_tiles(
    a_tiles,
    b_tiles,
    a_first,
    b_first,
    k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    A_LAYOUT: tl.constexpr,
    B_LAYOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """As `dot_rows`, of the rows from ``a_first`` and ``b_first`` on; the hardware puts 0 past the ends."""
    acc_dtype: tl.constexpr = tl.float64 if a_tiles.dtype == tl.float64 else tl.float32
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=acc_dtype)
    for start in range(0, k, BLOCK_K):
        a = load_tile(a_tiles, a_first, start, A_LAYOUT)
        b = load_tile(b_tiles, b_first, start, B_LAYOUT)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION, out_dtype=acc_dtype)
    return acc


def launch_with_scratch(launch: Callable[[], None]) -> None:
    """Launch a kernel that writes descriptors on the device, which Triton asks the host to find room for.

    The allocator is a context variable of the user's: it is set in a copy of the context.
    """
    copy_context().run(_launch_with_scratch, launch)


def _launch_with_scratch(launch: Callable[[], None]) -> None:
    triton.set_allocator(_scratch)
    launch()


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")  # aligned to 512 bytes; TMA takes 128
