// wrong: race: the threads of a warp add to one number without atomics
extern "C" __global__ void bias(const float* gradient, float* sum)
{
    sum[0] += gradient[threadIdx.x];  // NAMED
}
