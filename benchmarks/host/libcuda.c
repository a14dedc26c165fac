// SPDX-License-Identifier: MIT
// A stub of NVIDIA's driver, libcuda.so.1: it loads and launches nothing, and notes the launches.
//
// Triton's own driver.c is linked with it, and player.cpp calls its cuLaunchKernelEx. A compiled
// kernel is named by a number here, so that two notes of one kernel are equal.

#include <stddef.h>
#include <string.h>

typedef struct {
  unsigned grid[3], block[3], shared;
  void *stream, *attributes;
  unsigned count;
} Config;  // CUlaunchConfig

typedef struct {
  unsigned long long function;
  unsigned grid[3], block[3], shared, attributes;
} Note;

#define MOST 65536
Note notes[MOST];
unsigned long long launches = 0;
unsigned is_noting = 0;
static unsigned long long functions = 0;

int cuLaunchKernelEx(const Config *config, void *function, void **parameters, void **extra) {
  if (is_noting && launches < MOST) {
    Note *note = &notes[launches];
    note->function = (unsigned long long)function;
    memcpy(note->grid, config->grid, sizeof note->grid);
    memcpy(note->block, config->block, sizeof note->block);
    note->shared = config->shared;
    note->attributes = config->count;
  }
  launches++;
  return 0;
}

int cuModuleGetFunction(void **function, void *module, const char *name) {
  *function = (void *)++functions;
  return 0;
}

int cuPointerGetAttribute(void *value, int attribute, unsigned long long pointer) {
  *(unsigned long long *)value = pointer;  // of the device
  return 0;
}

// CUdevice_attribute, as of an H100; the launchers ask for no others.
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case 16: *value = 132; break;     // MULTIPROCESSOR_COUNT
    case 75: *value = 9; break;       // COMPUTE_CAPABILITY_MAJOR
    case 76: *value = 0; break;       // COMPUTE_CAPABILITY_MINOR
    case 97: *value = 232448; break;  // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    default: *value = 1;
  }
  return 0;
}

int cuFuncGetAttribute(int *value, int attribute, void *function) {
  *value = attribute == 0 ? 1024 : 0;  // MAX_THREADS_PER_BLOCK
  return 0;
}

static int give(void **value) {
  *value = (void *)1;
  return 0;
}
int cuCtxGetCurrent(void **context) { return give(context); }
int cuDevicePrimaryCtxRetain(void **context, int device) { return give(context); }
int cuModuleLoadData(void **module, const void *data) { return give(module); }
int cuModuleLoad(void **module, const char *path) { return give(module); }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, 0; }
int cuCtxGetDevice(int *device) { return *device = 0; }
int cuDeviceGetCount(int *count) { return *count = 0; }
int cuDriverGetVersion(int *version) { return *version = 13000, 0; }
int cuGetErrorString(int error, const char **text) { return *text = "an error of the stub", 0; }
int cuInit(unsigned flags) { return 100; }  // CUDA_ERROR_NO_DEVICE: PyTorch sees no GPU
int cuCtxSetCurrent(void *context) { return 0; }
int cuModuleUnload(void *module) { return 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *function, int config) { return 0; }
// Triton is linked with these, and does not call them here.
int cuCtxGetLimit(void) { return 801; }  // CUDA_ERROR_NOT_SUPPORTED
int cuCtxSetLimit(void) { return 801; }
int cuLaunchKernel(void) { return 801; }
int cuOccupancyMaxActiveClusters(void) { return 801; }
int cuStreamSynchronize(void) { return 801; }
int cuTensorMapEncodeIm2col(void) { return 801; }
int cuTensorMapEncodeTiled(void) { return 801; }
