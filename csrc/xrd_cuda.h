// xrd_cuda.h: the one include of every .cu file. Under nvcc the macros are the plain CUDA spelling; any other compiler
// gets the tests' emulator (cuemu.h), which runs the same device code on the CPU. Not for host-only code.
//
//   XRD_LAUNCH((kernel<T>), grid, block, shared_bytes, stream, arguments...)   instead of <<<>>>
//   XRD_SHARED(float, partial, 4);                                             instead of __shared__ float partial[4];
//   XRD_DYNAMIC_SHARED(double2, table);                                        instead of extern __shared__
//   return XRD_LAST_ERROR();                                                   a cudaError_t as int
#pragma once
#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define XRD_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    kernel<<<(grid), (block), (shared_bytes), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define XRD_SHARED(T, name, n) __shared__ T name[n]
#define XRD_DYNAMIC_SHARED(T, name)                              \
    extern __shared__ __align__(16) unsigned char xrd_dynamic_[]; \
    T* name = reinterpret_cast<T*>(xrd_dynamic_)
#define XRD_LAST_ERROR() static_cast<int>(cudaGetLastError())
#else
#include "cuemu.h"
#endif
