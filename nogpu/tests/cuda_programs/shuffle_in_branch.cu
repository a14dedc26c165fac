// wrong: undefined value: a shuffle takes the number of a thread that does not execute it
extern "C" __global__ void shuffled(int* x)
{
    int t = threadIdx.x;
    if (t < 16)
        x[t] = __shfl_down_sync(0xffffffff, t, 1);  // NAMED
    else
        x[t] = -1;
}
