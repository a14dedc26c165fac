// wrong: out of bounds: the last thread reads behind the array
extern "C" __global__ void differences(const float* x, float* y, int n)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n)
        y[i] = x[i + 1] - x[i];  // NAMED
}
