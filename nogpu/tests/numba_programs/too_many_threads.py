# SPDX-License-Identifier: MIT
# Wrong: launch failure: set_kernel[(1, 1, 1), (64, 32, 1)] has 2,048 threads in a block
import numpy as np
from numba import cuda


@cuda.jit
def set_kernel(out):
    i, j = cuda.grid(2)
    if i < out.shape[0] and j < out.shape[1]:
        out[i, j] = 1


set_kernel[1, (64, 32)](cuda.device_array((64, 32), np.int32))  # fault
