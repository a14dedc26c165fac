// wrong: divergent barrier: the warps of a block wait at two different __syncthreads
extern "C" __global__ void apart(float* x)
{
    if (threadIdx.x < 32) {
        x[threadIdx.x] = 1;
        __syncthreads();  // NAMED
    } else {
        x[threadIdx.x] = 2;
        __syncthreads();
    }
}
