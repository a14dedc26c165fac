# SPDX-License-Identifier: MIT
# maximum
import torch
import triton
import triton.language as tl


@triton.jit
def larger(a, b, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y = tl.load(a + i, mask=i < n), tl.load(b + i, mask=i < n)
    tl.store(out + i, tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL), mask=i < n)


class ModelNew(torch.nn.Module):
    def forward(self, a, b):
        a, b = a.contiguous(), b.contiguous()
        out = torch.empty_like(a)
        if out.numel():
            larger[(triton.cdiv(a.numel(), 1024),)](a, b, out, a.numel(), BLOCK=1024)
        return out
