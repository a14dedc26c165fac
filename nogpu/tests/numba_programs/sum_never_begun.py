# SPDX-License-Identifier: MIT
# Wrong: uninitialised memory: device_array holds what was there before, to which the kernel adds.
import numpy as np
from numba import cuda


@cuda.jit
def add_kernel(x, total):
    i = cuda.grid(1)
    if i < x.size:
        total[i] += x[i]  # fault


x = cuda.to_device(np.ones(100))
add_kernel[1, 128](x, cuda.device_array(100))
