# SPDX-License-Identifier: MIT
# Wrong: uninitialised memory: the grid has 200 threads, and copy_to_host copies 250 elements.
import numpy as np
from numba import cuda


@cuda.jit
def double_kernel(x, out):
    i = cuda.grid(1)
    if i < out.size:
        out[i] = 2 * x[i]


x = cuda.to_device(np.ones(250))
out = cuda.device_array_like(x)
double_kernel[x.size // 100, 100](x, out)
out.copy_to_host()  # fault
