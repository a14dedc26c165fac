# SPDX-License-Identifier: MIT
# Wrong: race between blocks: blocks add to one element, and do not use an atomic.
import numpy as np
from numba import cuda


@cuda.jit
def sum_kernel(x, total):
    if cuda.threadIdx.x == 0:
        part = 0.0
        for i in range(cuda.blockDim.x):
            part += x[cuda.blockIdx.x * cuda.blockDim.x + i]
        total[0] += part  # fault


x = cuda.to_device(np.ones(256))
sum_kernel[4, 64](x, cuda.to_device(np.zeros(1)))
