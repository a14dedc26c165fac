// wrong: misaligned access: a vector of four numbers at an odd index
extern "C" __global__ void vectors(const float* x, float4* y)
{
    y[threadIdx.x] = *(const float4*)(x + 1 + 4 * threadIdx.x);  // NAMED
}
