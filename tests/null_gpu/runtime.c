/* A CUDA runtime without a device. Device memory is host memory, copies are real, kernels do nothing.
 *
 * Calls that a real runtime refuses because of a wrong device are refused here with the same error: that is what tests are after.
 * Every function has its prototype from CUDA's own header, so that a wrong signature does not compile.
 */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "null_gpu.h"

static __thread int current_device = 0;
static __thread cudaError_t last_error = cudaSuccess;
static long counters[NULL_GPU_COUNTERS];
static long allocations[NULL_GPU_MAX];

void null_gpu_add(enum null_gpu_counter counter) { __atomic_add_fetch(&counters[counter], 1, __ATOMIC_RELAXED); }
long null_gpu_count(int counter) { return counter < NULL_GPU_COUNTERS ? counters[counter] : -1; }
long null_gpu_allocations(int device) { return device < NULL_GPU_MAX ? allocations[device] : -1; }
int null_gpu_current(void) { return current_device; }

/* Kernel launches return nothing to their caller, who asks for the last error instead. */
static cudaError_t fail(cudaError_t error) {
    last_error = error;
    return error;
}
cudaError_t cudaPeekAtLastError(void) { return last_error; }
cudaError_t cudaGetLastError(void) {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}
const char *cudaGetErrorName(cudaError_t error) { return error == cudaSuccess ? "cudaSuccess" : "cudaErrorOfNullGpu"; }
const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorInvalidResourceHandle: return "invalid resource handle: a stream or event of another device";
    case cudaErrorMemoryAllocation: return "out of memory: NULL_GPU_BYTES";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    default: return "an error of the null GPU";
    }
}

/* ---- devices ---- */

static int visible[NULL_GPU_MAX]; /* the physical number of each device that this process sees */
static int num_visible = 0;
static pthread_once_t once = PTHREAD_ONCE_INIT;

/* NULL_GPUS physical devices, of which CUDA_VISIBLE_DEVICES chooses, up to the first entry that does not exist. */
static void read_environment(void) {
    const char *text = getenv("NULL_GPUS");
    int physical = text ? atoi(text) : 1;
    if (physical > NULL_GPU_MAX) physical = NULL_GPU_MAX;
    const char *chosen = getenv("CUDA_VISIBLE_DEVICES");
    if (!chosen) {
        for (; num_visible < physical; num_visible++) visible[num_visible] = num_visible;
        return;
    }
    while (*chosen && num_visible < physical) {
        char *end;
        long number = strtol(chosen, &end, 10);
        if (end == chosen || number < 0 || number >= physical) break;
        visible[num_visible++] = (int)number;
        chosen = *end == ',' ? end + 1 : end;
    }
}

static int num_devices(void) {
    pthread_once(&once, read_environment);
    return num_visible;
}

static size_t device_bytes(void) {
    const char *text = getenv("NULL_GPU_BYTES");
    return text ? strtoull(text, NULL, 10) : 3ull << 30;
}

cudaError_t cudaGetDeviceCount(int *count) {
    *count = num_devices();
    return *count ? cudaSuccess : fail(cudaErrorNoDevice);
}
cudaError_t cudaGetDevice(int *device) {
    *device = current_device;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= num_devices()) return fail(cudaErrorInvalidDevice);
    current_device = device;
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int *version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

/* An H100's limits, which libraries divide by; memory is what may be allocated here. */
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *prop, int device) {
    if (device < 0 || device >= num_devices()) return fail(cudaErrorInvalidDevice);
    memset(prop, 0, sizeof *prop);
    snprintf(prop->name, sizeof prop->name, "null GPU %d", visible[device]);
    memset(&prop->uuid, 1 + visible[device], sizeof prop->uuid);
    prop->major = 9;
    prop->totalGlobalMem = device_bytes();
    prop->multiProcessorCount = 132;
    prop->warpSize = 32;
    prop->maxThreadsPerBlock = 1024;
    prop->maxThreadsPerMultiProcessor = 2048;
    prop->maxThreadsDim[0] = prop->maxThreadsDim[1] = 1024;
    prop->maxThreadsDim[2] = 64;
    prop->maxGridSize[0] = 2147483647;
    prop->maxGridSize[1] = prop->maxGridSize[2] = 65535;
    prop->sharedMemPerBlock = 48 << 10;
    prop->sharedMemPerBlockOptin = 227 << 10;
    prop->sharedMemPerMultiprocessor = 228 << 10;
    prop->regsPerBlock = prop->regsPerMultiprocessor = 65536;
    prop->l2CacheSize = 50 << 20;
    prop->textureAlignment = 512;
    prop->pciBusID = 1 + visible[device];
    prop->unifiedAddressing = 1;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    struct cudaDeviceProp prop;
    cudaError_t error = cudaGetDeviceProperties(&prop, device);
    if (error != cudaSuccess) return error;
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = prop.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = prop.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = prop.multiProcessorCount; break;
    case cudaDevAttrWarpSize: *value = prop.warpSize; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = prop.maxThreadsPerBlock; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = prop.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = (int)prop.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (int)prop.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxGridDimX: *value = prop.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: *value = prop.maxGridSize[1]; break;
    default: *value = 1;
    }
    return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char *id, int length, int device) {
    if (device < 0 || device >= num_devices()) return fail(cudaErrorInvalidDevice);
    snprintf(id, (size_t)length, "0000:%02x:00.0", 1 + visible[device]);
    return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    *can = 0;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return cudaSuccess;
}

