# SPDX-License-Identifier: MIT
"""Kernels of the elementwise maximum: each array passes through memory once, 16 bytes per access."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Plan, Wrap, planned

FLAT_BYTES = 4096  # of the result per program: 2 accesses of 16 bytes for each of 128 threads
STRIDED_BLOCK = 1024
STRIDED_DIMS = 4


@triton.jit
def maximum_flat_kernel(a_ptr, b_ptr, out_ptr, numel, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    a_ptr += start
    b_ptr += start
    out_ptr += start
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if start + BLOCK <= numel:  # a mask would split the vector accesses
        a = tl.load(a_ptr + offsets).to(dtype)
        b = tl.load(b_ptr + offsets).to(dtype)
        tl.store(out_ptr + offsets, tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL))
    else:
        mask = offsets < numel - start
        a = tl.load(a_ptr + offsets, mask=mask).to(dtype)
        b = tl.load(b_ptr + offsets, mask=mask).to(dtype)
        tl.store(out_ptr + offsets, tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL), mask=mask)


@triton.jit
def maximum_strided_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
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
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """The maximum, for a dense result of sizes (size0, size1, size2, size3); rows are its last dimension."""
    col_blocks = (size3 - 1) // BLOCK_COLS + 1  # tl.cdiv overflows just below 2³¹
    program = tl.program_id(0).to(tl.int64)
    row = program // col_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = program % col_blocks * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    mask = (row < rows)[:, None] & (col < size3)[None, :]
    i0 = row // size2 // size1
    i1 = row // size2 % size1
    i2 = row % size2
    a_row = i0 * a_stride0 + i1 * a_stride1 + i2 * a_stride2
    b_row = i0 * b_stride0 + i1 * b_stride1 + i2 * b_stride2
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    a = tl.load(a_ptr + (a_row[:, None] + (col * a_stride3)[None, :]), mask=mask).to(dtype)
    b = tl.load(b_ptr + (b_row[:, None] + (col * b_stride3)[None, :]), mask=mask).to(dtype)
    out = out_ptr + ((row * size3)[:, None] + col[None, :])
    tl.store(out, tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL), mask=mask)


def maximum(a: Tensor, b: Tensor, out: Tensor, wrap: Wrap) -> None:
    """``out = max(a, b)``; ``a`` and ``b`` of ``out``'s shape (strides may be 0), ``out`` dense."""
    if out.numel() == 0:
        return
    if out.dtype == torch.bool:
        a, b, out = (t.view(torch.uint8) for t in (a, b, out))
    plan = planned(_plan, wrap, (a, b, out))
    if plan is not None:
        plan.launch(wrap, a, b, out)
        return
    # A slice of the outermost dimension has one dimension less, and is a view.
    dim = max(range(out.dim()), key=lambda d: (out.shape[d] > 1, out.stride(d)))
    for index in range(out.shape[dim]):
        maximum(a.select(dim, index), b.select(dim, index), out.select(dim, index), wrap)


def _plan(a: Tensor, b: Tensor, out: Tensor) -> Plan | None:
    """None where the strided kernel has too few dimensions."""
    sizes, a_strides, b_strides = ([out.numel()], [1], [1])
    if not (a.stride() == out.stride() and b.stride() == out.stride()):
        sizes, a_strides, b_strides = _collapse(a, b, out)
    if len(sizes) == 1 and a_strides == b_strides == [1]:
        # Small elements get half the block: with more, the masked branch takes too many registers.
        block = FLAT_BYTES // out.element_size() // (2 if out.element_size() < 4 else 1)
        programs = triton.cdiv(out.numel(), block)
        return Plan(maximum_flat_kernel, programs, (out.numel(),), {"BLOCK": block}, {})
    missing = STRIDED_DIMS - len(sizes)
    if missing < 0:
        return None
    size0, size1, size2, size3 = [1] * missing + sizes
    rows = size0 * size1 * size2
    block_cols = next(c for c in (16, 64, 256, STRIDED_BLOCK) if c >= size3 or c == STRIDED_BLOCK)
    block_rows = STRIDED_BLOCK // block_cols
    return Plan(
        maximum_strided_kernel,
        triton.cdiv(rows, block_rows) * triton.cdiv(size3, block_cols),
        (rows, size1, size2, size3, *[0] * missing, *a_strides, *[0] * missing, *b_strides),
        {"BLOCK_ROWS": block_rows, "BLOCK_COLS": block_cols},
        {},
    )


def _collapse(a: Tensor, b: Tensor, out: Tensor) -> tuple[list[int], list[int], list[int]]:
    """Sizes and strides of ``a`` and ``b`` along ``out``'s memory, in as few dimensions as possible."""
    dims = [d for d in range(out.dim()) if out.shape[d] != 1]
    dims.sort(key=out.stride, reverse=True)
    sizes: list[int] = []
    strides: tuple[list[int], list[int]] = ([], [])
    for d in dims:
        size, steps = out.shape[d], (a.stride(d), b.stride(d))
        if sizes and all(s[-1] == step * size for s, step in zip(strides, steps, strict=True)):
            sizes[-1] *= size
            for s, step in zip(strides, steps, strict=True):
                s[-1] = step
        else:
            sizes.append(size)
            for s, step in zip(strides, steps, strict=True):
                s.append(step)
    return sizes or [1], strides[0] or [1], strides[1] or [1]
