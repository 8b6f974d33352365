/* What the parts of the null GPU share. See README.md. */
#ifndef NULL_GPU_H
#define NULL_GPU_H
#include <stddef.h>

enum { NULL_GPU_MAX = 16 };

enum null_gpu_counter {
    NULL_GPU_LAUNCHES,
    NULL_GPU_WAITS, /* the host waits for a stream, an event, a device or a copy */
    NULL_GPU_ALL_GATHERS,
    NULL_GPU_ALL_REDUCES,
    NULL_GPU_REDUCE_SCATTERS,
    NULL_GPU_BROADCASTS,
    NULL_GPU_COUNTERS
};

/* For tests, called through ctypes. */
long null_gpu_count(int counter);
long null_gpu_allocations(int device); /* device memory that this process has ever allocated there, in pieces */

/* For the other C files. */
void null_gpu_add(enum null_gpu_counter counter);
int null_gpu_current(void);                          /* this thread's device */
int null_gpu_of_stream(const void *stream);          /* the device a stream was made on; the current one for the default stream */
int null_gpu_memory_device(const void *p, size_t n); /* the device whose memory holds p[0 … n); -1 for any other memory */
void *null_gpu_handle(void);                         /* a new handle: the current device stands before it in memory */
#endif
