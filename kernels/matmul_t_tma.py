# SPDX-License-Identifier: MIT
"""Kernels of symmetric products for GPUs with TMA (sm_90 and later).

The kernels are persistent, and store each tile twice. Below the diagonal a tile has BLOCK rows and
WIDE columns. With WIDE = 2·BLOCK the tile rows 2p and 2p + 1 have 2p + 1 such tiles, which makes p²
for p pairs. The p tiles of BLOCK × BLOCK that are left on the diagonal are computed two at a time.
Wide tiles read less for each product. With FLATTEN, all tiles are wide, and p(p + 1) in number.
"""

import triton
import triton.language as tl

from .gemm import (
    GROUP,
    dot_tiles,
    float_of_words,
    load_tile,
    make_descriptor,
    triangle_tile,
)


@triton.jit
def store_twice(
    acc,
    c_tiles,
    out_tiles,
    batch,
    row,
    col,
    n,
    beta,
    C_LAYOUT: tl.constexpr,
    PLACE: tl.constexpr,
):
    """Add ``beta·C`` to a square tile; store it and its transpose.

    A tile on the diagonal is stored once, and a tile above it not at all. PLACE says where the tile
    may lie: "below" the diagonal, "lower" (below or on it), or "any".
    """
    BLOCK: tl.constexpr = out_tiles.block_shape[1]
    if C_LAYOUT != "":
        acc += beta * load_tile(c_tiles, batch, row, col, C_LAYOUT).to(acc.dtype)
    out = acc.to(out_tiles.dtype)
    if PLACE != "below":  # noqa: SIM102  # a constant, and a value known at run time
        if row == col:  # the upper half from the lower one
            i = tl.arange(0, BLOCK)
            out = tl.where(i[:, None] >= i[None, :], out, out.T)
    # What is not to be stored goes past the last row: a branch around a TMA store crashes the
    # compiler.
    target = tl.where(row < col, n, row) if PLACE == "any" else row
    out_tiles.store([batch, target, col], out.reshape(1, BLOCK, BLOCK))
    out_tiles.store([batch, tl.where(row <= col, n, col), row], out.T.reshape(1, BLOCK, BLOCK))


@triton.jit
def store_halves(
    acc,
    c_tiles,
    out_tiles,
    batch,
    row,
    col,
    n,
    beta,
    C_LAYOUT: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """`store_twice` for the halves of a wide tile."""
    BLOCK: tl.constexpr = out_tiles.block_shape[1]
    LEFT: tl.constexpr = "lower" if FLATTEN else "below"
    RIGHT: tl.constexpr = "any" if FLATTEN else "lower"
    if C_LAYOUT == "":
        acc = acc.to(out_tiles.dtype)  # half the registers
    left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK, 2, BLOCK)), (0, 2, 1)))
    store_twice(left, c_tiles, out_tiles, batch, row, col, n, beta, C_LAYOUT, LEFT)
    col += BLOCK
    store_twice(right, c_tiles, out_tiles, batch, row, col, n, beta, C_LAYOUT, RIGHT)


@triton.jit
def count_units(pairs, BLOCK: tl.constexpr, WIDE: tl.constexpr, FLATTEN: tl.constexpr):
    """The number of units of one tile, and the number of all units, with pairs on the diagonal."""
    if WIDE == BLOCK:
        full = pairs * (pairs + 1) // 2
        units = full
    elif FLATTEN:
        full = pairs * (pairs + 1)
        units = full
    else:
        full = pairs * pairs
        units = full + tl.cdiv(pairs, 2)
    return full, units


