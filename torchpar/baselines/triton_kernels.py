# SPDX-License-Identifier: MIT
"""The first kernels of a GPU course, in Triton: programs per row, one program, naive and tiled.

They are launched as in the courses, not as is fast on a GPU. `torchpar.kernels` holds tuned
kernels; docs/ladder.md says what the difference teaches. Matrices are contiguous. Without a GPU
they run in Triton's interpreter: set ``TRITON_INTERPRET=1`` before Triton is imported, and use
small matrices.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

THREADS = {"num_warps": 32}  # 32 warps of 32 threads: the course's 1024 threads in a block


@triton.jit
def maximum_row_kernel(a_ptr, b_ptr, out_ptr, columns, BLOCK: tl.constexpr):
    """Each program computes one row, each of its threads one number."""
    column = tl.arange(0, BLOCK)
    at = tl.program_id(0) * columns + column
    a = tl.load(a_ptr + at, column < columns)
    b = tl.load(b_ptr + at, column < columns)
    tl.store(out_ptr + at, tl.maximum(a, b), column < columns)


def maximum_by_rows(a: Tensor, b: Tensor) -> Tensor:
    """Return the elementwise maximum of two matrices of one shape, one program for each row."""
    out = torch.empty_like(a)
    maximum_row_kernel[(len(a),)](
        a, b, out, a.shape[1], BLOCK=triton.next_power_of_2(a.shape[1]), **THREADS
    )
    return out


@triton.jit
def matmul_t_one_program_kernel(x_ptr, out_ptr, n, k, BLOCK: tl.constexpr):
    """One program computes all rows, one after the other; each thread sums one number of a row."""
    column = tl.arange(0, BLOCK)
    for row in range(n):
        total = tl.zeros((BLOCK,), tl.float32)
        for p in range(k):
            total += tl.load(x_ptr + row * k + p) * tl.load(x_ptr + column * k + p, column < n, 0.0)
        tl.store(out_ptr + row * n + column, total, column < n)


def matmul_t_by_one_program(x: Tensor) -> Tensor:
    """Return ``x·xᵀ`` in float32, ``(n, k) → (n, n)``, by a grid of one program."""
    n, k = x.shape
    out = x.new_empty(n, n)
    matmul_t_one_program_kernel[(1,)](x, out, n, k, BLOCK=triton.next_power_of_2(n), **THREADS)
    return out


@triton.jit
def matmul_naive_kernel(a_ptr, b_ptr, out_ptr, m, n, k, BLOCK: tl.constexpr):
    """Each thread sums one number of the result; each multiply-add loads two numbers."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for p in range(k):
        a = tl.load(a_ptr + row * k + p, row < m, 0.0)
        total += a * tl.load(b_ptr + column * k + p, column < n, 0.0)
    tl.store(out_ptr + row * n + column, total, (row < m) & (column < n))


@triton.jit
def matmul_tiled_kernel(a_ptr, b_ptr, out_ptr, m, n, k, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """Each program loads tiles of both matrices once for all sums of its block of the result."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, k, DEPTH):
        across = start + tl.arange(0, DEPTH)[None, :]
        down = start + tl.arange(0, DEPTH)[:, None]
        a = tl.load(a_ptr + row * k + across, (row < m) & (across < k), 0.0)
        b = tl.load(b_ptr + column * k + down, (column < n) & (down < k), 0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    tl.store(out_ptr + row * n + column, total, (row < m) & (column < n))


def matmul_naive(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a·bᵀ`` in float32, ``a (m, k)``, ``b (n, k)``, by blocks of 32 × 32 threads."""
    (m, k), n = a.shape, len(b)
    out = a.new_empty(m, n)
    matmul_naive_kernel[(triton.cdiv(m, 32), triton.cdiv(n, 32))](
        a, b, out, m, n, k, BLOCK=32, **THREADS
    )
    return out


def matmul_tiled(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a·bᵀ`` in float32, ``a (m, k)``, ``b (n, k)``, by blocks of 64 × 64 sums."""
    (m, k), n = a.shape, len(b)
    out = a.new_empty(m, n)
    grid = (triton.cdiv(m, 64), triton.cdiv(n, 64))
    matmul_tiled_kernel[grid](a, b, out, m, n, k, BLOCK=64, DEPTH=32, num_warps=8)
    return out
