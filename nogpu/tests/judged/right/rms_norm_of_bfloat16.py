# SPDX-License-Identifier: MIT
# rms_norm
import torch
import triton
import triton.language as tl


@triton.jit
def norm(x, weight, out, columns, BLOCK: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + row * columns + i, mask=i < columns, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(v * v, 0) / columns + 1e-6)
    w = tl.load(weight + i, mask=i < columns, other=0.0)
    tl.store(out + row * columns + i, (v * scale).to(tl.bfloat16) * w, mask=i < columns)


class ModelNew(torch.nn.Module):
    def __init__(self, features):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(features, dtype=torch.bfloat16))

    def forward(self, x):
        x, block = x.contiguous(), triton.next_power_of_2(max(x.shape[1], 1))
        out = torch.empty_like(x)
        if out.numel():
            norm[(x.shape[0],)](x, self.weight, out, x.shape[1], BLOCK=block)
        return out
