// right: a scan by shuffles, and one in shared memory with __syncwarp, in a part of a warp
extern "C" __global__ void warp_scan(const int* x, int* out, int* again)
{
    __shared__ int held[32];
    int t = threadIdx.x, sum = x[t];
    for (int step = 1; step < 32; step *= 2) {
        int other = __shfl_up_sync(0xffffffff, sum, step);
        if (t >= step)
            sum += other;
    }
    out[t] = sum;
    held[t] = x[t];
    __syncwarp();
    for (int step = 1; step < 32; step *= 2) {
        int other = t >= step ? held[t - step] : 0;
        __syncwarp();
        held[t] += other;
        __syncwarp();
    }
    again[t] = held[t];
    if (t < 16) {
        int most = __shfl_xor_sync(0xffff, t, 1);
        again[t] += most - most;
    }
}
