# SPDX-License-Identifier: MIT
# gelu
import torch
import triton
import triton.language as tl


@triton.jit
def gelu(x, out, columns, down, right, BLOCK: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + row * down + i * right, mask=i < columns)
    tl.store(
        out + row * columns + i, 0.5 * v * (1 + tl.erf(v / 1.4142135623730951)), mask=i < columns
    )


class ModelNew(torch.nn.Module):
    def forward(self, x):
        out = torch.empty(x.shape, device=x.device)
        if out.numel():
            block = triton.next_power_of_2(x.shape[1])
            gelu[(x.shape[0],)](x, out, x.shape[1], *x.stride(), BLOCK=block)
        return out
