// right: atomics in shared memory, then in global memory
extern "C" __global__ void histogram(const int* x, int* counts, int n)
{
    __shared__ int held[16];
    if (threadIdx.x < 16)
        held[threadIdx.x] = 0;
    __syncthreads();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
        atomicAdd(&held[x[i] & 15], 1);
    __syncthreads();
    if (threadIdx.x < 16)
        atomicAdd(&counts[threadIdx.x], held[threadIdx.x]);
}
