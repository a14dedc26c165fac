// wrong: out of bounds: an index behind a thread's own array
extern "C" __global__ void digits(const int* x, int* out, int n)
{
    int held[4];
    for (int i = 0; i < n; i++)
        held[(x[threadIdx.x] + i) % 100] = i;  // NAMED
    out[threadIdx.x] = held[x[threadIdx.x] % 4];
}
