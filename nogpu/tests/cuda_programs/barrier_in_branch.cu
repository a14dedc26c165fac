// wrong: divergent barrier: half of a warp waits at a __syncthreads, and the others go past it
extern "C" __global__ void halved(float* x)
{
    if (threadIdx.x % 2) {
        x[threadIdx.x] = 1;
        __syncthreads();  // NAMED
    }
    x[threadIdx.x] += 1;
}