/* ---- memory ---- */

struct block {
    char *start;
    size_t bytes;
    enum cudaMemoryType type;
    int device;
    int mapped; /* by this file; registered host memory is not */
};
static struct block *blocks = NULL;
static size_t num_blocks = 0, room_for_blocks = 0;
static size_t used[NULL_GPU_MAX];
static pthread_mutex_t blocks_lock = PTHREAD_MUTEX_INITIALIZER;

static cudaError_t remember(void *start, size_t bytes, enum cudaMemoryType type, int mapped) {
    cudaError_t error = cudaSuccess;
    pthread_mutex_lock(&blocks_lock);
    if (num_blocks == room_for_blocks) {
        size_t more = room_for_blocks ? 2 * room_for_blocks : 256;
        struct block *moved = realloc(blocks, more * sizeof *blocks);
        if (moved) blocks = moved, room_for_blocks = more;
    }
    if (num_blocks < room_for_blocks)
        blocks[num_blocks++] = (struct block){start, bytes, type, current_device, mapped};
    else
        error = cudaErrorMemoryAllocation;
    pthread_mutex_unlock(&blocks_lock);
    return error;
}

static int find(const void *p, struct block *answer) {
    int known = 0;
    pthread_mutex_lock(&blocks_lock);
    for (size_t i = 0; i < num_blocks && !known; i++)
        if ((const char *)p >= blocks[i].start && (const char *)p < blocks[i].start + blocks[i].bytes) {
            *answer = blocks[i];
            known = 1;
        }
    pthread_mutex_unlock(&blocks_lock);
    return known;
}

static cudaError_t forget(void *start) {
    if (!start) return cudaSuccess;
    pthread_mutex_lock(&blocks_lock);
    for (size_t i = 0; i < num_blocks; i++)
        if (blocks[i].start == start) {
            if (blocks[i].type == cudaMemoryTypeDevice) used[blocks[i].device] -= blocks[i].bytes;
            if (blocks[i].mapped) munmap(start, blocks[i].bytes);
            blocks[i] = blocks[--num_blocks];
            break;
        }
    pthread_mutex_unlock(&blocks_lock);
    return cudaSuccess;
}

/* New pages are zero: what a kernel should have written reads as 0. */
static cudaError_t allocate(void **p, size_t bytes, enum cudaMemoryType type) {
    if (!bytes) bytes = 1;
    if (type == cudaMemoryTypeDevice) {
        int fits;
        pthread_mutex_lock(&blocks_lock);
        fits = used[current_device] + bytes <= device_bytes();
        if (fits) used[current_device] += bytes, allocations[current_device]++;
        pthread_mutex_unlock(&blocks_lock);
        if (!fits) return fail(cudaErrorMemoryAllocation);
    }
    *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (*p == MAP_FAILED) return fail(cudaErrorMemoryAllocation);
    return remember(*p, bytes, type, 1);
}

int null_gpu_memory_device(const void *p, size_t bytes) {
    struct block block;
    if (!find(p, &block) || block.type != cudaMemoryTypeDevice) return -1;
    return (const char *)p + bytes <= block.start + block.bytes ? block.device : -1;
}

