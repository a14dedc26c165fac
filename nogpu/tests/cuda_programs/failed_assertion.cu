// wrong: assertion: an index that the program asserts to be small
#include <assert.h>
extern "C" __global__ void checked(const int* x, int* y, int n)
{
    assert(x[threadIdx.x] < n);  // NAMED
    y[threadIdx.x] = x[threadIdx.x];
}
