# SPDX-License-Identifier: MIT
"""Triton kernels launched as in a first course: one program per row, and a single program.

A GPU runs several programs at once on each of its processors; an H200 has 132 processors. A thousand
programs of one row each keep it busy. A single program leaves all processors but one idle, however many
threads it has. torchpar's own kernels have tiles whose sizes are chosen by measurement.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def maximum_row_kernel(a_ptr, b_ptr, out_ptr, columns, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * columns + tl.arange(0, BLOCK)
    mask = tl.arange(0, BLOCK) < columns
    a, b = tl.load(a_ptr + at, mask=mask), tl.load(b_ptr + at, mask=mask)
    tl.store(out_ptr + at, tl.maximum(a, b), mask=mask)


@triton.jit
def matmul_t_rows_kernel(x_ptr, out_ptr, rows, n, k, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Compute ``rows`` rows of the result per program, ``BLOCK_N`` numbers at a time."""
    first = tl.program_id(0).to(tl.int64) * rows
    for i in range(first, tl.minimum(first + rows, n)):
        for block in range(0, n, BLOCK_N):
            j = block + tl.arange(0, BLOCK_N)
            total = tl.zeros([BLOCK_N], tl.float32)
            for start in range(0, k, BLOCK_K):
                m = start + tl.arange(0, BLOCK_K)
                left = tl.load(x_ptr + i * k + m, mask=m < k, other=0.0)
                at = j[:, None].to(tl.int64) * k + m[None, :]
                right = tl.load(x_ptr + at, mask=(j < n)[:, None] & (m < k)[None, :], other=0.0)
                total += tl.sum(left[None, :] * right, axis=1)
            tl.store(out_ptr + i * n + j, total, mask=j < n)


def maximum_by_rows(a: Tensor, b: Tensor) -> Tensor:
    """Return the elementwise maximum of two contiguous ``(rows, columns)``, by one program per row."""
    result = torch.empty_like(a)
    rows, columns = a.shape
    if result.numel():
        block = triton.next_power_of_2(columns)
        warps = max(1, min(32, block // 32))  # a thread per number, up to the 1024 of a block
        maximum_row_kernel[(rows,)](a, b, result, columns, BLOCK=block, num_warps=warps)
    return result


def matmul_t_by_rows(x: Tensor) -> Tensor:
    """Return ``x·xᵀ`` of a contiguous float32 ``(n, k)``, by one program per row of the result."""
    return _matmul_t(x, programs=len(x))


def matmul_t_by_one(x: Tensor) -> Tensor:
    """Return ``x·xᵀ`` of a contiguous float32 ``(n, k)``, by one program of 1024 threads."""
    return _matmul_t(x, programs=1)


def _matmul_t(x: Tensor, programs: int) -> Tensor:
    n, k = x.shape
    result = x.new_empty(n, n)
    if n == 0:
        return result
    rows = triton.cdiv(n, programs)
    # 32 warps of 32 threads: a block has at most 1024 threads.
    matmul_t_rows_kernel[(programs,)](x, result, rows, n, k, BLOCK_N=64, BLOCK_K=64, num_warps=32)
    return result


SHAPES: dict[str, dict[str, Callable[..., Tensor]]] = {
    "maximum": {"a program per row": maximum_by_rows},
    "matmul_t": {"a program per row": matmul_t_by_rows, "a single program": matmul_t_by_one},
}
