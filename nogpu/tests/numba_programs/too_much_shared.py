# SPDX-License-Identifier: MIT
# Wrong: launch failure: 65,536 bytes of shared memory are more than Numba asks a GPU for.
import numpy as np
from numba import cuda, float64


@cuda.jit
def copy_kernel(x, out):
    held = cuda.shared.array(0, float64)
    thread = cuda.threadIdx.x
    held[thread] = x[thread]
    cuda.syncthreads()
    out[thread] = held[thread]


x = cuda.to_device(np.ones(64))
copy_kernel[1, 64, 0, 65_536](x, cuda.device_array_like(x))  # fault
