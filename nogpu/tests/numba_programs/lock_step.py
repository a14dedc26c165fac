# SPDX-License-Identifier: MIT
# Wrong: race within a warp: threads of a warp read each other's sums without cuda.syncwarp().
import numpy as np
from numba import cuda, float32


@cuda.jit
def warp_sum_kernel(x, out):
    part = cuda.shared.array(64, float32)
    lane = cuda.threadIdx.x
    part[lane] = x[lane]
    part[lane + 32] = 0
    width = 16
    while width > 0:
        part[lane] += part[lane + width]  # fault
        width //= 2
    if lane == 0:
        out[0] = part[0]


x = cuda.to_device(np.ones(32, np.float32))
warp_sum_kernel[1, 32](x, cuda.device_array(1, np.float32))
