# SPDX-License-Identifier: MIT
"""What the matrix kernels share: the order of tiles, the loop over k, and the tile sizes."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = 8  # tile rows walked together, so that their operands stay in the L2 cache


class Tiles(NamedTuple):
    """Tile sizes and launch options of a matrix kernel."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def tiles(dtype: torch.dtype, precision: str, m: int, n: int, *operands: Tensor) -> Tiles:
    """Tiles for an ``(m, n)`` product of ``operands`` of ``dtype``.

    None spills registers on sm_80, sm_90 or sm_100. Operands that cannot be loaded 16 bytes at a time take
    an address per element, and so a smaller tile.
    """
    if dtype == torch.float64:
        return Tiles(64, 64, 16, 4, 2)
    vectorised = all(_loads_16_bytes(t) for t in operands)
    large = m >= 1024 and n >= 1024
    if dtype == torch.float32 and precision == "ieee":
        if not vectorised:
            return Tiles(64, 64, 16, 8, 3)
        return Tiles(128, 128, 16, 8, 3) if large else Tiles(64, 64, 32, 8, 2)
    if dtype == torch.float32:
        if not vectorised:
            return Tiles(64, 64, 16, 4, 3)
        return Tiles(128, 128, 16, 8, 4) if large else Tiles(64, 64, 32, 8, 3)
    return Tiles(128, 128, 64, 8, 3) if vectorised and large else Tiles(64, 64, 32, 8, 3)


def _loads_16_bytes(t: Tensor) -> bool:
    steps = [size if stride == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True)]
    return all(step * t.element_size() % 16 == 0 for step in (*steps, t.storage_offset()))


@triton.jit
def grouped_tile(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile, walking GROUP tile rows together, column by column."""
    in_group = GROUP * tiles_n
    first_row = tile // in_group * GROUP
    group_rows = min(tiles_m - first_row, GROUP)
    return first_row + tile % in_group % group_rows, tile % in_group // group_rows


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
