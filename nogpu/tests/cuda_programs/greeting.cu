// right: printf, clock, and vectors of four numbers
#include <stdio.h>
extern "C" __global__ void greeting(const float4* x, float4* y)
{
    long long start = clock64();
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    float4 v = x[i];
    y[i] = make_float4(v.w, v.z, v.y, v.x);
    if (threadIdx.x < 2)
        printf("block %d, thread %d: %.1f\n", blockIdx.x, threadIdx.x, v.x);
    if (clock64() < start)
        y[0].x = -1;
}
