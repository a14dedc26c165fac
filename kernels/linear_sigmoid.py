# SPDX-License-Identifier: MIT
"""σ(X·Wᵀ + b) with bias and sigmoid in the epilogue, and the first pass of its backward."""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gemm import GROUP, dot_rows, grouped_tile
from .tuning import Tiles, default_tiles

BACKWARD_ROWS = 256  # per program; each adds one row to the partial sums of the bias gradient
BACKWARD_BLOCK_M = 16
BACKWARD_BLOCK_N = 64


LOG2_E_HIGH = tl.constexpr(1.44269502162933349609375)  # log2(e) rounded to float32
LOG2_E_LOW = tl.constexpr(1.925963033500e-8)  # and what is left of it
LN_2 = tl.constexpr(0.693147180559945)


@triton.jit
def sigmoid(z):
    """``1/(1 + exp(-z))``, in float32 without the error that `tl.exp` has where z is far below 0.

    There exp(-z) = 2^t with t = -z·log2(e) large, and t's rounding error r, which `tl.exp` lets pass,
    is a relative error of r·ln(2) in the result. It is computed and put right.
    """
    if z.dtype == tl.float64:
        y = 1.0 / (1.0 + tl.exp(-z))
    else:
        t = -z * LOG2_E_HIGH
        r = tl.fma(-z, LOG2_E_HIGH, -t) - z * LOG2_E_LOW
        e = tl.exp2(t) * (1.0 + tl.where(tl.abs(t) < 256, r, 0.0) * LN_2)  # beyond, 2^t is 0 or infinite
        d = 1.0 + e
        y = 1.0 / d  # off by up to 2 ulp; one step of Newton's mends it
        y = tl.where(d < 1e38, y + y * tl.fma(-d, y, 1.0), y)
    return y


@triton.jit
def linear_sigmoid_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    m,
    n,
    k,
    x_row,
    x_col,
    weight_row,
    weight_col,
    bias_stride,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
):
    tiles_m, tiles_n = (m - 1) // BLOCK_M + 1, (n - 1) // BLOCK_N + 1  # tl.cdiv overflows just below 2³¹
    tile_m, tile_n = grouped_tile(tl.program_id(0), tiles_m, tiles_n, GROUP)
    i = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    z = dot_rows(
        x_ptr,
        weight_ptr,
        i,
        j,
        m,
        n,
        k,
        x_row,
        x_col,
        weight_row,
        weight_col,
        BLOCK_K,
        EVEN_K,
        PRECISION,
    )
    if HAS_BIAS:
        bias = tl.load(bias_ptr + j.to(tl.int64) * bias_stride, mask=j < n, other=0.0)
        z += bias.to(z.dtype)[None, :]
    y = sigmoid(z)
    out = out_ptr + ((i.to(tl.int64) * n)[:, None] + j[None, :])
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=(i < m)[:, None] & (j < n)[None, :])


@triton.jit
def sigmoid_backward_kernel(
    g_ptr,
    y_ptr,
    dz_ptr,
    partial_ptr,
    m,
    n,
    g_row,
    g_col,
    y_row,
    y_col,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``dz = g·y·(1 - y)`` for ROWS rows, and their sum into this program's row of ``partial``."""
    acc_dtype: tl.constexpr = partial_ptr.dtype.element_ty
    col_blocks = (n - 1) // BLOCK_N + 1  # tl.cdiv overflows just below 2³¹
    chunk = (tl.program_id(0) // col_blocks).to(tl.int64)
    col = (tl.program_id(0) % col_blocks * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    total = tl.zeros((BLOCK_N,), dtype=acc_dtype)
    for start in range(0, ROWS, BLOCK_M):
        row = chunk * ROWS + start + tl.arange(0, BLOCK_M)
        mask = (row < m)[:, None] & (col < n)[None, :]
        g = tl.load(g_ptr + ((row * g_row)[:, None] + (col * g_col)[None, :]), mask=mask, other=0.0)
        y = tl.load(y_ptr + ((row * y_row)[:, None] + (col * y_col)[None, :]), mask=mask, other=0.0)
        y = y.to(acc_dtype)
        dz = g.to(acc_dtype) * y * (1.0 - y)
        tl.store(dz_ptr + ((row * n)[:, None] + col[None, :]), dz.to(dz_ptr.dtype.element_ty), mask=mask)
        total += tl.sum(dz, axis=0)
    tl.store(partial_ptr + (chunk * n + col), total, mask=col < n)


def linear_sigmoid(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    precision: str,
    wrap: Callable[[Any], Any],
    tiles: Tiles | None = None,
) -> None:
    """``out = sigmoid(x @ weight.T + bias)`` for ``x (m, k)``, ``weight (n, k)``, ``bias (n)``.

    ``out (m, n)`` is contiguous. ``precision`` is "ieee" or "tf32" and matters to float32 alone.
    """
    m, k = x.shape
    n = weight.shape[0]
    if out.numel() == 0:
        return
    tiles = tiles or default_tiles(x.dtype, precision, m, n, x, weight)
    block_m, block_n, block_k, num_warps, num_stages, *_ = tiles
    grid = (triton.cdiv(m, block_m) * triton.cdiv(n, block_n),)
    wrap(linear_sigmoid_kernel)[grid](
        x,
        weight,
        weight if bias is None else bias,  # never read without a bias
        out,
        m,
        n,
        k,
        *x.stride(),
        *weight.stride(),
        0 if bias is None else bias.stride(0),
        HAS_BIAS=bias is not None,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        EVEN_K=bool(k % block_k == 0),
        PRECISION=precision,
        GROUP=GROUP,
        num_warps=num_warps,
        num_stages=num_stages,
    )


def sigmoid_backward(g: Tensor, y: Tensor, dz: Tensor, wrap: Callable[[Any], Any]) -> Tensor:
    """``dz = g·y·(1 - y)`` for ``g, y (m, n)`` into contiguous ``dz``; returns its sum over rows, ``(n)``.

    The sum has two stages of fixed order, so that it is the same on every run.
    """
    m, n = y.shape
    chunks = triton.cdiv(m, BACKWARD_ROWS)
    acc_dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    partial = torch.empty((chunks, n), dtype=acc_dtype, device=y.device)
    if dz.numel() > 0:
        wrap(sigmoid_backward_kernel)[(chunks * triton.cdiv(n, BACKWARD_BLOCK_N),)](
            g,
            y,
            dz,
            partial,
            m,
            n,
            *g.stride(),
            *y.stride(),
            ROWS=BACKWARD_ROWS,
            BLOCK_M=BACKWARD_BLOCK_M,
            BLOCK_N=BACKWARD_BLOCK_N,
        )
    return partial.sum(0).to(y.dtype)
