# SPDX-License-Identifier: MIT
"""Products with a symmetric side: A·Bᵀ known to be symmetric, and (G + Gᵀ)·X."""

import struct
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gemm import (
    GROUP,
    dot_rows,
    dot_tiles,
    grouped_tile,
    launch_with_scratch,
    load_tile,
    tile_descriptor,
    triangle_tile,
)
from .tuning import Tiles, default_tiles, device, loads_by_tma


@triton.jit
def symmetric_tile(
    tile,
    a,
    b,
    c,
    out_ptr,
    n,
    k,
    alpha,
    beta,
    HAS_C: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Compute a tile of the lower triangle of one matrix of the batch, and store it and its mirror.

    ``a``, ``b`` and ``c`` are a pointer and the strides along the batch, the rows and the columns. TMA has a
    letter for each, N if its rows are contiguous and T if its columns are, or none: then nothing goes by TMA.
    """
    a_ptr, a_batch, a_row, a_col = a
    b_ptr, b_batch, b_row, b_col = b
    c_ptr, c_batch, c_row, c_col = c
    tile_rows = tl.cdiv(n, BLOCK)
    triangle = tile_rows * (tile_rows + 1) // 2
    batch = (tile // triangle).to(tl.int64)
    tile_row, tile_col = triangle_tile(tile % triangle, tile_rows, GROUP)
    first_row, first_col = tile_row * BLOCK, tile_col * BLOCK
    i, j = first_row + tl.arange(0, BLOCK), first_col + tl.arange(0, BLOCK)
    a_ptr += batch * a_batch
    b_ptr += batch * b_batch
    if TMA != "":
        A_LAYOUT: tl.constexpr = TMA[0]
        B_LAYOUT: tl.constexpr = TMA[1]
        a_tiles = tile_descriptor(a_ptr, n, k, a_row, a_col, BLOCK, BLOCK_K, A_LAYOUT)
        b_tiles = tile_descriptor(b_ptr, n, k, b_row, b_col, BLOCK, BLOCK_K, B_LAYOUT)
        acc = dot_tiles(
            a_tiles, b_tiles, first_row, first_col, k, BLOCK, BLOCK, BLOCK_K, A_LAYOUT, B_LAYOUT, PRECISION
        )
    else:
        acc = dot_rows(a_ptr, b_ptr, i, j, n, n, k, a_row, a_col, b_row, b_col, BLOCK_K, EVEN_K, PRECISION)
    i, j = i.to(tl.int64), j.to(tl.int64)
    mask = (i < n)[:, None] & (j < n)[None, :]
    acc *= alpha.to(acc.dtype)
    if HAS_C:
        c_ptr += batch * c_batch
        if TMA != "":
            C_LAYOUT: tl.constexpr = TMA[2]
            c_tiles = tile_descriptor(c_ptr, n, n, c_row, c_col, BLOCK, BLOCK, C_LAYOUT)
            term = load_tile(c_tiles, first_row, first_col, C_LAYOUT)
        else:
            term = tl.load(c_ptr + ((i * c_row)[:, None] + (j * c_col)[None, :]), mask=mask, other=0.0)
        acc += beta.to(acc.dtype) * term.to(acc.dtype)
    out = acc.to(out_ptr.dtype.element_ty)
    # A diagonal tile is made symmetric, and stored once: its mirror goes past the last row or is masked off,
    # since a branch around the store crashes the compiler. Elsewhere i > j always holds.
    out = tl.where(i[:, None] >= j[None, :], out, tl.trans(out))
    diagonal = tile_row == tile_col
    out_ptr += batch * n * n
    if TMA != "":
        out_tiles = tl.make_tensor_descriptor(out_ptr, [n, n], [n, 1], [BLOCK, BLOCK])
        out_tiles.store([first_row, first_col], out)
        out_tiles.store([tl.where(diagonal, n, first_col), first_row], tl.trans(out))
    else:  # the masks are constant along a row, so the stores stay vectorised
        tl.store(out_ptr + (i[:, None] * n + j[None, :]), out, mask=mask)
        mirror_mask = (j < n)[:, None] & (i < tl.where(diagonal, 0, n))[None, :]
        tl.store(out_ptr + (j[:, None] * n + i[None, :]), tl.trans(out), mask=mirror_mask)


@triton.jit(do_not_specialize=["alpha_bits", "beta_bits"])
def symmetric_product_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    out_ptr,
    tiles,
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
    alpha_bits: tl.int64,  # a Python float would be rounded to float32 on its way here
    beta_bits: tl.int64,
    HAS_C: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    PERSISTENT: tl.constexpr,
    TMA: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The tiles of all matrices, one after the other on the first grid axis: the others end at 65535."""
    a = a_ptr, a_batch, a_row, a_col
    b = b_ptr, b_batch, b_row, b_col
    c = c_ptr, c_batch, c_row, c_col
    alpha = tl.full((), alpha_bits, tl.int64).to(tl.float64, bitcast=True)
    beta = tl.full((), beta_bits, tl.int64).to(tl.float64, bitcast=True)
    first = tl.program_id(0)
    if PERSISTENT:
        for tile in range(first, tiles, tl.num_programs(0)):
            symmetric_tile(
                tile,
                a,
                b,
                c,
                out_ptr,
                n,
                k,
                alpha,
                beta,
                HAS_C,
                BLOCK,
                BLOCK_K,
                EVEN_K,
                PRECISION,
                TMA,
                GROUP,
            )
    else:  # a loop of one step would take half as many registers again
        symmetric_tile(
            first, a, b, c, out_ptr, n, k, alpha, beta, HAS_C, BLOCK, BLOCK_K, EVEN_K, PRECISION, TMA, GROUP
        )


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


def symmetric_product(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    precision: str,
    wrap: Callable[[Any], Any],
    c: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    tiles: Tiles | None = None,
) -> None:
    """``out = alpha·a @ b.mT + beta·c`` for ``a, b (*, n, k)`` whose product is symmetric; half is computed.

    ``c (*, n, n)`` is symmetric: its lower triangle counts. It is not read if ``beta`` is 0. The contiguous
    ``out (*, n, n)`` is exactly symmetric. ``precision`` is "ieee" or "tf32" and matters to float32 alone.
    """
    n, k = a.shape[-2:]
    if out.numel() == 0:
        return
    a, b = (_one_batch(a), _one_batch(b)) if a is not b else (_one_batch(a),) * 2  # it may copy
    c = None if c is None or beta == 0 else _one_batch(c)
    operands = (a, b) if c is None else (a, b, c)
    tiles = tiles or default_tiles(a.dtype, precision, n, n, *operands)
    tma = ""
    if tiles.tma and k > 0 and all(map(loads_by_tma, (*operands, _one_batch(out)))):
        tma = "".join("N" if t.stride(-1) == 1 else "T" for t in operands)
    tile_rows = triton.cdiv(n, tiles.block_m)
    count = programs = a.shape[0] * (tile_rows * (tile_rows + 1) // 2)
    if tiles.persistent:
        programs = torch.sym_min(count, device(a).multiprocessors)

    def launch() -> None:
        wrap(symmetric_product_kernel)[(programs,)](
            a,
            b,
            a if c is None else c,  # never read without c
            out,
            count,
            n,
            k,
            *a.stride(),
            *b.stride(),
            *((0, 0, 0) if c is None else c.stride()),
            *struct.unpack("<2q", struct.pack("<2d", alpha, beta)),
            HAS_C=c is not None,
            BLOCK=tiles.block_m,
            BLOCK_K=tiles.block_k,
            EVEN_K=bool(k % tiles.block_k == 0),
            PRECISION=precision,
            PERSISTENT=tiles.persistent,
            TMA=tma,
            GROUP=GROUP,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )

    launch_with_scratch(launch) if tma else launch()


def symmetrized_product(
    g: Tensor,
    x: Tensor,
    out: Tensor,
    precision: str,
    wrap: Callable[[Any], Any],
    tiles: Tiles | None = None,
) -> None:
    """``out = (g + g.mT) @ x`` for ``g (*, n, n)`` and ``x (*, n, k)``; the sum is never stored.

    ``out (*, n, k)`` is contiguous. ``precision`` is "ieee" or "tf32" and matters to float32 alone.
    """
    n, k = x.shape[-2:]
    if out.numel() == 0:
        return
    g, x = _one_batch(g), _one_batch(x)
    tiles = tiles or default_tiles(x.dtype, precision, n, k, g, x)
    block_m, block_n, block_k, num_warps, num_stages, *_ = tiles
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
