// right: a lock that the threads of a warp take one after the other
extern "C" __global__ void lock(int* taken, int* sum)
{
    bool done = false;
    while (!done) {
        if (atomicCAS(taken, 0, 1) == 0) {
            __threadfence();
            *(volatile int*)sum += threadIdx.x;
            __threadfence();
            atomicExch(taken, 0);
            done = true;
        }
    }
}
