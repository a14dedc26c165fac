# SPDX-License-Identifier: MIT
# Right: Numba's own reductions, whose kernels are numba-cuda's.
import numpy as np
from numba import cuda


@cuda.reduce
def add(a, b):
    return a + b


@cuda.reduce
def largest(a, b):
    return max(a, b)


x = np.random.default_rng(0).integers(0, 100, 1000)
assert add(x) == x.sum()
assert largest(cuda.to_device(x), init=0) == x.max()
