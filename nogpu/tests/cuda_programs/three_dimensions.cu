// right: blocks and a grid in three dimensions
extern "C" __global__ void average(const float* x, float* out, int nx, int ny, int nz)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x, j = blockIdx.y * blockDim.y + threadIdx.y;
    int k = blockIdx.z * blockDim.z + threadIdx.z;
    if (i >= nx || j >= ny || k >= nz)
        return;
    float sum = 0;
    int count = 0;
    for (int d = -1; d <= 1; d++)
        if (k + d >= 0 && k + d < nz) {
            sum += x[((k + d) * ny + j) * nx + i];
            count++;
        }
    out[(k * ny + j) * nx + i] = sum / count;
}
