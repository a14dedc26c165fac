// wrong: race between blocks: blocks add to one number without atomics
extern "C" __global__ void bias(const float* gradient, float* sum)
{
    if (threadIdx.x == 0)
        *sum += gradient[blockIdx.x];  // NAMED
}
