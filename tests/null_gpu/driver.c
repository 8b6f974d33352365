/* libcuda.so.1: the driver calls whose answer torch or Triton uses. Others that they link to are generated stubs (build.py). */
#include <stddef.h>

#include "null_gpu.h"

static int context; /* its address stands for the one context that there is */

int cuInit(unsigned int flags) { return 0; }
int cuDriverGetVersion(int *version) {
    *version = 13000;
    return 0;
}
int cuGetErrorString(int error, const char **text) {
    *text = "an error of the null GPU's driver";
    return 0;
}
int cuCtxGetCurrent(void **current) {
    *current = &context;
    return 0;
}
/* Autograd's threads ask which devices this process uses. The first allocation on a device makes its context. */
int cuDevicePrimaryCtxGetState(int device, unsigned int *flags, int *active) {
    if (flags) *flags = 0;
    *active = null_gpu_allocations(device) > 0;
    return 0;
}

/* ---- Triton: it compiles its kernels as for a GPU of compute capability 9.0, and loads and launches them with these ---- */

enum { INVALID_VALUE = 1, DEVICE_POINTER = 3, WARP_SIZE = 10, SHARED_MEMORY_A_BLOCK = 97, THREADS_A_BLOCK = 0 };

int cuCtxGetDevice(int *device) {
    *device = null_gpu_current();
    return 0;
}
int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return 0;
}
int cuDevicePrimaryCtxRetain(void **retained, int device) { return cuCtxGetCurrent(retained); }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == WARP_SIZE ? 32 : attribute == SHARED_MEMORY_A_BLOCK ? 227 << 10 : 65536;
    return 0;
}
int cuModuleLoadData(void **module, const void *image) {
    *module = &context;
    return 0;
}
int cuModuleGetFunction(void **function, void *module, const char *name) {
    *function = &context;
    return 0;
}
int cuFuncGetAttribute(int *value, int attribute, void *function) {
    *value = attribute == THREADS_A_BLOCK ? 1024 : 0;
    return 0;
}
int cuPointerGetAttribute(void *value, int attribute, const void *pointer) {
    if (attribute != DEVICE_POINTER || null_gpu_memory_device(pointer, 1) < 0) return INVALID_VALUE;
    *(const void **)value = pointer;
    return 0;
}
int cuLaunchKernelEx(const void *configuration, void *function, void **arguments, void **extra) {
    null_gpu_add(NULL_GPU_LAUNCHES);
    return 0;
}
