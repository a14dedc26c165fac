# SPDX-License-Identifier: MIT
# softmax
import torch
import triton
import triton.language as tl


@triton.jit
def softmax(x, out, columns, BLOCK: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    most, total = -float("inf"), 0.0
    for start in range(0, columns, BLOCK):
        v = tl.load(x + row * columns + start + i, mask=start + i < columns, other=-float("inf"))
        new = tl.maximum(most, tl.max(v, 0), propagate_nan=tl.PropagateNan.ALL)
        total = total * tl.exp(most - new) + tl.sum(tl.exp(v - new), 0)
        most = new
    for start in range(0, columns, BLOCK):
        v = tl.load(x + row * columns + start + i, mask=start + i < columns, other=0.0)
        tl.store(
            out + row * columns + start + i, tl.exp(v - most) / total, mask=start + i < columns
        )


class ModelNew(torch.nn.Module):
    def forward(self, x):
        x, rows, columns = x.contiguous(), x.shape[0], x.shape[1]
        out = torch.empty_like(x)
        if out.numel():
            softmax[(rows,)](x, out, columns, BLOCK=16)
        return out
