// SPDX-License-Identifier: MIT
// A course's products in CUDA C++, which course_kernels.py launches and counts. Matrices are
// contiguous, row by row.

// C = A·Bᵀ (n, n): a thread for each number, without shared memory
extern "C" __global__ void naive(const float* a, const float* b, float* c, int n)
{
    int row = blockIdx.y * blockDim.y + threadIdx.y;
    int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (row < n && column < n) {
        float total = 0;
        for (int k = 0; k < n; k++)
            total += a[row * n + k] * b[column * n + k];
        c[row * n + column] = total;
    }
}

// The same by blocks of TILE × TILE threads, which load TILE columns of A and of B into shared
// memory. Threads of a warp read numbers of `right` that are TILE + PAD numbers apart: without PAD
// they lie in few banks, one of which delivers one number at a time.
template <int TILE, int PAD>
__global__ void blocked(const float* a, const float* b, float* c, int n)
{
    __shared__ float left[TILE][TILE], right[TILE][TILE + PAD];
    int row = blockIdx.y * TILE + threadIdx.y, column = blockIdx.x * TILE + threadIdx.x;
    int row_of_b = blockIdx.x * TILE + threadIdx.y;
    float total = 0;
    for (int start = 0; start < n; start += TILE) {
        int k = start + threadIdx.x;
        left[threadIdx.y][threadIdx.x] = row < n && k < n ? a[row * n + k] : 0.0f;
        right[threadIdx.y][threadIdx.x] = row_of_b < n && k < n ? b[row_of_b * n + k] : 0.0f;
        __syncthreads();
        for (int i = 0; i < TILE; i++)
            total += left[threadIdx.y][i] * right[threadIdx.x][i];
        __syncthreads();
    }
    if (row < n && column < n)
        c[row * n + column] = total;
}
