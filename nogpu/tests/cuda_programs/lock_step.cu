// wrong: race within a warp: a sum of a warp relies on lock-step, without __syncwarp
extern "C" __global__ void warp_sum(const float* x, float* out)
{
    __shared__ volatile float held[32];
    int t = threadIdx.x;
    held[t] = x[t];
    if (t < 16) {
        held[t] += held[t + 16];  // NAMED
        held[t] += held[t + 8];  // NAMED
        held[t] += held[t + 4];  // NAMED
        held[t] += held[t + 2];  // NAMED
        held[t] += held[t + 1];  // NAMED
    }
    if (t == 0)
        *out = held[0];
}
