# SPDX-License-Identifier: MIT
# Wrong: out of bounds: thread 104 loads x[1000], which is outside of x: the last block has more
# threads than elements are left.
import numpy as np
from numba import cuda


@cuda.jit
def double_kernel(x, out):
    i = cuda.grid(1)
    out[i] = 2 * x[i]  # fault


x = cuda.to_device(np.ones(1000, np.float32))
double_kernel[8, 128](x, cuda.device_array_like(x))
