# SPDX-License-Identifier: MIT
import torch
import triton
import triton.language as tl


@triton.jit  # Its load lacks a mask, which docs/ptx.md is about.
def scale(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, 2 * tl.load(x + i), mask=i < n)


x = torch.randn(1000)
out = torch.empty_like(x)
scale[(4,)](x, out, 1000, BLOCK=256)
