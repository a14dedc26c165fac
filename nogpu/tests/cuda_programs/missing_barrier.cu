// wrong: race: no __syncthreads between a write of shared memory and another thread's read
extern "C" __global__ void reversed(const float* x, float* y)
{
    __shared__ float held[128];
    held[threadIdx.x] = x[threadIdx.x];  // NAMED
    y[threadIdx.x] = held[127 - threadIdx.x];  // NAMED
}
