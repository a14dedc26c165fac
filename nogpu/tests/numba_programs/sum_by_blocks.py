# SPDX-License-Identifier: MIT
# Right: each block adds its part in shared memory, and its sum to that of the others by an atomic.
import numpy as np
from numba import cuda, float64


@cuda.jit
def sum_kernel(x, total):
    part = cuda.shared.array(128, float64)
    thread, i = cuda.threadIdx.x, cuda.grid(1)
    part[thread] = x[i] if i < x.size else 0.0
    cuda.syncthreads()
    width = cuda.blockDim.x // 2
    while width > 0:
        if thread < width:
            part[thread] += part[thread + width]
        cuda.syncthreads()
        width //= 2
    if thread == 0:
        cuda.atomic.add(total, 0, part[0])


x = np.random.default_rng(0).integers(-9, 10, 1000).astype(np.float64)
total = cuda.to_device(np.zeros(1))
sum_kernel[8, 128](cuda.to_device(x), total)
assert total[0] == x.sum()