@triton.jit
def place_of_wide_tile(unit, pairs, full, FLATTEN: tl.constexpr):
    """The pair of rows, the pair of columns, and the row of its pair, of a wide tile.

    FLATTEN: two tiles for each place on and below the diagonal of pairs. Else two for each place
    below it, and then one for each place on it: the lower row, whose left half is below the
    diagonal, and whose right half is on it.
    """
    if FLATTEN:
        pair_row, pair_col = triangle_tile(unit // 2, pairs, GROUP)
        half = unit % 2
    else:
        below_count = full - pairs
        below = unit < below_count
        pair_rows = tl.maximum(pairs - 1, 1)  # a triangle of no rows would be divided by 0
        pair_row, pair_col = triangle_tile(tl.where(below, unit // 2, 0), pair_rows, GROUP)
        pair_row = tl.where(below, pair_row + 1, unit - below_count)
        pair_col = tl.where(below, pair_col, pair_row)
        half = tl.where(below, unit % 2, 1)
    return pair_row, pair_col, half


@triton.jit
def dot_two_tiles(tiles, batch, first, second, k, LAYOUT: tl.constexpr, PRECISION: tl.constexpr):
    """The tiles of A·Aᵀ at two places on the diagonal, in one loop: its pipeline fills once."""
    ROWS: tl.constexpr = tiles.block_shape[2 if LAYOUT == "T" else 1]
    BLOCK_K: tl.constexpr = tiles.block_shape[1 if LAYOUT == "T" else 2]
    acc = tl.zeros((ROWS, ROWS), dtype=tl.float32)
    acc2 = tl.zeros((ROWS, ROWS), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        a = load_tile(tiles, batch, first, start, LAYOUT)
        a2 = load_tile(tiles, batch, second, start, LAYOUT)
        acc = tl.dot(a, a.T, acc, input_precision=PRECISION)
        acc2 = tl.dot(a2, a2.T, acc2, input_precision=PRECISION)
    return acc, acc2


@triton.jit(do_not_specialize=["alpha_low", "alpha_high", "beta_low", "beta_high"])
def symmetric_matmul_tma_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    out_ptr,
    alpha_low,
    alpha_high,
    beta_low,
    beta_high,
    batches,
    n,
    k,
    a_batch,
    a_row,
    a_col,
    b_batch,
    b_row,
    b_col,
    c_batch,
    c_row,
    c_col,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SAME: tl.constexpr,
    A_LAYOUT: tl.constexpr,
    B_LAYOUT: tl.constexpr,
    C_LAYOUT: tl.constexpr,
    FLATTEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``alpha·A·Bᵀ + beta·C``; layouts are as in `make_descriptor`, and "" for C without a C.

    SAME says that A is B, so that a tile on the diagonal is loaded once. FLATTEN merges the loops
    over tiles and over k, so that the next tile is loaded while the last one is stored.
    """
    tl.assume(k > 0)  # without it Triton 3.6 waits for each product before it begins the next
    alpha = float_of_words(alpha_low, alpha_high).to(tl.float32)
    beta = float_of_words(beta_low, beta_high).to(tl.float32)
    b = b_ptr, b_batch, b_row, b_col
    a_tiles = make_descriptor(
        (a_ptr, a_batch, a_row, a_col), batches, n, k, BLOCK, BLOCK_K, A_LAYOUT
    )
    b_tiles = a_tiles if SAME else make_descriptor(b, batches, n, k, BLOCK, BLOCK_K, B_LAYOUT)
    wide_tiles = (
        b_tiles if WIDE == BLOCK else make_descriptor(b, batches, n, k, WIDE, BLOCK_K, B_LAYOUT)
    )
    c_tiles = a_tiles
    if C_LAYOUT != "":
        c_tiles = make_descriptor(
            (c_ptr, c_batch, c_row, c_col), batches, n, n, BLOCK, BLOCK, C_LAYOUT
        )
    out_tiles = tl.make_tensor_descriptor(
        out_ptr, [batches, n, n], [tl.cast(n, tl.int64) * n, n, 1], [1, BLOCK, BLOCK]
    )
    pairs = tl.cdiv(n, WIDE)
    full, units = count_units(pairs, BLOCK, WIDE, FLATTEN)
    for unit in tl.range(tl.program_id(0), units * batches, tl.num_programs(0), flatten=FLATTEN):
        batch = unit // units
        unit = unit % units
        if WIDE == BLOCK:
            tile_row, tile_col = triangle_tile(unit, pairs, GROUP)
            row, col = tile_row * BLOCK, tile_col * BLOCK
            acc = dot_tiles(
                a_tiles, b_tiles, batch, row, col, k, False, A_LAYOUT, B_LAYOUT, PRECISION
            )
            store_twice(
                acc * alpha, c_tiles, out_tiles, batch, row, col, n, beta, C_LAYOUT, "lower"
            )
        elif FLATTEN or unit < full:
            pair_row, pair_col, half = place_of_wide_tile(unit, pairs, full, FLATTEN)
            row = (2 * pair_row + half) * BLOCK
            col = pair_col * WIDE
            acc = dot_tiles(
                a_tiles, wide_tiles, batch, row, col, k, False, A_LAYOUT, B_LAYOUT, PRECISION
            )
            acc *= alpha
            store_halves(acc, c_tiles, out_tiles, batch, row, col, n, beta, C_LAYOUT, FLATTEN)
        elif SAME and C_LAYOUT == "" and BLOCK == 128 and PRECISION != "tf32x3":
            row = (unit - full) * 2 * WIDE
            first, second = dot_two_tiles(a_tiles, batch, row, row + WIDE, k, A_LAYOUT, PRECISION)
            store_twice(
                first * alpha, c_tiles, out_tiles, batch, row, row, n, beta, C_LAYOUT, "lower"
            )
            row += WIDE
            store_twice(
                second * alpha, c_tiles, out_tiles, batch, row, row, n, beta, C_LAYOUT, "lower"
            )
        else:
            # One loop would have four operands, which do not fit into shared memory, or would
            # spill: with C, of tf32x3, and on sm_100 with tiles of 64 rows.
            for half in range(2):
                row = ((unit - full) * 2 + half) * WIDE
                acc = dot_tiles(
                    a_tiles, b_tiles, batch, row, row, k, SAME, A_LAYOUT, B_LAYOUT, PRECISION
                )
                store_twice(
                    acc * alpha, c_tiles, out_tiles, batch, row, row, n, beta, C_LAYOUT, "lower"
                )
