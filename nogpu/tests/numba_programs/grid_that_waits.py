# SPDX-License-Identifier: MIT
# Wrong: not executed: a grid whose blocks wait for each other, which is refused by name.
import numpy as np
from numba import cuda


@cuda.jit
def two_steps_kernel(x):
    i = cuda.grid(1)
    x[i] += 1
    cuda.cg.this_grid().sync()
    x[i] += x[(i + 1) % x.size]


two_steps_kernel[2, 32](np.zeros(64))  # fault
