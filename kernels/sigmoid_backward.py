# SPDX-License-Identifier: MIT
"""The first pass of linear_sigmoid's backward: dL/dZ, and its sum over rows, which is dL/db."""

import triton
import triton.language as tl
from torch import Tensor

from . import Wrap
from .launch import Empty, Plan, PreparedLaunch, prepared
from .row_sums import add_partial_sums_kernel, divide_rows, sum_steps

# Compilers look for an operator's kernels in its module.
__all__ = ["add_partial_sums_kernel", "sigmoid_backward", "sigmoid_backward_kernel"]


@triton.jit
def sigmoid_backward_kernel(
    g_ptr,
    y_ptr,
    dz_ptr,
    sum_ptr,
    m,
    n,
    rows,
    g_row,
    g_col,
    y_row,
    y_col,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``dz = g·y·(1 - y)`` for ``rows`` rows. Their sum goes to this program's row of ``sum``."""
    acc_dtype: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    col_blocks = (n - 1) // BLOCK_N + 1  # tl.cdiv overflows just below 2³¹
    chunk = (tl.program_id(0) // col_blocks).to(tl.int64)
    col = (tl.program_id(0) % col_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    # To sum over rows takes barriers: it is done once.
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=acc_dtype)
    count = tl.minimum(m - chunk * rows, rows).to(tl.int32)
    for start in tl.range(0, count, BLOCK_M, num_stages=STAGES):
        row = chunk * rows + start + tl.arange(0, BLOCK_M)
        mask = (row < m)[:, None] & (col < n)[None, :]
        g = tl.load(g_ptr + ((row * g_row)[:, None] + (col * g_col)[None, :]), mask=mask, other=0.0)
        y = tl.load(y_ptr + ((row * y_row)[:, None] + (col * y_col)[None, :]), mask=mask, other=0.0)
        y = y.to(acc_dtype)
        dz = g.to(acc_dtype) * y * (1.0 - y)
        tl.store(
            dz_ptr + ((row * n)[:, None] + col[None, :]), dz.to(dz_ptr.dtype.element_ty), mask=mask
        )
        total += dz
    sums = tl.sum(total, axis=0).to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + (chunk * n + col), sums, mask=col < n)


def sigmoid_backward(g: Tensor, y: Tensor, dz: Tensor | None, wrap: Wrap) -> tuple[Tensor, Tensor]:
    """``dz = g·y·(1 - y)`` for ``g, y (m, n)``, and the sum of ``dz`` over its rows, ``(n)``.

    ``dz`` is contiguous; None stands for a new tensor. The sum has a fixed order, so that its bits
    are the same on every run. Few rows are summed by one launch. More rows are shared among
    programs where that is faster, and then another launch adds the programs' sums.
    """
    launch = prepared(_prepare, wrap, (g, y, dz))
    if launch is None:
        return y.new_empty(y.shape) if dz is None else dz, y.new_zeros(y.shape[1])
    return launch.run(wrap, (g, y, dz))  # type: ignore[no-any-return]


def _prepare(g: Tensor, y: Tensor, dz: Tensor | None) -> PreparedLaunch | None:
    """The launch; None without elements."""
    if y.numel() == 0:
        return None
    (m, n), plan = y.shape, _plan(g, y)
    empties = [Empty((n,), y.dtype)]
    if dz is None:
        empties.append(Empty((m, n), y.dtype))
    written = 2 if dz is not None else 4
    steps, partial = sum_steps(plan, m, n, (0, 1, written), 3, y, 3 + len(empties))
    return PreparedLaunch((g, y, dz), steps, empties + partial, (written, 3))


def _plan(g: Tensor, y: Tensor) -> Plan:
    m, n = y.shape
    block_m, block_n, rows, stages = divide_rows(m, n, y)
    programs = triton.cdiv(m, rows) * triton.cdiv(n, block_n)
    constants = {"BLOCK_M": block_m, "BLOCK_N": block_n, "STAGES": stages}
    arguments = m, n, rows, *g.stride(), *y.stride()
    return Plan(sigmoid_backward_kernel, programs, arguments, constants, {})
