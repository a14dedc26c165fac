# SPDX-License-Identifier: MIT
# Right: three dimensions of blocks and threads, arrays with other strides, and a line printed.
import numpy as np
from numba import cuda


@cuda.jit
def add_kernel(x, y, out):
    i, j, k = cuda.grid(3)
    if i < out.shape[0] and j < out.shape[1] and k < out.shape[2]:
        out[i, j, k] = x[i, j, k] + y[k, j, i]
        if i == 0 and j == 0 and k == 0:
            print("grid", cuda.gridDim.x, cuda.gridDim.y, cuda.gridDim.z)


x = np.arange(5 * 6 * 7).reshape(5, 6, 7)
y = cuda.to_device(np.arange(7 * 6 * 10).reshape(7, 6, 10))
out = cuda.device_array((5, 6, 7), np.int64, order="F")
add_kernel[(2, 2, 4), (4, 3, 2)](cuda.to_device(x), y[:, :, ::2], out)
assert (out.copy_to_host() == x + y.copy_to_host()[:, :, ::2].T).all()
