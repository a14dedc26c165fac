# SPDX-License-Identifier: MIT
# linear
import torch
import triton
import triton.language as tl


@triton.jit
def linear(
    x, w, bias, out, rows, units, features, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    m = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    n = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, features, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(
            x + m * features + k[None, :], mask=(m < rows) & (k[None, :] < features), other=0.0
        )
        b = tl.load(
            w + n * features + k[:, None], mask=(n < units) & (k[:, None] < features), other=0.0
        )
        total = tl.dot(a, b, total, input_precision="ieee")
    total += tl.load(bias + n, mask=n < units, other=0.0)
    result = 1 / (1 + tl.exp(-total))
    tl.store(out + m * units + n, result, mask=(m < rows) & (n < units))


class ModelNew(torch.nn.Module):
    def __init__(self, features, units):
        super().__init__()
        self.linear = torch.nn.Linear(features, units)

    def forward(self, x):
        x, w = x.contiguous(), self.linear.weight
        out = torch.empty(x.shape[0], w.shape[0], device=x.device)
        if out.numel():
            grid = triton.cdiv(x.shape[0], 16), triton.cdiv(w.shape[0], 16)
            linear[grid](x, w, self.linear.bias, out, *out.shape, x.shape[1], BM=16, BN=16, BK=16)
        return out