cudaError_t cudaMalloc(void **p, size_t bytes) { return allocate(p, bytes, cudaMemoryTypeDevice); }
cudaError_t cudaMallocAsync(void **p, size_t bytes, cudaStream_t stream) { return allocate(p, bytes, cudaMemoryTypeDevice); }
cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned int flags) { return allocate(p, bytes, cudaMemoryTypeHost); }
cudaError_t cudaMallocHost(void **p, size_t bytes) { return allocate(p, bytes, cudaMemoryTypeHost); }
cudaError_t cudaFree(void *p) { return forget(p); }
cudaError_t cudaFreeAsync(void *p, cudaStream_t stream) { return forget(p); }
cudaError_t cudaFreeHost(void *p) { return forget(p); }
cudaError_t cudaHostRegister(void *p, size_t bytes, unsigned int flags) { return remember(p, bytes, cudaMemoryTypeHost, 0); }
cudaError_t cudaHostUnregister(void *p) { return forget(p); }
cudaError_t cudaHostGetDevicePointer(void **device, void *host, unsigned int flags) {
    *device = host;
    return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *p) {
    struct block block;
    memset(attributes, 0, sizeof *attributes);
    attributes->type = cudaMemoryTypeUnregistered;
    if (find(p, &block)) {
        attributes->type = block.type;
        attributes->device = block.device;
        attributes->devicePointer = attributes->hostPointer = (void *)p;
    }
    return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t *unused, size_t *total) {
    *total = device_bytes();
    *unused = *total - used[current_device];
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    null_gpu_add(NULL_GPU_WAITS);
    memmove(to, from, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
    memmove(to, from, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t bytes, cudaStream_t stream) {
    memmove(to, from, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                              enum cudaMemcpyKind kind, cudaStream_t stream) {
    for (size_t row = 0; row < height; row++)
        memmove((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width);
    return cudaSuccess;
}
cudaError_t cudaMemset(void *p, int value, size_t bytes) {
    memset(p, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t stream) { return cudaMemset(p, value, bytes); }

/* ---- streams, events, kernels ---- */

/* Handles are never freed: torch keeps its streams, and a destroyed one must not come again as another. */
void *null_gpu_handle(void) {
    int *device = malloc(2 * sizeof *device);
    if (!device) abort();
    device[0] = device[1] = current_device;
    return device + 1;
}
int null_gpu_of_stream(const void *stream) {
    if (stream == NULL || stream == cudaStreamLegacy || stream == cudaStreamPerThread) return current_device;
    return *(const int *)stream;
}

cudaError_t cudaStreamCreate(cudaStream_t *stream) {
    *stream = null_gpu_handle();
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned int flags) { return cudaStreamCreate(stream); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned int flags, int priority) {
    return cudaStreamCreate(stream);
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **dependencies, const cudaGraphEdgeData **edges,
                                     size_t *num_dependencies) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) { return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t *event) {
    *event = null_gpu_handle();
    return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned int flags) { return cudaEventCreate(event); }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    return *(const int *)event == null_gpu_of_stream(stream) ? cudaSuccess : fail(cudaErrorInvalidResourceHandle);
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned int flags) {
    return cudaEventRecord(event, stream);
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
    *ms = 1.0f; /* there is no time on this device */
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    null_gpu_add(NULL_GPU_WAITS);
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    null_gpu_add(NULL_GPU_WAITS);
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize(void) {
    null_gpu_add(NULL_GPU_WAITS);
    return cudaSuccess;
}

static cudaError_t launch(cudaStream_t stream) {
    null_gpu_add(NULL_GPU_LAUNCHES);
    return null_gpu_of_stream(stream) == current_device ? cudaSuccess : fail(cudaErrorInvalidResourceHandle);
}
cudaError_t cudaLaunchKernel(const void *f, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t stream) {
    return launch(stream);
}
cudaError_t cudaLaunchCooperativeKernel(const void *f, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t stream) {
    return launch(stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *f, void **args) { return launch(config->stream); }
/* What nvcc's code calls since CUDA 13; no public header has it. */
cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t stream) {
    return launch(stream);
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *f) {
    *kernel = (cudaKernel_t)f;
    return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *f) {
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 32;
    attributes->binaryVersion = attributes->ptxVersion = 90;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks_, const void *f, int threads, size_t shared) {
    *blocks_ = 2;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks_, const void *f, int threads, size_t shared,
                                                                   unsigned int flags) {
    *blocks_ = 2;
    return cudaSuccess;
}

/* torch asks for driver functions by name; driver.c is the library that has them. */
cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned int version,
                                             unsigned long long flags, enum cudaDriverEntryPointQueryResult *status) {
    void *driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_GLOBAL);
    *function = driver ? dlsym(driver, symbol) : NULL;
    if (status) *status = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}
