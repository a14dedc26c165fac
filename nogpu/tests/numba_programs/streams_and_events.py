# SPDX-License-Identifier: MIT
# Right: pinned memory, streams, events, and what the GPU says of itself.
import numpy as np
from numba import cuda


@cuda.jit
def scale_kernel(x, factor):
    i = cuda.grid(1)
    if i < x.size:
        x[i] *= factor


assert cuda.is_available()
assert len(cuda.gpus) == 1
assert cuda.get_current_device().MAX_THREADS_PER_BLOCK == 1024
assert cuda.get_current_device().WARP_SIZE == 32
assert cuda.get_current_device().compute_capability == (9, 0)
host = cuda.pinned_array(300, np.float32)
host[:] = np.arange(300)
start, end = cuda.event(), cuda.event()
for n in range(2):
    stream = cuda.stream()
    start.record(stream)
    part = cuda.to_device(host[150 * n : 150 * (n + 1)], stream=stream)
    scale_kernel[2, 96, stream](part, np.float32(n + 2))
    part.copy_to_host(host[150 * n : 150 * (n + 1)], stream=stream)
    end.record(stream)
    stream.synchronize()
end.synchronize()
assert cuda.event_elapsed_time(start, end) > 0
cuda.synchronize()
assert (host == np.arange(300) * np.where(np.arange(300) < 150, 2, 3)).all()
