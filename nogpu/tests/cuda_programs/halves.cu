// right: halves, pairs of halves, and bfloat16
#include <cuda_fp16.h>
#include <cuda_bf16.h>
extern "C" __global__ void halves(const __half* x, __half* y, __half2* pairs, __nv_bfloat16* z, int n)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n)
        return;
    y[i] = __hfma(x[i], __float2half(2.0f), __float2half(0.5f));
    z[i] = __float2bfloat16(__half2float(x[i]) * 3.0f);
    if (i < n / 2)
        pairs[i] = __hadd2(pairs[i], __half2half2(__float2half(1.0f)));
}
