# SPDX-License-Identifier: MIT
# Right: each warp adds by shuffles, and the first one adds the sums of the others.
import numpy as np
from numba import cuda, float32


@cuda.jit(device=True)
def warp_sum(value):
    offset = 16
    while offset > 0:
        value += cuda.shfl_down_sync(0xFFFFFFFF, value, offset)
        offset //= 2
    return value


@cuda.jit
def block_sum_kernel(x, out):
    sums = cuda.shared.array(32, float32)
    thread = cuda.threadIdx.x
    found = warp_sum(x[cuda.grid(1)])
    if thread % 32 == 0:
        sums[thread // 32] = found
    cuda.syncthreads()
    if thread < 32:
        found = warp_sum(sums[thread] if thread < cuda.blockDim.x // 32 else float32(0))
        if thread == 0:
            out[cuda.blockIdx.x] = found


x = np.random.default_rng(0).integers(0, 10, (3, 256)).astype(np.float32)
out = cuda.device_array(3, np.float32)
block_sum_kernel[3, 256](cuda.to_device(x.ravel()), out)
assert (out.copy_to_host() == x.sum(1)).all()
