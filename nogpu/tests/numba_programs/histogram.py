# SPDX-License-Identifier: MIT
# Right: a histogram by atomics in shared memory, and then in global memory.
import numpy as np
from numba import cuda, int32

BINS = 16


@cuda.jit
def histogram_kernel(x, counts):
    mine = cuda.shared.array(BINS, int32)
    if cuda.threadIdx.x < BINS:
        mine[cuda.threadIdx.x] = 0
    cuda.syncthreads()
    for i in range(cuda.grid(1), x.size, cuda.gridsize(1)):
        cuda.atomic.add(mine, x[i], 1)
    cuda.syncthreads()
    if cuda.threadIdx.x < BINS:
        cuda.atomic.add(counts, cuda.threadIdx.x, mine[cuda.threadIdx.x])


x = np.random.default_rng(0).integers(0, BINS, 3000)
counts = cuda.to_device(np.zeros(BINS, np.int32))
histogram_kernel[5, 64](cuda.to_device(x), counts)
assert (counts.copy_to_host() == np.bincount(x, minlength=BINS)).all()
