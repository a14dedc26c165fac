# SPDX-License-Identifier: MIT
# Right: signatures, scalars and tuples as arguments, and shared memory whose size a launch gives.
import math

import numpy as np
from numba import cuda, float32


@cuda.jit("float32(float32, float32)", device=True)
def distance(x, y):
    return math.sqrt(x * x + y * y)


@cuda.jit("void(float32[:,::1], float32[::1], UniTuple(float32, 2), int32, boolean)")
def distances_kernel(points, out, origin, count, squares):
    near = cuda.shared.array(0, float32)
    i = cuda.grid(1)
    if i < count:
        near[cuda.threadIdx.x] = distance(points[i, 0] - origin[0], points[i, 1] - origin[1])
        found = near[cuda.threadIdx.x]
        out[i] = found * found if squares else found


points = np.random.default_rng(0).random((100, 2), np.float32)
out = cuda.to_device(np.zeros(100, np.float32))
origin = (np.float32(0.5), np.float32(0.25))
distances_kernel[4, 32, 0, 4 * 32](cuda.to_device(points), out, origin, np.int32(100), False)
expected = np.hypot(points[:, 0] - 0.5, points[:, 1] - 0.25)
assert np.allclose(out.copy_to_host(), expected, rtol=1e-6)
