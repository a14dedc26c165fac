# SPDX-License-Identifier: MIT
"""The first pass of linear_sigmoid's backward: dL/dZ, and its sum over rows, which is dL/db."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Plan, Wrap, cached_plan

PROGRAM_ROWS = 256  # of a program, which writes one row of partial sums of the bias gradient
TILE = (32, 64)


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
    # To sum over rows takes barriers: it is done once.
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=acc_dtype)
    for start in range(0, tl.minimum(m - chunk * ROWS, ROWS).to(tl.int32), BLOCK_M):
        row = chunk * ROWS + start + tl.arange(0, BLOCK_M)
        mask = (row < m)[:, None] & (col < n)[None, :]
        g = tl.load(g_ptr + ((row * g_row)[:, None] + (col * g_col)[None, :]), mask=mask, other=0.0)
        y = tl.load(y_ptr + ((row * y_row)[:, None] + (col * y_col)[None, :]), mask=mask, other=0.0)
        y = y.to(acc_dtype)
        dz = g.to(acc_dtype) * y * (1.0 - y)
        tl.store(
            dz_ptr + ((row * n)[:, None] + col[None, :]), dz.to(dz_ptr.dtype.element_ty), mask=mask
        )
        total += dz
    row_sums = tl.sum(total, axis=0).to(partial_ptr.dtype.element_ty)
    tl.store(partial_ptr + (chunk * n + col), row_sums, mask=col < n)


def sigmoid_backward(g: Tensor, y: Tensor, dz: Tensor, wrap: Wrap) -> Tensor:
    """Write ``g·y·(1 - y)`` for ``g, y (m, n)`` to ``dz``; return its sum over rows, ``(n)``.

    ``dz`` is contiguous. The sum has a fixed order, so that its bits are the same on every run. Up
    to `PROGRAM_ROWS` rows are summed by one program, which writes the result. If there are more,
    each program sums `PROGRAM_ROWS` rows, and PyTorch adds the sums.
    """
    m, n = y.shape
    if dz.numel() == 0:
        return y.new_zeros(n)
    acc_dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    few = not isinstance(m, torch.SymInt) and m <= PROGRAM_ROWS  # AOTInductor checks no guards
    partial = y.new_empty((triton.cdiv(m, PROGRAM_ROWS), n), dtype=y.dtype if few else acc_dtype)
    plan = cached_plan(_plan, wrap, (g, y), out=dz)
    assert plan is not None
    plan.launch(wrap, g, y, dz, partial)
    return partial.view(n) if few else partial.sum(0).to(y.dtype)


def _plan(g: Tensor, y: Tensor) -> Plan:
    m, n = y.shape
    programs = triton.cdiv(m, PROGRAM_ROWS) * triton.cdiv(n, TILE[1])
    constants = {"ROWS": PROGRAM_ROWS, "BLOCK_M": TILE[0], "BLOCK_N": TILE[1]}
    return Plan(sigmoid_backward_kernel, programs, (m, n, *g.stride(), *y.stride()), constants, {})
