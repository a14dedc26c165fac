# SPDX-License-Identifier: MIT
"""Kernels of numba.cuda, as a course writes them: the maximum, and X·Xᵀ by one block of 1024
threads. course_kernels.py launches and counts them; numba-cuda compiles them."""

from numba import cuda, float32

THREADS = 1024


@cuda.jit
def max_kernel(a, b, out):
    """out[i, j] = max(a[i, j], b[i, j]): a block for each row, a thread for each column."""
    row, column = cuda.blockIdx.x, cuda.threadIdx.x
    out[row, column] = max(a[row, column], b[row, column])


@cuda.jit
def matmul_kernel(x, out):
    """out (n, n) = x·xᵀ by one block, whose threads take the numbers of out in turn."""
    n = out.shape[0]
    for number in range(cuda.threadIdx.x, n * n, THREADS):
        i, j = number // n, number % n
        total = float32(0)
        for k in range(x.shape[1]):
            total += x[i, k] * x[j, k]
        out[i, j] = total


def maximum(a, b):
    """Return the larger one of each two numbers of matrices, which are copied to the GPU."""
    out = cuda.device_array(a.shape, a.dtype)
    max_kernel[a.shape[0], a.shape[1]](cuda.to_device(a), cuda.to_device(b), out)
    return out.copy_to_host()


def matmul_t(x):
    """Return x·xᵀ of a matrix, which is copied to the GPU."""
    out = cuda.device_array((x.shape[0],) * 2, x.dtype)
    matmul_kernel[1, THREADS](cuda.to_device(x), out)
    return out.copy_to_host()
