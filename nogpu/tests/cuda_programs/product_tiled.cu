// right: tiles in shared memory, with zeros beyond the edges
template <typename T, int TILE>
__global__ void product(const T* a, const T* b, T* c, int n)
{
    __shared__ T left[TILE][TILE], right[TILE][TILE + 1];
    int column = blockIdx.x * TILE + threadIdx.x, row = blockIdx.y * TILE + threadIdx.y;
    T sum = 0;
    for (int start = 0; start < n; start += TILE) {
        int k = start + threadIdx.x, m = start + threadIdx.y;
        left[threadIdx.y][threadIdx.x] = row < n && k < n ? a[row * n + k] : T(0);
        right[threadIdx.y][threadIdx.x] = column < n && m < n ? b[m * n + column] : T(0);
        __syncthreads();
        for (int i = 0; i < TILE; i++)
            sum += left[threadIdx.y][i] * right[i][threadIdx.x];
        __syncthreads();
    }
    if (row < n && column < n)
        c[row * n + column] = sum;
}
