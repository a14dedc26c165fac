# SPDX-License-Identifier: MIT
# Wrong: launch failure: a block of 64 times 32 threads is larger than any GPU has.
import numpy as np
from numba import cuda


@cuda.jit
def set_kernel(out):
    i, j = cuda.grid(2)
    if i < out.shape[0] and j < out.shape[1]:
        out[i, j] = 1


set_kernel[1, (64, 32)](cuda.device_array((64, 32), np.int32))  # fault
