// right: a sum of a block in dynamic shared memory, then by shuffles of its first warp
extern "C" __global__ void block_sum(const float* x, float* out, int n)
{
    extern __shared__ float held[];
    int t = threadIdx.x;
    float sum = 0;
    for (int i = blockIdx.x * blockDim.x + t; i < n; i += gridDim.x * blockDim.x)
        sum += x[i];
    held[t] = sum;
    __syncthreads();
    for (int half = blockDim.x / 2; half >= 32; half /= 2) {
        if (t < half)
            held[t] += held[t + half];
        __syncthreads();
    }
    if (t < 32) {
        sum = held[t];
        for (int step = 16; step > 0; step /= 2)
            sum += __shfl_down_sync(0xffffffff, sum, step);
        if (t == 0)
            atomicAdd(out, sum);
    }
}
