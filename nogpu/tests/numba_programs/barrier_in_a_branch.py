# SPDX-License-Identifier: MIT
# Wrong: divergent barrier: 24 threads go past the barrier at which the other 40 wait.
import numpy as np
from numba import cuda, float32


@cuda.jit
def shift_kernel(x, out):
    held = cuda.shared.array(64, float32)
    thread = cuda.threadIdx.x
    held[thread] = x[thread]
    if thread < 40:
        cuda.syncthreads()  # fault
    out[thread] = held[thread]


x = cuda.to_device(np.arange(64, dtype=np.float32))
out = cuda.to_device(np.zeros(64, np.float32))
shift_kernel[1, 64](x, out)
