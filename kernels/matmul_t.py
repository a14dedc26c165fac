# SPDX-License-Identifier: MIT
"""Products with a symmetric side: A·Bᵀ known to be symmetric, and (G + Gᵀ)·X."""

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .gemm import GROUP, dot_rows, grouped_tile, tiles


@triton.jit
def triangle_tile(tile):
    """Row and column of a tile of the lower triangle, counted along its rows: r(r + 1)/2 + c = tile."""
    row = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int64)  # row * row overflows int32 from 46341 on
    # The float square root may be off by one either way.
    row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)
    return row.to(tl.int32), (tile - row * (row + 1) // 2).to(tl.int32)


@triton.jit
def symmetric_product_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    n,
    k,
    a_batch,
    a_row,
    a_col,
    b_batch,
    b_row,
    b_col,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile_rows = tl.cdiv(n, BLOCK)
    triangle = tile_rows * (tile_rows + 1) // 2
    # The batch shares the first grid axis: the others end at 65535.
    batch = (tl.program_id(0) // triangle).to(tl.int64)
    tile_row, tile_col = triangle_tile(tl.program_id(0) % triangle)
    i = tile_row * BLOCK + tl.arange(0, BLOCK)
    j = tile_col * BLOCK + tl.arange(0, BLOCK)
    acc = dot_rows(
        a_ptr + batch * a_batch,
        b_ptr + batch * b_batch,
        i,
        j,
        n,
        n,
        k,
        a_row,
        a_col,
        b_row,
        b_col,
        BLOCK_K,
        EVEN_K,
        PRECISION,
    )
    c = acc.to(c_ptr.dtype.element_ty)
    i = i.to(tl.int64)
    j = j.to(tl.int64)
    c_ptr += batch * n * n
    # A diagonal tile is made symmetric, and stored once; elsewhere i > j always holds. The masks are constant
    # along a row, so the stores stay vectorised.
    c = tl.where(i[:, None] >= j[None, :], c, tl.trans(c))
    mask = (i < n)[:, None] & (j < n)[None, :]
    tl.store(c_ptr + (i[:, None] * n + j[None, :]), c, mask=mask)
    mirror_end = tl.where(tile_row == tile_col, 0, n)
    mirror_mask = (j < n)[:, None] & (i < mirror_end)[None, :]
    tl.store(c_ptr + (j[:, None] * n + i[None, :]), tl.trans(c), mask=mirror_mask)


@triton.jit
def symmetrized_product_kernel(
    g_ptr,
    x_ptr,
    out_ptr,
    n,
    k,
    g_batch,
    g_row,
    g_col,
    x_batch,
    x_row,
    x_col,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
):
    tiles_m = tl.cdiv(n, BLOCK_M)
    tiles_n = tl.cdiv(k, BLOCK_N)
    batch = (tl.program_id(0) // (tiles_m * tiles_n)).to(tl.int64)
    tile_m, tile_n = grouped_tile(tl.program_id(0) % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP)
    i = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = dot_rows(
        g_ptr + batch * g_batch,
        x_ptr + batch * x_batch,
        i,
        j,
        n,
        k,
        n,
        g_row,
        g_col,
        x_col,
        x_row,
        BLOCK_K,
        EVEN_K,
        PRECISION,
        SYMMETRIZE=True,
    )
    out = out_ptr + (batch * n * k + (i.to(tl.int64) * k)[:, None] + j[None, :])
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(i < n)[:, None] & (j < k)[None, :])


def symmetric_product(a: Tensor, b: Tensor, out: Tensor, precision: str, wrap: Callable[[Any], Any]) -> None:
    """``out = a @ b.mT`` for ``a, b (*, n, k)`` whose product is symmetric; half of it is computed.

    ``out (*, n, n)`` is contiguous. ``precision`` is "ieee" or "tf32" and matters to float32 alone.
    """
    n, k = a.shape[-2:]
    if out.numel() == 0:
        return
    a, b = (_one_batch(a), _one_batch(b)) if a is not b else (_one_batch(a),) * 2  # it may copy
    block, _, block_k, num_warps, num_stages = tiles(a.dtype, precision, n, n, a, b)
    tile_rows = triton.cdiv(n, block)
    wrap(symmetric_product_kernel)[(a.shape[0] * (tile_rows * (tile_rows + 1) // 2),)](
        a,
        b,
        out,
        n,
        k,
        *a.stride(),
        *b.stride(),
        BLOCK=block,
        BLOCK_K=block_k,
        EVEN_K=bool(k % block_k == 0),
        PRECISION=precision,
        num_warps=num_warps,
        num_stages=num_stages,
    )


def symmetrized_product(
    g: Tensor, x: Tensor, out: Tensor, precision: str, wrap: Callable[[Any], Any]
) -> None:
    """``out = (g + g.mT) @ x`` for ``g (*, n, n)`` and ``x (*, n, k)``; the sum is never stored.

    ``out (*, n, k)`` is contiguous. ``precision`` is "ieee" or "tf32" and matters to float32 alone.
    """
    n, k = x.shape[-2:]
    if out.numel() == 0:
        return
    g, x = _one_batch(g), _one_batch(x)
    block_m, block_n, block_k, num_warps, num_stages = tiles(x.dtype, precision, n, k, g, x)
    grid = (x.shape[0] * triton.cdiv(n, block_m) * triton.cdiv(k, block_n),)
    wrap(symmetrized_product_kernel)[grid](
        g,
        x,
        out,
        n,
        k,
        *g.stride(),
        *x.stride(),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        EVEN_K=bool(n % block_k == 0),
        PRECISION=precision,
        GROUP=GROUP,
        num_warps=num_warps,
        num_stages=num_stages,
    )


def _one_batch(t: Tensor) -> Tensor:
    """``(*, rows, cols)`` with a single batch dimension; a view where the strides allow."""
    return t.unsqueeze(0) if t.dim() == 2 else t.flatten(0, -3)
