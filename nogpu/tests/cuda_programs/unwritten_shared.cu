// wrong: uninitialised memory: the sum in shared memory begins with what lies there
extern "C" __global__ void total(const int* x, int* out)
{
    __shared__ int sum;
    atomicAdd(&sum, x[threadIdx.x]);  // NAMED
    __syncthreads();
    if (threadIdx.x == 0)
        *out = sum;
}
