/* What torch asks of cuBLAS and NCCL at run time. Matrix products are among the generated stubs: they do nothing.
 *
 * A collective answers as if every rank had contributed what this one did: nothing is sent. As NCCL does, it refuses memory that
 * is not the device's on which the communicator was made.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "null_gpu.h"

/* ---- cuBLAS ---- */

enum { BLAS_OK = 0, BLAS_VERSION = 130100, MATMUL_RESULT_BYTES = 16 };

int cublasCreate_v2(void **handle) {
    *handle = null_gpu_handle();
    return BLAS_OK;
}
int cublasLtCreate(void **handle) { return cublasCreate_v2(handle); }
int cublasGetVersion_v2(void *handle, int *version) {
    *version = BLAS_VERSION;
    return BLAS_OK;
}
const char *cublasGetStatusString(int status) { return status == BLAS_OK ? "success" : "an error of the null GPU"; }
/* One algorithm fits. Of its description only the beginning is read, which says that it is valid. */
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *product, void *a, void *b, void *c, void *d, void *preference,
                                   int requested, void *results, int *returned) {
    memset(results, 0, MATMUL_RESULT_BYTES);
    *returned = 1;
    return BLAS_OK;
}

/* ---- NCCL ---- */

typedef enum { NCCL_SUCCESS = 0, NCCL_INVALID_ARGUMENT = 4 } result_t;
enum { NCCL_VERSION = 23007, NCCL_ID_BYTES = 128 };

typedef struct {
    char bytes[NCCL_ID_BYTES];
} id_t128;
struct communicator {
    int size, rank, device;
};

static __thread const char *last_problem = "";
const char *ncclGetErrorString(int error) { return error == NCCL_SUCCESS ? "no error" : "invalid argument"; }
const char *ncclGetLastError(void *communicator) { return last_problem; }
int ncclGetVersion(int *version) {
    *version = NCCL_VERSION;
    return NCCL_SUCCESS;
}
int ncclGetUniqueId(id_t128 *id) {
    memset(id, 7, sizeof *id);
    return NCCL_SUCCESS;
}

static int make(struct communicator **made, int size, int rank) {
    if (!(*made = malloc(sizeof **made))) abort();
    **made = (struct communicator){size, rank, null_gpu_current()};
    return NCCL_SUCCESS;
}
int ncclCommInitRank(struct communicator **made, int size, id_t128 id, int rank) { return make(made, size, rank); }
int ncclCommInitRankConfig(struct communicator **made, int size, id_t128 id, int rank, void *config) {
    return make(made, size, rank);
}
int ncclCommInitRankScalable(struct communicator **made, int size, int rank, int num_ids, id_t128 *ids, void *config) {
    return make(made, size, rank);
}
int ncclCommSplit(struct communicator *whole, int color, int key, struct communicator **made, void *config) {
    return make(made, whole->size, whole->rank);
}
int ncclCommGetAsyncError(struct communicator *communicator, int *error) {
    *error = NCCL_SUCCESS;
    return NCCL_SUCCESS;
}
int ncclCommCount(struct communicator *communicator, int *size) {
    *size = communicator->size;
    return NCCL_SUCCESS;
}
int ncclCommUserRank(struct communicator *communicator, int *rank) {
    *rank = communicator->rank;
    return NCCL_SUCCESS;
}
int ncclCommCuDevice(struct communicator *communicator, int *device) {
    *device = communicator->device;
    return NCCL_SUCCESS;
}

/* The bytes of an element of ncclDataType_t. */
static size_t width(int type) {
    static const size_t widths[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1}; /* i8 u8 i32 u32 i64 u64 f16 f32 f64 bf16 f8 f8 */
    return widths[type];
}

static int refused(const struct communicator *communicator, const void *stream, const void *from, size_t from_bytes,
                   const void *to, size_t to_bytes) {
    last_problem = "";
    if (from_bytes && null_gpu_memory_device(from, from_bytes) != communicator->device)
        last_problem = "what is sent is no memory of the communicator's device";
    else if (to_bytes && null_gpu_memory_device(to, to_bytes) != communicator->device)
        last_problem = "what receives is no memory of the communicator's device";
    else if (null_gpu_of_stream(stream) != communicator->device)
        last_problem = "the stream is one of another device than the communicator's";
    return *last_problem != 0;
}

int ncclAllGather(const void *from, void *to, size_t count, int type, struct communicator *communicator, void *stream) {
    size_t bytes = count * width(type);
    null_gpu_add(NULL_GPU_ALL_GATHERS);
    if (refused(communicator, stream, from, bytes, to, bytes * communicator->size)) return NCCL_INVALID_ARGUMENT;
    for (int rank = 0; rank < communicator->size; rank++) memmove((char *)to + bytes * rank, from, bytes);
    return NCCL_SUCCESS;
}
int ncclAllReduce(const void *from, void *to, size_t count, int type, int op, struct communicator *communicator,
                  void *stream) {
    size_t bytes = count * width(type);
    null_gpu_add(NULL_GPU_ALL_REDUCES);
    if (refused(communicator, stream, from, bytes, to, bytes)) return NCCL_INVALID_ARGUMENT;
    memmove(to, from, bytes);
    return NCCL_SUCCESS;
}
int ncclReduceScatter(const void *from, void *to, size_t count, int type, int op, struct communicator *communicator,
                      void *stream) {
    size_t bytes = count * width(type);
    null_gpu_add(NULL_GPU_REDUCE_SCATTERS);
    if (refused(communicator, stream, from, bytes * communicator->size, to, bytes)) return NCCL_INVALID_ARGUMENT;
    memmove(to, (const char *)from + bytes * communicator->rank, bytes);
    return NCCL_SUCCESS;
}
int ncclBroadcast(const void *from, void *to, size_t count, int type, int root, struct communicator *communicator,
                  void *stream) {
    size_t bytes = count * width(type);
    null_gpu_add(NULL_GPU_BROADCASTS);
    if (refused(communicator, stream, from, bytes, to, bytes)) return NCCL_INVALID_ARGUMENT;
    memmove(to, from, bytes);
    return NCCL_SUCCESS;
}
int ncclBcast(void *rows, size_t count, int type, int root, struct communicator *communicator, void *stream) {
    return ncclBroadcast(rows, rows, count, type, root, communicator, stream);
}
