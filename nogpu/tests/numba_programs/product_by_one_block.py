# SPDX-License-Identifier: MIT
# Right: X·Xᵀ by one block of 1,024 threads, each of which computes several elements; the arrays
# are the host's, which Numba copies.
import numpy as np
from numba import cuda


@cuda.jit
def product_kernel(x, out):
    rows, columns = x.shape
    for n in range(cuda.threadIdx.x, rows * rows, cuda.blockDim.x):
        i, j = n // rows, n % rows
        total = 0
        for k in range(columns):
            total += x[i, k] * x[j, k]
        out[i, j] = total


x = np.random.default_rng(0).integers(0, 10, (40, 30))
out = np.zeros((40, 40), x.dtype)
product_kernel[1, 1024](x, out)
assert (out == x @ x.T).all()
