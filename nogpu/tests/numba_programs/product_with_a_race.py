# SPDX-License-Identifier: MIT
# Wrong: race: each thread takes a column of X, and all of them add to the same element.
import numpy as np
from numba import cuda


@cuda.jit
def product_kernel(x, out):
    rows, columns = x.shape
    for k in range(cuda.threadIdx.x, columns, cuda.blockDim.x):
        for i in range(rows):
            for j in range(rows):
                out[i, j] += x[i, k] * x[j, k]  # fault


x = np.random.default_rng(0).random((3, 1024))
product_kernel[1, 1024](x, np.zeros((3, 3)))
