# SPDX-License-Identifier: MIT
# layer_norm
import torch
import triton
import triton.language as tl


@triton.jit
def norm(x, out, columns, BLOCK: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + row * columns + i, mask=i < columns, other=0.0)
    centred = tl.where(i < columns, v - tl.sum(v, 0) / columns, 0.0)
    variance = tl.sum(centred * centred, 0) / columns
    tl.store(out + row * columns + i, centred * tl.rsqrt(variance + 1e-5), mask=i < columns)


class ModelNew(torch.nn.Module):
    def forward(self, x):
        x = x.contiguous()
        out = torch.empty_like(x)
        if out.numel():
            norm[(x.shape[0],)](x, out, x.shape[1], BLOCK=triton.next_power_of_2(x.shape[1]))
        return out
