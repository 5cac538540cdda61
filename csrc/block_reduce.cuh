// block_reduce.cuh: reductions and scans over a block of kThreads threads, shared by the kernels. Every thread of the
// block must take part; `partial` is shared memory for kThreads / 32 values and free again on return.
#pragma once

namespace xrdfast {

constexpr unsigned kFullMask = 0xffffffffu;

// Sum of `value` over the threads before this one; `total` over all.
template <int kThreads>
__device__ __forceinline__ int block_exclusive_sum(int value, int* partial, int* total) {
    static_assert(kThreads % 32 == 0, "whole warps");
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int sum = value;
    for (int distance = 1; distance < 32; distance *= 2) {
        const int before = __shfl_up_sync(kFullMask, sum, distance);
        if (lane >= distance) sum += before;
    }
    if (lane == 31) partial[warp] = sum;
    __syncthreads();
    int before = 0, all = 0;
    for (int i = 0; i < kThreads / 32; ++i) {
        if (i < warp) before += partial[i];
        all += partial[i];
    }
    __syncthreads();
    *total = all;
    return before + sum - value;
}

// Largest value; NaN where any is NaN.
template <int kThreads, typename T>
__device__ __forceinline__ T block_max(T value, T* partial) {
    static_assert(kThreads % 32 == 0, "whole warps");
    for (int distance = 16; distance; distance /= 2) {
        const T other = __shfl_xor_sync(kFullMask, value, distance);
        value = value >= other || value != value ? value : other;
    }
    if ((threadIdx.x & 31) == 0) partial[threadIdx.x >> 5] = value;
    __syncthreads();
    value = partial[0];
    for (int i = 1; i < kThreads / 32; ++i) {
        const T other = partial[i];
        value = value >= other || value != value ? value : other;
    }
    __syncthreads();
    return value;
}

// Sum, in the same order in every run.
template <int kThreads, typename T>
__device__ __forceinline__ T block_sum(T value, T* partial) {
    static_assert(kThreads % 32 == 0, "whole warps");
    for (int distance = 16; distance; distance /= 2) value += __shfl_xor_sync(kFullMask, value, distance);
    if ((threadIdx.x & 31) == 0) partial[threadIdx.x >> 5] = value;
    __syncthreads();
    value = partial[0];
    for (int i = 1; i < kThreads / 32; ++i) value += partial[i];
    __syncthreads();
    return value;
}

}  // namespace xrdfast
