# SPDX-License-Identifier: MIT
# Right: a product by tiles in shared memory, whose blocks have 8 times 8 threads.
import numpy as np
from numba import cuda, float32

TILE = 8


@cuda.jit
def tiled_kernel(a, b, out):
    tile_a = cuda.shared.array((TILE, TILE), float32)
    tile_b = cuda.shared.array((TILE, TILE), float32)
    column, row = cuda.grid(2)
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    total = float32(0)
    for start in range(0, a.shape[1], TILE):
        tile_a[y, x] = 0
        tile_b[y, x] = 0
        if row < a.shape[0] and start + x < a.shape[1]:
            tile_a[y, x] = a[row, start + x]
        if column < b.shape[1] and start + y < b.shape[0]:
            tile_b[y, x] = b[start + y, column]
        cuda.syncthreads()
        for k in range(TILE):
            total += tile_a[y, k] * tile_b[k, x]
        cuda.syncthreads()
    if row < out.shape[0] and column < out.shape[1]:
        out[row, column] = total


rng = np.random.default_rng(0)
a, b = rng.integers(-4, 5, (20, 19)), rng.integers(-4, 5, (19, 30))
out = cuda.device_array((20, 30), np.float32)
on_device = (cuda.to_device(one.astype(np.float32)) for one in (a, b))
tiled_kernel[(4, 3), (TILE, TILE)](*on_device, out)
assert (out.copy_to_host() == a @ b).all()
