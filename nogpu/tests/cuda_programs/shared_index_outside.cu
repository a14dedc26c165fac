// wrong: out of bounds: an index behind an array in shared memory, where another one lies
extern "C" __global__ void columns(float* x)
{
    __shared__ float first[8][8], second[8];
    first[threadIdx.x + 1][0] = x[threadIdx.x];  // NAMED
    second[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    x[threadIdx.x] = second[threadIdx.x] + first[threadIdx.x + 1][0];
}
