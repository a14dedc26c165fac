# SPDX-License-Identifier: MIT
# Wrong: uninitialised memory: the threads beyond the end of x write nothing to shared memory.
import numpy as np
from numba import cuda, float32


@cuda.jit
def sum_kernel(x, out):
    held = cuda.shared.array(64, float32)
    thread = cuda.threadIdx.x
    if thread < x.size:
        held[thread] = x[thread]
    cuda.syncthreads()
    if thread == 0:
        total = float32(0)
        for i in range(64):
            total += held[i]  # fault
        out[0] = total


x = cuda.to_device(np.ones(50, np.float32))
sum_kernel[1, 64](x, cuda.device_array(1, np.float32))
