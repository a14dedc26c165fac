# SPDX-License-Identifier: MIT
# Wrong: race: a thread reads what another warp writes to shared memory, without a barrier.
import numpy as np
from numba import cuda, float32


@cuda.jit
def reverse_kernel(x, out):
    held = cuda.shared.array(128, float32)
    thread = cuda.threadIdx.x
    held[thread] = x[thread]  # fault
    out[thread] = held[127 - thread]  # fault


x = cuda.to_device(np.arange(128, dtype=np.float32))
reverse_kernel[1, 128](x, cuda.device_array_like(x))
