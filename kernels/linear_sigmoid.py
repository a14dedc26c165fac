# SPDX-License-Identifier: MIT
"""σ(X·Wᵀ + b) with bias and sigmoid in the epilogue, and the first pass of its backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gemm import GROUP, dot_rows, grouped_tile
from .launch import Plan, Wrap, planned
from .tuning import Tiles, chosen

BACKWARD_ROWS = 256  # per program; each adds one row to the partial sums of the bias gradient
BACKWARD_BLOCK_M = 32
BACKWARD_BLOCK_N = 64


LOG2_E_HIGH = tl.constexpr(1.44269502162933349609375)  # log2(e) rounded to float32
LOG2_E_LOW = tl.constexpr(1.925963033500e-8)  # log2(e) - LOG2_E_HIGH
LN_2 = tl.constexpr(0.693147180559945)


@triton.jit
def sigmoid(z):
    """``1/(1 + exp(-z))``; in float32 without the error of `tl.exp` where z is far below 0.

    There exp(-z) = 2^t with a large t = -z·log2(e). The rounding error r of t is a relative error of r·ln(2)
    in the result. `tl.exp` ignores it; here it is computed and corrected.
    """
    if z.dtype == tl.float64:
        y = 1.0 / (1.0 + tl.exp(-z))
    else:
        t = -z * LOG2_E_HIGH
        r = tl.fma(-z, LOG2_E_HIGH, -t) - z * LOG2_E_LOW
        e = tl.exp2(t) * (1.0 + tl.where(tl.abs(t) < 256, r, 0.0) * LN_2)  # beyond, 2^t is 0 or infinite
        d = 1.0 + e
        y = 1.0 / d  # off by up to 2 ulp; one Newton step corrects it
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
    """``dz = g·y·(1 - y)`` for ROWS rows. Their sum goes to this program's row of ``partial``."""
    acc_dtype: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    col_blocks = (n - 1) // BLOCK_N + 1  # tl.cdiv overflows just below 2³¹
    chunk = (tl.program_id(0) // col_blocks).to(tl.int64)
    col = (tl.program_id(0) % col_blocks * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=acc_dtype)  # to sum over rows takes barriers: it is done once
    for start in range(0, tl.minimum(m - chunk * ROWS, ROWS).to(tl.int32), BLOCK_M):
        row = chunk * ROWS + start + tl.arange(0, BLOCK_M)
        mask = (row < m)[:, None] & (col < n)[None, :]
        g = tl.load(g_ptr + ((row * g_row)[:, None] + (col * g_col)[None, :]), mask=mask, other=0.0)
        y = tl.load(y_ptr + ((row * y_row)[:, None] + (col * y_col)[None, :]), mask=mask, other=0.0)
        y = y.to(acc_dtype)
        dz = g.to(acc_dtype) * y * (1.0 - y)
        tl.store(dz_ptr + ((row * n)[:, None] + col[None, :]), dz.to(dz_ptr.dtype.element_ty), mask=mask)
        total += dz
    row_sums = tl.sum(total, axis=0).to(partial_ptr.dtype.element_ty)
    tl.store(partial_ptr + (chunk * n + col), row_sums, mask=col < n)


def linear_sigmoid(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    precision: str,
    wrap: Wrap,
    *,
    out: Tensor | None = None,
    tiles: Tiles | None = None,
) -> Tensor | None:
    """``sigmoid(x @ weight.T + bias)`` for ``x (m, k)``, ``weight (n, k)``, ``bias (n)``; k is at least 1.

    Args:
        precision: "ieee" or "tf32"; it applies to float32 only.
        out: ``(m, n)``, contiguous; by default a new tensor.
        tiles: by default those of the device's table, or else those that suit the sizes.

    Returns:
        ``out``; None if PyTorch's library is faster by the device's table.
    """
    plan = planned(_plan_forward, wrap, (x, weight, bias), precision, tiles, out=out)
    if plan is None:
        return None
    if out is None:
        out = x.new_empty(x.shape[0], weight.shape[0])
    if out.numel() > 0:
        plan.launch(wrap, x, weight, weight if bias is None else bias, out)  # without a bias it is not read
    return out


def _plan_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, precision: str, tiles: Tiles | None
) -> Plan | None:
    (m, k), n = x.shape, weight.shape[0]
    tiles = tiles or chosen("linear_sigmoid", precision, (m, n, k, 1), x, weight)
    if tiles is None:
        return None
    constants = {
        "HAS_BIAS": bias is not None,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "EVEN_K": bool(k % tiles.block_k == 0),
        "PRECISION": precision,
        "GROUP": GROUP,
    }
    return Plan(
        linear_sigmoid_kernel,
        triton.cdiv(m, tiles.block_m) * triton.cdiv(n, tiles.block_n),
        (m, n, k, *x.stride(), *weight.stride(), 0 if bias is None else bias.stride(0)),
        constants,
        {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages},
    )


def sigmoid_backward(g: Tensor, y: Tensor, dz: Tensor, wrap: Wrap) -> Tensor:
    """Write ``g·y·(1 - y)`` for ``g, y (m, n)`` to the contiguous ``dz``; return its sum over rows, ``(n)``.

    The sum has a fixed order, so that its bits are the same on every run. Few rows are summed by one program
    for each column, which writes the result; of more, the sums of `BACKWARD_ROWS` rows are summed.
    """
    m, n = y.shape
    if dz.numel() == 0:
        return y.new_zeros(n)
    acc_dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    few = m <= BACKWARD_ROWS
    partial = y.new_empty((triton.cdiv(m, BACKWARD_ROWS), n), dtype=y.dtype if few else acc_dtype)
    plan = planned(_plan_backward, wrap, (g, y), out=dz)
    assert plan is not None
    plan.launch(wrap, g, y, dz, partial)
    return partial.view(n) if few else partial.sum(0).to(y.dtype)


def _plan_backward(g: Tensor, y: Tensor) -> Plan:
    m, n = y.shape
    programs = triton.cdiv(m, BACKWARD_ROWS) * triton.cdiv(n, BACKWARD_BLOCK_N)
    constants = {"ROWS": BACKWARD_ROWS, "BLOCK_M": BACKWARD_BLOCK_M, "BLOCK_N": BACKWARD_BLOCK_N}
    return Plan(sigmoid_backward_kernel, programs, (m, n, *g.stride(), *y.stride()), constants, {})
