# SPDX-License-Identifier: MIT
# Wrong: out of bounds: thread 104 of the last block loads x[1000], for which it does not check.
import numpy as np
from numba import cuda


@cuda.jit
def double_kernel(x, out):
    i = cuda.grid(1)
    out[i] = 2 * x[i]  # fault


x = cuda.to_device(np.ones(1000, np.float32))
double_kernel[8, 128](x, cuda.device_array_like(x))
