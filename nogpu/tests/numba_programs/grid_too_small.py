# SPDX-License-Identifier: MIT
# Wrong: copied before it is written: 50 of 250 elements: the grid has a thread too few for some.
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
print(out.copy_to_host().sum())  # fault
