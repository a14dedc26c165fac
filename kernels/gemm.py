# SPDX-License-Identifier: MIT
"""Building blocks of the matrix kernels: the order of tiles, and the loop over k.

The loop loads by pointers or by TMA.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tile rows that are computed together, so that their operands stay in the L2 cache.
GROUP = tl.constexpr(8)


@triton.jit
def grouped_tile(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile, by groups of GROUP tile rows, each numbered column by column."""
    in_group = GROUP * tiles_n
    first_row = tile // in_group * GROUP
    group_rows = min(tiles_m - first_row, GROUP)
    return first_row + tile % in_group % group_rows, tile % in_group // group_rows


@triton.jit
def triangle_by_rows(tile):
    """Row r and column c of a tile of the lower triangle, numbered row by row.

    r(r + 1)/2 + c = tile.
    """
    # Row * row overflows int32 from 46341 on.
    row = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int64)
    # The float square root may be off by one in either direction.
    row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)
    return row, tile - row * (row + 1) // 2


@triton.jit
def triangle_tile(tile, tile_rows, GROUP: tl.constexpr):
    """Row and column of a tile of the lower triangle, in the order of groups of GROUP tile rows.

    A group is a rectangle, numbered column by column, and then a small triangle, numbered row by
    row.
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
def triangle_of_batch(n, BLOCK: tl.constexpr):
    """This program's matrix of a batch, int64, and the row and column of its tile.

    The tile is one of the lower triangle.
    """
    tile_rows = tl.cdiv(n, BLOCK)
    tiles = tile_rows * (tile_rows + 1) // 2
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    tile_row, tile_col = triangle_tile(tl.program_id(0) % tiles, tile_rows, GROUP)
    return batch, tile_row, tile_col


@triton.jit
def float_of_words(low, high):
    """The float64 whose bits are two int32.

    A launch would round a Python float to float32. `torch.compile` takes a negative integer for an
    int32, however large, and its version 2.11 takes no integer above int32.
    """
    # A launch may make a word that is 1 a constant.
    high_bits = tl.full((), high, tl.int64) << 32
    low_bits = tl.full((), low, tl.int64) & 0xFFFFFFFF
    return (high_bits | low_bits).to(tl.float64, bitcast=True)


@triton.jit
def is_finite(tile):
    """Whether all numbers of a float32 tile are finite."""
    return tl.max(tl.abs(tile).to(tl.int32, bitcast=True)) < 0x7F800000


@triton.jit
def dot_rows(
    a,
    b,
    a_rows,
    b_rows,
    m,
    n,
    k,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr = None,
):
    """The tile ``A[a_rows] · B[b_rows]ᵀ`` of ``A (m, k)`` and ``B (n, k)``.

    Rows past the end are 0. ``a`` and ``b`` hold a pointer and the strides of rows and columns.
    Offsets are int64 before strides multiply: operands may exceed 2³¹ elements.

    "tf32x3" splits a number into the nearest of TF32, and the rest. The rest of an infinity is NaN,
    and numbers near the largest are rounded to an infinity. So where three products give no finite
    number, the result is that of one product of TF32. Tensor cores cut its operands off, and do not
    round them, so that a finite operand stays finite.
    """
    a_ptr, a_row, a_col = a
    b_ptr, b_row, b_col = b
    dtype: tl.constexpr = a_ptr.dtype.element_ty
    acc_dtype: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    a_rows = a_rows.to(tl.int64)
    b_rows = b_rows.to(tl.int64)
    cols = tl.arange(0, BLOCK_K)
    wide = cols.to(tl.int64)
    step = tl.full((), BLOCK_K, tl.int64)
    a_tile = a_ptr + ((a_rows * a_row)[:, None] + (wide * a_col)[None, :])
    b_tile = b_ptr + ((b_rows * b_row)[None, :] + (wide * b_col)[:, None])
    a_inside = (a_rows < m)[:, None]
    b_inside = (b_rows < n)[None, :]
    tl.assume(k > 0)  # without it Triton 3.6 waits for each product before it begins the next
    acc = tl.zeros((a_rows.shape[0], b_rows.shape[0]), dtype=acc_dtype)
    for start in tl.range(0, k, BLOCK_K, num_stages=STAGES):
        if EVEN_K:
            a_mask = a_inside
            b_mask = b_inside
        else:
            a_mask = a_inside & (cols < k - start)[None, :]
            b_mask = b_inside & (cols < k - start)[:, None]
        a_values = tl.load(a_tile, mask=a_mask, other=0.0)
        b_values = tl.load(b_tile, mask=b_mask, other=0.0)
        acc = tl.dot(a_values, b_values, acc, input_precision=PRECISION, out_dtype=acc_dtype)
        a_tile += step * a_col
        b_tile += step * b_col
    if PRECISION == "tf32x3":  # noqa: SIM102  # a constant, and a value known at run time
        if not is_finite(acc):  # one stage: others would take registers from the loop above
            single = dot_rows(a, b, a_rows, b_rows, m, n, k, BLOCK_K, EVEN_K, "tf32", 1)
            acc = tl.where(tl.abs(acc) < float("inf"), acc, single)
    return acc


@triton.jit
def make_descriptor(
    t, batches, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr, LAYOUT: tl.constexpr
):
    """A TMA descriptor of matrices whose rows (LAYOUT "N") or columns ("T") are contiguous.

    Its tiles are ROWS × COLS. ``t`` holds a pointer and the strides of batch, rows and columns.
    """
    ptr, batch_stride, row_stride, col_stride = t
    if LAYOUT == "T":
        tiles = tl.make_tensor_descriptor(
            ptr, [batches, cols, rows], [batch_stride, col_stride, 1], [1, COLS, ROWS]
        )
    else:
        tiles = tl.make_tensor_descriptor(
            ptr, [batches, rows, cols], [batch_stride, row_stride, 1], [1, ROWS, COLS]
        )
    return tiles


@triton.jit
def load_tile(tiles, batch, row, col, LAYOUT: tl.constexpr):
    if LAYOUT == "T":
        tile = tiles.load([batch, col, row])
        tile = tile.reshape(tile.shape[1], tile.shape[2]).T
    else:
        tile = tiles.load([batch, row, col])
        tile = tile.reshape(tile.shape[1], tile.shape[2])
    return tile


@triton.jit
def dot_tiles(
    a_tiles,
    b_tiles,
    batch,
    row,
    col,
    k,
    SAME: tl.constexpr,
    A_LAYOUT: tl.constexpr,
    B_LAYOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The tile ``A[row:] · B[col:]ᵀ``, as in `dot_rows`; TMA loads 0 past the ends.

    SAME says that both operands are the same tile.
    """
    ROWS: tl.constexpr = a_tiles.block_shape[2 if A_LAYOUT == "T" else 1]
    COLS: tl.constexpr = b_tiles.block_shape[2 if B_LAYOUT == "T" else 1]
    BLOCK_K: tl.constexpr = a_tiles.block_shape[1 if A_LAYOUT == "T" else 2]
    acc = tl.zeros((ROWS, COLS), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        a = load_tile(a_tiles, batch, row, start, A_LAYOUT)
        b = a if SAME else load_tile(b_tiles, batch, col, start, B_LAYOUT)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    if PRECISION == "tf32x3":  # noqa: SIM102  # a constant, and a value known at run time
        if not is_finite(acc):
            single = dot_tiles(
                a_tiles, b_tiles, batch, row, col, k, SAME, A_LAYOUT, B_LAYOUT, "tf32"
            )
            acc = tl.where(tl.abs(acc) < float("inf"), acc, single)
    return acc


# Operands of float32 products on FMA units, whose columns must be contiguous. Triton keeps a tile
# in shared memory in the order that it has in global memory. A warp on FMA units reads up to 16
# rows of B at one column. Where rows are contiguous, these numbers lie in one or two banks, and are
# read one after the other. Where columns are contiguous, there are no bank conflicts. A copy takes
# one pass through memory.

_PITCH = 16  # columns begin at multiples of 16 elements, the divisor that Triton asks for


def empty_by_columns(t: Tensor, precision: str) -> Tensor:
    """Memory for a copy of ``t (*, rows, cols)`` by columns; ``t`` itself if it needs no copy."""
    if t.dtype != torch.float32 or precision != "ieee" or t.stride(-2) == 1:
        return t
    *batch, rows, cols = t.shape
    pitch = (rows + _PITCH - 1) // _PITCH * _PITCH
    return t.new_empty(*batch, cols, pitch)[..., :rows].mT


def by_columns(t: Tensor, precision: str) -> Tensor:
    """``t``, or a copy of it whose columns are contiguous, if FMA units multiply it."""
    empty = empty_by_columns(t, precision)
    return t if empty is t else empty.copy_(t)
