# SPDX-License-Identifier: MIT
# softmax
import torch
import triton
import triton.language as tl


@triton.jit
def softmax(x, out, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    i = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (i < columns)
    v = tl.load(x + row * columns + i, mask=mask, other=0.0)
    v = tl.where(i < columns, v, -float("inf"))
    e = tl.exp(v - tl.max(v, 1)[:, None])
    tl.store(out + row * columns + i, e / tl.sum(e, 1)[:, None], mask=mask)


class ModelNew(torch.nn.Module):
    def forward(self, x):
        x, rows, columns = x.contiguous(), x.shape[0], x.shape[1]
        out = torch.empty_like(x)
        if out.numel():
            softmax[(triton.cdiv(rows, 4),)](
                x, out, rows, columns, ROWS=4, BLOCK=triton.next_power_of_2(columns)
            )
        return out
