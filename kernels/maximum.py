# SPDX-License-Identifier: MIT
"""Kernels of the elementwise maximum and of its backward.

Each array passes through memory once, 16 bytes per access. An operand that repeats along the rows
or the columns of a tile is read once for all of them.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Kernel, Plan, Wrap, cached_plan

FLAT_BYTES = 4096  # of a result per program: 2 accesses of 16 bytes for each of 128 threads
# Of a result per program, at most: 4 rows, for which values that repeat along rows are read once.
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
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    if start + BLOCK <= numel:
        g = load_flat(g_ptr, start, offsets, None, G_REPEATS)
        a = load_flat(a_ptr, start, offsets, None, A_REPEATS)
        b = load_flat(b_ptr, start, offsets, None, B_REPEATS)
        da, db = gradients(g, a, b)
        tl.store(da_ptr + start + offsets, da)
        tl.store(db_ptr + start + offsets, db)
    else:
        mask = offsets < numel - start
        g = load_flat(g_ptr, start, offsets, mask, G_REPEATS)
        a = load_flat(a_ptr, start, offsets, mask, A_REPEATS)
        b = load_flat(b_ptr, start, offsets, mask, B_REPEATS)
        da, db = gradients(g, a, b)
        tl.store(da_ptr + start + offsets, da, mask=mask)
        tl.store(db_ptr + start + offsets, db, mask=mask)


@triton.jit
def rows_and_columns(col_blocks, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """This program's rows and columns of a dense result, whose rows are its last dimension."""
    program = tl.program_id(0)
    row = (program // col_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = (program % col_blocks).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    return row, col


@triton.jit
def load_strided(
    ptr,
    row,
    col,
    rows,
    size1,
    size2,
    size3,
    stride0,
    stride1,
    stride2,
    stride3,
    REPEATS: tl.constexpr,
):
    """Rows are the elements of dimensions of sizes (size0, size1, size2).

    Divisions by 1 cost nothing.
    """
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
    a = load_strided(
        a_ptr,
        row,
        col,
        rows,
        size1,
        size2,
        size3,
        a_stride0,
        a_stride1,
        a_stride2,
        a_stride3,
        A_REPEATS,
    )
    b = load_strided(
        b_ptr,
        row,
        col,
        rows,
        size1,
        size2,
        size3,
        b_stride0,
        b_stride1,
        b_stride2,
        b_stride3,
        B_REPEATS,
    )
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
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row, col = rows_and_columns(col_blocks, BLOCK_ROWS, BLOCK_COLS)
    g = load_strided(
        g_ptr,
        row,
        col,
        rows,
        size1,
        size2,
        size3,
        g_stride0,
        g_stride1,
        g_stride2,
        g_stride3,
        G_REPEATS,
    )
    a = load_strided(
        a_ptr,
        row,
        col,
        rows,
        size1,
        size2,
        size3,
        a_stride0,
        a_stride1,
        a_stride2,
        a_stride3,
        A_REPEATS,
    )
    b = load_strided(
        b_ptr,
        row,
        col,
        rows,
        size1,
        size2,
        size3,
        b_stride0,
        b_stride1,
        b_stride2,
        b_stride3,
        B_REPEATS,
    )
    da, db = gradients(g, a, b)
    mask = (row < rows)[:, None] & (col < size3)[None, :]
    offsets = (row * size3)[:, None] + col[None, :]
    tl.store(da_ptr + offsets, da, mask=mask)
    tl.store(db_ptr + offsets, db, mask=mask)


def maximum(a: Tensor, b: Tensor, out: Tensor, wrap: Wrap) -> None:
    """``out = max(a, b)``; ``a`` and ``b`` of ``out``'s shape (strides may be 0), ``out`` dense."""
    if out.dtype == torch.bool:
        a, b, out = (t.view(torch.uint8) for t in (a, b, out))
    _launch(_plan_forward, wrap, a, b, out)


def maximum_backward(g: Tensor, a: Tensor, b: Tensor, da: Tensor, db: Tensor, wrap: Wrap) -> None:
    """Write the gradients ``da`` and ``db``, which are dense and have the same strides.

    ``g``, ``a`` and ``b`` have their shape.
    """
    _launch(_plan_backward, wrap, g, a, b, da, db)


def _launch(make: Callable[..., Plan | None], wrap: Wrap, *tensors: Tensor) -> None:
    out = tensors[-1]
    if out.numel() == 0:
        return
    plan = cached_plan(make, wrap, tensors)
    if plan is not None:
        plan.launch(wrap, *tensors)
        return
    # A tensor at one index of the outermost dimension has a dimension less, and is a view.
    dim = max(range(out.dim()), key=lambda d: (out.shape[d] > 1, out.stride(d)))
    for index in range(out.shape[dim]):
        _launch(make, wrap, *(t.select(dim, index) for t in tensors))


def _plan_forward(a: Tensor, b: Tensor, out: Tensor) -> Plan | None:
    return _plan(maximum_flat_kernel, maximum_strided_kernel, {"A": a, "B": b}, out)


def _plan_backward(g: Tensor, a: Tensor, b: Tensor, da: Tensor, db: Tensor) -> Plan | None:
    operands = {"G": g, "A": a, "B": b}
    return _plan(maximum_backward_flat_kernel, maximum_backward_strided_kernel, operands, da)


def _plan(flat: Kernel, strided: Kernel, operands: dict[str, Tensor], out: Tensor) -> Plan | None:
    """The plan of the flat or the strided kernel; None for more dimensions than the latter has."""
    sizes, strides = _collapse(list(operands.values()), out)
    if len(sizes) == 1 and all(steps[0] in (0, 1) for steps in strides):
        # Small elements get half the block: with more, the masked branch takes too many registers.
        block = FLAT_BYTES // out.element_size() // (2 if out.element_size() < 4 else 1)
        constants: dict[str, int | str] = {
            f"{n}_REPEATS": bool(s[0] == 0) for n, s in zip(operands, strides, strict=True)
        }
        constants["BLOCK"] = block
        return Plan(flat, triton.cdiv(out.numel(), block), (out.numel(),), constants, {})
    missing = STRIDED_DIMS - len(sizes)
    if missing < 0:
        return None
    # Dimensions of size 1 become the rows' inner dimensions, so that divisions are divisions by 1.
    size0, size1, size2, size3 = sizes[:-1] + [1] * missing + sizes[-1:]
    padded = [steps[:-1] + [0] * missing + steps[-1:] for steps in strides]
    rows = size0 * size1 * size2
    most = STRIDED_ROW_BYTES // out.element_size()
    block_cols = next(c for c in (16, 64, 256, 512, most) if c >= size3 or c == most)
    block = min(STRIDED_BYTES // out.element_size(), STRIDED_ELEMENTS[len(operands) - 1])
    block_rows = block // block_cols if len(sizes) > 1 else 1
    col_blocks = triton.cdiv(size3, block_cols)
    constants = {f"{n}_REPEATS": _repeats(s) for n, s in zip(operands, padded, strict=True)}
    constants |= {"BLOCK_ROWS": block_rows, "BLOCK_COLS": block_cols}
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


def _collapse(operands: list[Tensor], out: Tensor) -> tuple[list[int], list[list[int]]]:
    """Sizes, and each operand's strides, along ``out``'s memory, in the fewest dimensions."""
    if all(t.stride() == out.stride() for t in operands):
        return [out.numel()], [[1]] * len(operands)
    dims = [d for d in range(out.dim()) if out.shape[d] != 1]
    dims.sort(key=out.stride, reverse=True)
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in operands]
    for d in dims:
        steps = [t.stride(d) for t in operands]
        if sizes and all(
            s[-1] == step * out.shape[d] for s, step in zip(strides, steps, strict=True)
        ):
            sizes[-1] *= out.shape[d]
            for s, step in zip(strides, steps, strict=True):
                s[-1] = step
        else:
            sizes.append(out.shape[d])
            for s, step in zip(strides, steps, strict=True):
                s.append(step)
    return sizes or [1], strides if sizes else [[1]] * len(operands)
