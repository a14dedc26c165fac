# SPDX-License-Identifier: MIT
# Right: slices of a device array, whose ends are NumPy's integers (NVIDIA/numba-cuda#623).
import numpy as np
from numba import cuda


@cuda.jit
def add_kernel(x, number):
    i = cuda.grid(1)
    if i < x.size:
        x[i] += number


x = cuda.to_device(np.zeros(1152, np.float32))
add_kernel[36, 32](x[np.int32(0) : np.int32(1152)], np.int8(1))
for start in (np.int32(64), np.uint8(64), np.int64(64)):
    add_kernel[np.int32(1), np.int64(32)](x[start : start + 32], np.uint64(2))
x[np.int32(3)] = 9
expected = np.ones(1152, np.float32)
expected[64:96], expected[3] = 7, 9
assert (x.copy_to_host() == expected).all()
