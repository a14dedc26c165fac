// right: structures as parameters of kernels and functions, constant memory, a variable of the module
struct Line {
    int first;
    float slope;
    double offset;
};
__constant__ float factors[4] = {1.0f, 2.0f, -3.5f, 0.25f};
__device__ unsigned int calls = 5;
__device__ __noinline__ Line moved(Line line, int by)
{
    line.first += by;
    line.offset *= 2;
    return line;
}
__device__ __noinline__ double value(const Line& line, float x) { return line.slope * x + line.offset; }
extern "C" __global__ void structures(double* out, unsigned int* number, Line line, int n)
{
    int i = threadIdx.x;
    if (i < n) {
        Line other = moved(line, i);
        out[i] = value(other, other.first) * factors[i % 4];
        atomicAdd(&calls, 1u);
    }
    __syncthreads();
    if (i == 0)
        *number = calls;
}
