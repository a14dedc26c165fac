// wrong: wrong mask: each half of a warp waits for the other one at a vote of its own
extern "C" __global__ void apart(int* x)
{
    int t = threadIdx.x;
    if (t < 16)
        x[t] = __any_sync(0xffffffff, t == 3);  // NAMED
    else
        x[t] = __all_sync(0xffffffff, t == 3);
}
