# SPDX-License-Identifier: MIT
"""A softmax by rows and a product of square matrices, whose counters tests know."""

import triton
import triton.language as tl


@triton.jit
def softmax_kernel(x, out, n, BLOCK: tl.constexpr):
    row, column = tl.program_id(0) * n, tl.arange(0, BLOCK)
    values = tl.load(x + row + column, column < n, other=-float("inf"))
    powers = tl.exp(values - tl.max(values, 0))
    tl.store(out + row + column, powers / tl.sum(powers, 0), column < n)


@triton.jit
def matmul_kernel(a, b, c, n, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Square matrices of n rows, a multiple of each block."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    column, k = tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BK)
    sums = tl.zeros((BM, BN), tl.float32)
    for start in range(0, n, BK):
        left = tl.load(a + m[:, None] * n + start + k[None, :])
        right = tl.load(b + (start + k)[:, None] * n + column[None, :])
        sums = tl.dot(left, right, sums)
    tl.store(c + m[:, None] * n + column[None, :], sums.to(tl.float16))
