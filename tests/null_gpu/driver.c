/* libcuda.so.1: the driver calls whose answer torch uses. Other symbols that torch links to are generated stubs (build.py). */
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
