// wrong: race: the next step overwrites what slower warps still read (llama.cpp#24360)
extern "C" __global__ void states(const float* b, float* y, int steps)
{
    __shared__ float held[32];
    float state = 0;
    for (int t = 0; t < steps; t++) {
        if (threadIdx.x < 32)
            held[threadIdx.x] = b[t * 32 + threadIdx.x];  // NAMED
        __syncthreads();
        for (int n = 0; n < 32; n++)
            state += held[n];  // NAMED
        y[t * 128 + threadIdx.x] = state;
    }
}
