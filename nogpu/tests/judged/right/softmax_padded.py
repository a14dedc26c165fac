# SPDX-License-Identifier: MIT
# softmax
import torch
import triton
import triton.language as tl


@triton.jit
def softmax(x, out, columns, BLOCK: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + row * BLOCK + i)
    e = tl.exp(v - tl.max(v, 0))
    tl.store(out + row * columns + i, e / tl.sum(e, 0), mask=i < columns)


class ModelNew(torch.nn.Module):
    def forward(self, x):
        rows, columns = x.shape
        wide = triton.next_power_of_2(max(columns, 1))
        lowest = -float("inf")
        x = torch.nn.functional.pad(x, (0, wide - columns), value=lowest)
        out = torch.empty(rows, columns, device=x.device)
        if out.numel():
            softmax[(rows,)](x, out, columns, wide)
        return out
