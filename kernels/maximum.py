# SPDX-License-Identifier: MIT
"""Kernels of the elementwise maximum and of its backward.

Each array passes through memory once, 16 bytes per access. An operand that repeats along the rows
or the columns of a tile is read once for all rows or columns. If the operand repeats along all rows
or all columns of a matrix, the kernel that computes its gradient also sums the gradient.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import Wrap
from .launch import Empty, Plan, PreparedLaunch, Step, TritonKernel, prepared
from .row_sums import (
    add_partial_sums_kernel,
    divide_columns,
    divide_rows,
    sum_steps,
)
from .rule import hint

# Compilers look for an operator's kernels in its module.
__all__ = ["add_partial_sums_kernel", "maximum", "maximum_backward"]

FLAT_BYTES = 4096  # of a result per program: 2 accesses of 16 bytes for each of 128 threads
# Blocks and warps that the benchmark `autotune` times; all blocks of the operator have 4 warps.
FLAT_CANDIDATES = ((512, 4), (1024, 4), (2048, 4), (2048, 8), (4096, 8))
# The most bytes of a result per program: 4 rows, which read a value that repeats along rows once.
STRIDED_BYTES = 8192
STRIDED_ROW_BYTES = 2048  # one access for each of 128 threads
# Per program, by number of results: with more, Triton 3.6 spills.
STRIDED_ELEMENTS = {1: 2048, 2: 1024}
STRIDED_DIMS = 4


@triton.jit
def larger(a, b, dtype: tl.constexpr):
    return tl.maximum(a.to(dtype), b.to(dtype), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def gradients(g, a, b):
    """The gradients of ``a`` and ``b``; both are ``g`` where one is NaN: comparisons are false."""
    a = a.to(g.dtype)
    b = b.to(g.dtype)
    of_larger = tl.where(a == b, g * 0.5, g)
    return tl.where(a < b, 0.0, of_larger), tl.where(b < a, 0.0, of_larger)


@triton.jit
def load_flat(ptr, start, offsets, mask, REPEATS: tl.constexpr):
    if REPEATS:
        return tl.load(ptr)
    else:
        return tl.load(ptr + start + offsets, mask=mask)


@triton.jit
def maximum_flat_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    numel,
    A_REPEATS: tl.constexpr,
    B_REPEATS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if start + BLOCK <= numel:  # a mask would split the vector accesses
        a = load_flat(a_ptr, start, offsets, None, A_REPEATS)
        b = load_flat(b_ptr, start, offsets, None, B_REPEATS)
        tl.store(out_ptr + start + offsets, larger(a, b, dtype))
    else:
        mask = offsets < numel - start
        a = load_flat(a_ptr, start, offsets, mask, A_REPEATS)
        b = load_flat(b_ptr, start, offsets, mask, B_REPEATS)
        tl.store(out_ptr + start + offsets, larger(a, b, dtype), mask=mask)


@triton.jit
def maximum_backward_flat_kernel(
    g_ptr,
    a_ptr,
    b_ptr,
    da_ptr,
    db_ptr,
    numel,
    G_REPEATS: tl.constexpr,
    A_REPEATS: tl.constexpr,
    B_REPEATS: tl.constexpr,
    WRITES_A: tl.constexpr,
    WRITES_B: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    if start + BLOCK <= numel:
        g = load_flat(g_ptr, start, offsets, None, G_REPEATS)
        a = load_flat(a_ptr, start, offsets, None, A_REPEATS)
        b = load_flat(b_ptr, start, offsets, None, B_REPEATS)
        da, db = gradients(g, a, b)
        if WRITES_A:
            tl.store(da_ptr + start + offsets, da)
        if WRITES_B:
            tl.store(db_ptr + start + offsets, db)
    else:
        mask = offsets < numel - start
        g = load_flat(g_ptr, start, offsets, mask, G_REPEATS)
        a = load_flat(a_ptr, start, offsets, mask, A_REPEATS)
        b = load_flat(b_ptr, start, offsets, mask, B_REPEATS)
        da, db = gradients(g, a, b)
        if WRITES_A:
            tl.store(da_ptr + start + offsets, da, mask=mask)
        if WRITES_B:
            tl.store(db_ptr + start + offsets, db, mask=mask)


@triton.jit
def rows_and_columns(col_blocks, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """This program's rows and columns of a dense result, whose rows are its last dimension."""
    program = tl.program_id(0)
    row = (program // col_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = (program % col_blocks).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    return row, col


# Tuples are made inside a kernel: Inductor (torch 2.14) passes none to it.
@triton.jit
def load_strided(ptr, strides, row, col, rows, sizes, REPEATS: tl.constexpr):
    """Rows are the elements of dimensions of sizes (size0, size1, size2).

    The size of a dimension that is not needed is 1. Triton makes it a constant, and divides by it
    at no cost.
    """
    size1, size2, size3 = sizes
    stride0, stride1, stride2, stride3 = strides
    at_row = (
        row // size2 // size1 * stride0 + row // size2 % size1 * stride1 + row % size2 * stride2
    )
    if REPEATS == "columns":
        return tl.load(ptr + at_row[:, None], mask=(row < rows)[:, None])
    elif REPEATS == "rows":
        return tl.load(ptr + (col * stride3)[None, :], mask=(col < size3)[None, :])
    else:
        mask = (row < rows)[:, None] & (col < size3)[None, :]
        return tl.load(ptr + (at_row[:, None] + (col * stride3)[None, :]), mask=mask)


@triton.jit
def maximum_strided_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    col_blocks,
    rows,
    size1,
    size2,
    size3,
    a_stride0,
    a_stride1,
    a_stride2,
    a_stride3,
    b_stride0,
    b_stride1,
    b_stride2,
    b_stride3,
    A_REPEATS: tl.constexpr,
    B_REPEATS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row, col = rows_and_columns(col_blocks, BLOCK_ROWS, BLOCK_COLS)
    sizes = size1, size2, size3
    a_strides = a_stride0, a_stride1, a_stride2, a_stride3
    b_strides = b_stride0, b_stride1, b_stride2, b_stride3
    a = load_strided(a_ptr, a_strides, row, col, rows, sizes, A_REPEATS)
    b = load_strided(b_ptr, b_strides, row, col, rows, sizes, B_REPEATS)
    mask = (row < rows)[:, None] & (col < size3)[None, :]
    out = out_ptr + ((row * size3)[:, None] + col[None, :])
    tl.store(out, larger(a, b, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def maximum_backward_strided_kernel(
    g_ptr,
    a_ptr,
    b_ptr,
    da_ptr,
    db_ptr,
    col_blocks,
    rows,
    size1,
    size2,
    size3,
    g_stride0,
    g_stride1,
    g_stride2,
    g_stride3,
    a_stride0,
    a_stride1,
    a_stride2,
    a_stride3,
    b_stride0,
    b_stride1,
    b_stride2,
    b_stride3,
    G_REPEATS: tl.constexpr,
    A_REPEATS: tl.constexpr,
    B_REPEATS: tl.constexpr,
    WRITES_A: tl.constexpr,
    WRITES_B: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row, col = rows_and_columns(col_blocks, BLOCK_ROWS, BLOCK_COLS)
    sizes = size1, size2, size3
    g_strides = g_stride0, g_stride1, g_stride2, g_stride3
    a_strides = a_stride0, a_stride1, a_stride2, a_stride3
    b_strides = b_stride0, b_stride1, b_stride2, b_stride3
    g = load_strided(g_ptr, g_strides, row, col, rows, sizes, G_REPEATS)
    a = load_strided(a_ptr, a_strides, row, col, rows, sizes, A_REPEATS)
    b = load_strided(b_ptr, b_strides, row, col, rows, sizes, B_REPEATS)
    da, db = gradients(g, a, b)
    mask = (row < rows)[:, None] & (col < size3)[None, :]
    offsets = (row * size3)[:, None] + col[None, :]
    if WRITES_A:
        tl.store(da_ptr + offsets, da, mask=mask)
    if WRITES_B:
        tl.store(db_ptr + offsets, db, mask=mask)


@triton.jit
def load_tile(ptr, row, col, m, n, row_stride, col_stride, REPEATS: tl.constexpr):
    """A tile of a matrix; 0 outside. If it repeats along the columns, it has one column."""
    if REPEATS == "columns":
        return tl.load(ptr + (row * row_stride)[:, None], mask=(row < m)[:, None], other=0.0)
    else:
        mask = (row < m)[:, None] & (col < n)[None, :]
        offsets = (row * row_stride)[:, None] + (col * col_stride)[None, :]
        return tl.load(ptr + offsets, mask=mask, other=0.0)


@triton.jit
def maximum_backward_sums_kernel(
    g_ptr,
    full_ptr,
    repeated_ptr,
    d_full_ptr,
    sum_ptr,
    m,
    n,
    each,
    g_row,
    g_col,
    full_row,
    full_col,
    repeated_step,
    OF_ROWS: tl.constexpr,
    G_REPEATS: tl.constexpr,
    WRITES_FULL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradient of a matrix, and the summed gradient of a row or a column that repeats along it.

    With OF_ROWS a row repeats along the rows, and otherwise a column along the columns. A program
    sums over ``each`` rows, or columns, and stores its sums in the row of ``sum`` for its part.
    """
    acc_dtype: tl.constexpr = tl.float64 if g_ptr.dtype.element_ty == tl.float64 else tl.float32
    if OF_ROWS:
        col_blocks = (n - 1) // BLOCK_N + 1  # tl.cdiv overflows just below 2³¹
        chunk = (tl.program_id(0) // col_blocks).to(tl.int64)
        col = (tl.program_id(0) % col_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        repeated = tl.load(repeated_ptr + col * repeated_step, mask=col < n, other=0.0)[None, :]
        count = tl.minimum(m - chunk * each, each).to(tl.int32)
    else:
        chunks = (n - 1) // each + 1
        chunk = (tl.program_id(0) % chunks).to(tl.int64)
        row = (tl.program_id(0) // chunks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        repeated = tl.load(repeated_ptr + row * repeated_step, mask=row < m, other=0.0)[:, None]
        count = tl.minimum(n - chunk * each, each)
    STEP: tl.constexpr = BLOCK_M if OF_ROWS else BLOCK_N
    # To sum over rows takes barriers: it is done once.
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=acc_dtype)
    for start in tl.range(0, count, STEP, num_stages=STAGES):
        if OF_ROWS:
            row = chunk * each + start + tl.arange(0, BLOCK_M)
        else:
            col = chunk * each + start + tl.arange(0, BLOCK_N)
        g = load_tile(g_ptr, row, col, m, n, g_row, g_col, G_REPEATS)
        full = load_tile(full_ptr, row, col, m, n, full_row, full_col, "")
        d_full, d_repeated = gradients(g, full, repeated)
        mask = (row < m)[:, None] & (col < n)[None, :]
        if WRITES_FULL:
            tl.store(d_full_ptr + ((row * n)[:, None] + col[None, :]), d_full, mask=mask)
        # A g of one column is not 0 outside the matrix. Sums of columns outside are not stored.
        total += d_repeated if OF_ROWS or G_REPEATS == "" else tl.where(mask, d_repeated, 0.0)
    sums = tl.sum(total, axis=0 if OF_ROWS else 1).to(sum_ptr.dtype.element_ty)
    if OF_ROWS:
        tl.store(sum_ptr + (chunk * n + col), sums, mask=col < n)
    else:
        tl.store(sum_ptr + (chunk * m + row), sums, mask=row < m)


def maximum(a: Tensor, b: Tensor, out: Tensor, wrap: Wrap) -> None:
    """``out = max(a, b)``; ``a`` and ``b`` of ``out``'s shape (strides may be 0), ``out`` dense."""
    if out.dtype == torch.bool:
        a, b, out = (t.view(torch.uint8) for t in (a, b, out))
    _launch(_plan_forward, wrap, a, b, out)


def new_maximum(a: Tensor, b: Tensor, empty: Callable[[Tensor, Tensor], Tensor]) -> Tensor | None:
    """The maximum of operands that need not be expanded, by one launch; None if that cannot be.

    ``empty(a, b)`` checks the operands, and makes a tensor like the result. It is called for new
    layouts alone.
    """
    launch = prepared(_prepare_new, None, (a, b), (empty,))
    return None if launch is None else launch.run(None, (a, b))


def _prepare_new(
    a: Tensor, b: Tensor, empty: Callable[[Tensor, Tensor], Tensor]
) -> PreparedLaunch | None:
    out = empty(a, b)
    if out.numel() == 0 or out.dtype == torch.bool or not a.device == b.device == out.device:
        return None
    plan = _plan_forward(a.expand_as(out), b.expand_as(out), out)
    if plan is None:
        return None
    return PreparedLaunch((a, b), [Step(plan, (0, 1, 2))], [_like(out)], (2,))


def new_gradients(
    g: Tensor, a: Tensor, b: Tensor, empty: Callable[..., tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor] | None:
    """Both gradients of operands of one shape and dtype, by one launch; else None.

    ``empty(g, a, b)`` makes tensors like the gradients. It is called for new layouts alone.
    """
    launch = prepared(_prepare_new_gradients, None, (g, a, b), (empty,))
    return None if launch is None else launch.run(None, (g, a, b))


def _prepare_new_gradients(
    g: Tensor, a: Tensor, b: Tensor, empty: Callable[..., tuple[Tensor, Tensor]]
) -> PreparedLaunch | None:
    alike = g.shape == a.shape == b.shape and g.device == a.device == b.device
    if not alike or a.dtype != b.dtype or g.numel() == 0:
        return None
    results = empty(g, a, b)
    plan = _plan_backward(g, a, b, *results)
    if plan is None:
        return None
    return PreparedLaunch((g, a, b), [Step(plan, (0, 1, 2, 3, 4))], [*map(_like, results)], (3, 4))


def _like(t: Tensor) -> Empty:
    return Empty(t.shape, t.dtype, None if t.is_contiguous() else t.stride())


def maximum_backward(
    g: Tensor, a: Tensor, b: Tensor, da: Tensor | None, db: Tensor | None, wrap: Wrap
) -> None:
    """Write the gradients ``da`` and ``db``; None stands for a gradient that is not needed.

    ``a`` and ``b`` have the shape of ``g``. A gradient has this shape, too, or it is a sum that has
    the shape of an operand that was broadcast. A sum is contiguous. Two gradients of the shape of
    ``g`` are dense, and have the same strides.
    """
    if da is None and db is None:
        return
    results = [_aligned(t, g) for t in (da, db)]
    if g.numel() == 0:
        for t in results:
            if t is not None:
                t.zero_()
        return
    whole = [t if t is not None and t.shape == g.shape else None for t in results]
    is_written = False  # by a kernel that sums the other gradient
    by_pytorch: list[tuple[Tensor, Tensor]] = []
    for i, total in enumerate(results):
        if total is None or total is whole[i]:
            continue
        full, repeated = (a, b)[1 - i], (a, b)[i]
        if _launch_sum(g, full, repeated, whole[1 - i], total, wrap):
            is_written = True
        else:
            like = whole[1 - i]
            whole[i] = terms = torch.empty_like(g if like is None else like)
            by_pytorch.append((terms, total))
    if by_pytorch or not is_written:
        _launch(_plan_backward, wrap, g, a, b, *whole)
    for terms, total in by_pytorch:
        torch.sum(terms, _summed_dims(total, g), keepdim=True, out=total)


def _aligned(t: Tensor | None, g: Tensor) -> Tensor | None:
    """``t`` with the number of dimensions of ``g``."""
    if t is None or t.dim() == g.dim():
        return t
    return t.view(*(1,) * (g.dim() - t.dim()), *t.shape)


def _summed_dims(total: Tensor, g: Tensor) -> list[int]:
    return [d for d in range(g.dim()) if total.shape[d] != g.shape[d]]


def _launch_sum(
    g: Tensor, full: Tensor, repeated: Tensor, d_full: Tensor | None, total: Tensor, wrap: Wrap
) -> bool:
    """Write the gradient of ``full``, if it is needed, and the sum of the gradient of ``repeated``.

    The sum has a fixed order, so that its bits are the same on every run. False, and nothing is
    launched, if ``repeated`` does not repeat along all rows or all columns of a matrix.
    """
    operands = g, full, repeated, d_full, total
    launch = prepared(_prepare_sum, wrap, operands, tuple(_summed_dims(total, g)))
    if launch is None:
        return False
    launch.run(wrap, operands)
    return True


def _prepare_sum(
    g: Tensor,
    full: Tensor,
    repeated: Tensor,
    d_full: Tensor | None,
    total: Tensor,
    *dims: int,
) -> PreparedLaunch | None:
    plan = _plan_sum(g, full, repeated, d_full, *dims)
    if plan is None:
        return None
    m, n = plan.arguments[:2]
    terms, sums = (m, n) if plan.constants["OF_ROWS"] else (n, m)
    operands = g, full, repeated, d_full, total
    # The kernels take a pointer even where they write nothing.
    tensors = 0, 1, 2, 0 if d_full is None else 3
    return PreparedLaunch(operands, *sum_steps(plan, terms, sums, tensors, 4, total, 5), (4,))


def _launch(make: Callable[..., Plan | None], wrap: Wrap, *tensors: Tensor | None) -> None:
    """Launch a plan. The last of ``tensors`` are results, of which some may be None."""
    out = next(t for t in reversed(tensors) if t is not None)
    if out.numel() == 0:
        return
    launch = prepared(_prepare, wrap, tensors, (make,))
    if launch is not None:
        launch.run(wrap, tensors)
        return
    # A tensor at one index of the outermost dimension has a dimension less, and is a view.
    dim = max(range(out.dim()), key=lambda d: (out.shape[d] > 1, out.stride(d)))
    for index in range(out.shape[dim]):
        _launch(make, wrap, *(None if t is None else t.select(dim, index) for t in tensors))


def _prepare(*arguments: Any) -> PreparedLaunch | None:
    """The launch of the plan that the last argument makes of the tensors before it."""
    *tensors, make = arguments
    plan = make(*tensors)
    if plan is None:
        return None
    # The kernels take a pointer even where they write nothing.
    given = max(i for i, t in enumerate(tensors) if t is not None)
    places = tuple(given if t is None else i for i, t in enumerate(tensors))
    return PreparedLaunch(tensors, [Step(plan, places)], [], (given,))


def _plan_forward(a: Tensor, b: Tensor, out: Tensor) -> Plan | None:
    return _plan(maximum_flat_kernel, maximum_strided_kernel, {"A": a, "B": b}, out, {})


def _plan_backward(
    g: Tensor, a: Tensor, b: Tensor, da: Tensor | None, db: Tensor | None
) -> Plan | None:
    operands = {"G": g, "A": a, "B": b}
    writes = {"WRITES_A": da is not None, "WRITES_B": db is not None}
    out = db if da is None else da
    assert out is not None
    return _plan(
        maximum_backward_flat_kernel, maximum_backward_strided_kernel, operands, out, writes
    )


def _plan_sum(
    g: Tensor, full: Tensor, repeated: Tensor, d_full: Tensor | None, *dims: int
) -> Plan | None:
    """The plan of a sum over ``dims`` of the gradient of ``repeated``.

    None unless the result is a matrix in memory, and all its rows, or all its columns, are summed.
    """
    of_sum, step = [0] * g.dim(), 1
    for d in reversed(range(g.dim())):
        if d not in dims:
            of_sum[d], step = step, step * g.shape[d]
    # The order of dimensions in memory is that of an operand that repeats nowhere.
    order = next((t for t in (d_full, full, g) if t is not None and 0 not in t.stride()), g)
    operands = [*(t.stride() for t in (g, full, repeated)), tuple(of_sum)]
    (*first, n), strides = _collapse(g.shape, order.stride(), operands)
    if not first:  # all elements are summed
        first, strides = [1], [[0, *steps] for steps in strides]
        strides[-1] = [1, 0]
    by_rows, by_columns = strides[-1] == [0, 1], strides[-1] == [1, 0]
    if len(first) > 1 or not (by_rows or by_columns):
        return None
    (m,) = first
    block_m, block_n, each, stages = (divide_rows if by_rows else divide_columns)(m, n, g)
    if by_rows:
        programs = triton.cdiv(m, each) * triton.cdiv(n, block_n)
    else:
        programs = triton.cdiv(m, block_m) * triton.cdiv(n, each)
    constants = {
        "OF_ROWS": by_rows,
        "G_REPEATS": "columns" if strides[0][1] == 0 else "",
        "WRITES_FULL": d_full is not None,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "STAGES": stages,
    }
    step = strides[2][1 if by_rows else 0]
    arguments = m, n, each, *strides[0], *strides[1], step
    return Plan(maximum_backward_sums_kernel, programs, arguments, constants, {})


def _plan(
    flat: TritonKernel,
    strided: TritonKernel,
    operands: dict[str, Tensor],
    out: Tensor,
    writes: dict[str, bool],
) -> Plan | None:
    """The plan of the flat or the strided kernel; None for more than `STRIDED_DIMS` dimensions."""
    sizes, strides = _collapse(out.shape, out.stride(), [t.stride() for t in operands.values()])
    if len(sizes) == 1 and all(steps[0] in (0, 1) for steps in strides):
        # Small elements get half the block: with more, the masked branch takes too many registers.
        block = FLAT_BYTES // out.element_size() // (2 if out.element_size() < 4 else 1)
        constants: dict[str, int | str] = {
            f"{n}_REPEATS": bool(s[0] == 0) for n, s in zip(operands, strides, strict=True)
        }
        constants |= writes | {"BLOCK": block}
        return Plan(flat, triton.cdiv(out.numel(), block), (out.numel(),), constants, {})
    missing = STRIDED_DIMS - len(sizes)
    if missing < 0:
        return None
    # Dimensions of size 1 become the inner dimensions of the rows, so that the kernel divides by 1.
    size0, size1, size2, size3 = sizes[:-1] + [1] * missing + sizes[-1:]
    padded = [steps[:-1] + [0] * missing + steps[-1:] for steps in strides]
    rows = size0 * size1 * size2
    most = STRIDED_ROW_BYTES // out.element_size()
    block_cols = next(c for c in (16, 64, 256, 512, most) if c >= hint(size3) or c == most)
    block = min(STRIDED_BYTES // out.element_size(), STRIDED_ELEMENTS[len(operands) - 1])
    block_rows = block // block_cols if len(sizes) > 1 else 1
    col_blocks = triton.cdiv(size3, block_cols)
    constants = {f"{n}_REPEATS": _repeats(s) for n, s in zip(operands, padded, strict=True)}
    constants |= writes | {"BLOCK_ROWS": block_rows, "BLOCK_COLS": block_cols}
    return Plan(
        strided,
        triton.cdiv(rows, block_rows) * col_blocks,
        (col_blocks, rows, size1, size2, size3, *(step for steps in padded for step in steps)),
        constants,
        {},
    )


def _repeats(strides: list[int]) -> str:
    """The dimension along which an operand repeats: "columns", "rows", or "" for neither."""
    if strides[-1] == 0:
        return "columns"
    return "rows" if all(step == 0 for step in strides[:-1]) else ""


def _collapse(
    shape: Sequence[int], order: Sequence[int], operands: Sequence[Sequence[int]]
) -> tuple[list[int], list[list[int]]]:
    """Sizes, and the strides of each operand, in as few dimensions as the strides allow.

    ``order`` and ``operands`` are strides of tensors of ``shape``. The dimensions are sorted by
    ``order``.
    """
    if 0 not in order and all(strides == order for strides in operands):
        return [math.prod(shape)], [[1]] * len(operands)
    dims = [d for d in range(len(shape)) if shape[d] != 1]
    dims.sort(key=lambda d: order[d], reverse=True)
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in operands]
    for d in dims:
        steps = [operand[d] for operand in operands]
        if sizes and all(s[-1] == step * shape[d] for s, step in zip(strides, steps, strict=True)):
            sizes[-1] *= shape[d]
            for s, step in zip(strides, steps, strict=True):
                s[-1] = step
        else:
            sizes.append(shape[d])
            for s, step in zip(strides, steps, strict=True):
                s.append(step)
    return sizes or [1], strides if sizes else [[1]] * len(operands)
