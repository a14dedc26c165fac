// warning: divergent barrier: threads return, and the others wait at a __syncthreads
extern "C" __global__ void early(float* x, int n)
{
    __shared__ float held[64];
    if (threadIdx.x >= n)
        return;
    held[threadIdx.x] = x[threadIdx.x];
    __syncthreads();  // NAMED
    x[threadIdx.x] = held[n - 1 - threadIdx.x];
}
