/* CUDA's headers include this file of the compiler package, which Python wheels do not carry. A C compiler needs only these. */
#ifndef NULL_GPU_HOST_DEFINES_H
#define NULL_GPU_HOST_DEFINES_H
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __cudart_builtin__
#define __host__
#define __device__
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __align__(n)
#define CUDARTAPI
#define CUDARTAPI_CDECL
#define CUDA_DEPRECATED
#endif
