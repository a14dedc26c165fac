// SPDX-License-Identifier: MIT
// Layers in CUDA C++: python examples/own_layers.py --with examples/layers.cu
//
// Matrices are contiguous, row by row:
// x (n, inputs), w (outputs, inputs), b (outputs), y and g (n, outputs).

// Y = X·Wᵀ + b, by blocks of 16 × 16 threads
extern "C" __global__ void linear(const float* x, const float* w, const float* b, float* y,
                                  int n, int inputs, int outputs)
{
    int row = blockIdx.y * blockDim.y + threadIdx.y;
    int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (row < n && column < outputs) {
        float total = b[column];
        for (int k = 0; k < inputs; k++)
            total += x[row * inputs + k] * w[column * inputs + k];
        y[row * outputs + column] = total;
    }
}

// dX = G·W
extern "C" __global__ void linear_input(const float* g, const float* w, float* dx,
                                        int n, int inputs, int outputs)
{
    int row = blockIdx.y * blockDim.y + threadIdx.y;
    int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (row < n && column < inputs) {
        float total = 0;
        for (int k = 0; k < outputs; k++)
            total += g[row * outputs + k] * w[k * inputs + column];
        dx[row * inputs + column] = total;
    }
}

// dW = Gᵀ·X
extern "C" __global__ void linear_weight(const float* g, const float* x, float* dw,
                                         int n, int inputs, int outputs)
{
    int row = blockIdx.y * blockDim.y + threadIdx.y;
    int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (row < outputs && column < inputs) {
        float total = 0;
        for (int k = 0; k < n; k++)
            total += g[k * outputs + row] * x[k * inputs + column];
        dw[row * inputs + column] = total;
    }
}

// db = Σ G over rows: one thread per column, while the rest of the GPU is idle
extern "C" __global__ void bias_by_one_thread(const float* g, float* db, int n, int outputs)
{
    int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column < outputs) {
        float total = 0;
        for (int k = 0; k < n; k++)
            total += g[k * outputs + column];
        db[column] = total;
    }
}

// The same: each thread adds one number of G to db, which is 0 before the launch
extern "C" __global__ void bias_by_atomics(const float* g, float* db, int n, int outputs)
{
    int row = blockIdx.y * blockDim.y + threadIdx.y;
    int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (row < n && column < outputs)
        atomicAdd(&db[column], g[row * outputs + column]);
}

// Y = max(X, 0), by blocks of 64 threads
extern "C" __global__ void relu(const float* x, float* y, int size)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < size)
        y[i] = fmaxf(x[i], 0.0f);
}

// dX = G where Y > 0, else 0
extern "C" __global__ void relu_backward(const float* g, const float* y, float* dx, int size)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < size)
        dx[i] = y[i] > 0 ? g[i] : 0.0f;
}

// Y = σ(X)
extern "C" __global__ void sigmoid(const float* x, float* y, int size)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < size)
        y[i] = 1 / (1 + expf(-x[i]));
}

// dX = G ⊙ Y ⊙ (1 − Y)
extern "C" __global__ void sigmoid_backward(const float* g, const float* y, float* dx, int size)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < size)
        dx[i] = g[i] * y[i] * (1 - y[i]);
}
