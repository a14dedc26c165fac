// wrong: wrong mask: a shuffle names all threads of a warp, and a half executes it
extern "C" __global__ void shuffled(int* x)
{
    int t = threadIdx.x;
    if (t < 16)
        x[t] = __shfl_down_sync(0xffffffff, t, 1);  // NAMED
    else
        x[t] = -1;
}
