# SPDX-License-Identifier: MIT
# softmax
import torch
import triton
import triton.language as tl


@triton.jit
def exponents(x, out, columns, BLOCK: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + row * columns + i, mask=i < columns, other=-float("inf"))
    tl.store(out + row * columns + i, tl.exp(v - tl.max(v, 0)), mask=i < columns)


@triton.jit
def normalize(out, columns, BLOCK: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    e = tl.load(out + row * columns + i, mask=i < columns, other=0.0)
    tl.store(out + row * columns + i, e / tl.sum(e, 0), mask=i < columns)


class ModelNew(torch.nn.Module):
    def forward(self, x):
        x, rows, columns = x.contiguous(), x.shape[0], x.shape[1]
        out = torch.empty_like(x)
        if out.numel():
            block = triton.next_power_of_2(columns)
            exponents[(rows,)](x, out, columns, BLOCK=block)
            normalize[(rows,)](out, columns, BLOCK=block)
        return out
