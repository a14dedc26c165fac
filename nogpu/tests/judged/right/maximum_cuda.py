# SPDX-License-Identifier: MIT
# maximum
import torch

import nogpu.cuda

KERNELS = nogpu.cuda.compile("""
extern "C" __global__ void larger(const float *a, const float *b, float *out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float x = a[i], y = b[i];
    out[i] = x >= y || x != x ? x : y;
}
""")


class ModelNew(torch.nn.Module):
    def forward(self, a, b):
        a, b = a.contiguous(), b.contiguous()
        out = torch.empty_like(a)
        if out.numel():
            KERNELS["larger"][-(-a.numel() // 128), 128](a, b, out, a.numel())
        return out
