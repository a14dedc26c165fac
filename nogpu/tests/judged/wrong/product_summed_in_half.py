# SPDX-License-Identifier: MIT
# product: special values: large: off by inf
import torch
import triton
import triton.language as tl


@triton.jit
def product(a, b, out, M, N, K, SIDE: tl.constexpr):
    m = tl.program_id(0) * SIDE + tl.arange(0, SIDE)[:, None]
    n = tl.program_id(1) * SIDE + tl.arange(0, SIDE)[None, :]
    total = tl.zeros((SIDE, SIDE), tl.float16)
    for start in range(0, K, SIDE):
        k = start + tl.arange(0, SIDE)
        x = tl.load(a + m * K + k[None, :], mask=(m < M) & (k[None, :] < K), other=0.0)
        y = tl.load(b + k[:, None] * N + n, mask=(n < N) & (k[:, None] < K), other=0.0)
        total = tl.dot(x, y, total, out_dtype=tl.float16)
    tl.store(out + m * N + n, total.to(tl.float16), mask=(m < M) & (n < N))


def custom_kernel(data):
    a, b, out = data
    a, b = a.contiguous(), b.contiguous()
    (m, k), n = a.shape, b.shape[1]
    result = out if out.is_contiguous() else torch.empty(m, n, dtype=out.dtype, device=out.device)
    if result.numel():
        product[triton.cdiv(m, 16), triton.cdiv(n, 16)](a, b, result, m, n, k, SIDE=16)
    if result is not out:
        out.copy_(result)
    return out
