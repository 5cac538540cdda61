// significance.cuh: the noise estimate of significance.h in device code. Include xrd_cuda.h and block_reduce.cuh first.
#pragma once
#include "significance.h"

namespace xrdfast {

// Sorts 32 kValues numbers that lie in the lanes of a warp, number lane + 32 r in value[r] (Batcher's bitonic sort).
template <int kValues>
__device__ __forceinline__ void warp_sort(float (&value)[kValues]) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int size = 2; size <= 32 * kValues; size *= 2)
#pragma unroll
        for (int apart = size / 2; apart > 0; apart /= 2) {
            if (apart >= 32) {  // both are this lane's own
#pragma unroll
                for (int r = 0; r < kValues; ++r) {
                    const int other = r ^ (apart / 32);
                    if (other < r) continue;
                    const bool rising = ((lane + 32 * r) & size) == 0;
                    const float low = fminf(value[r], value[other]), high = fmaxf(value[r], value[other]);
                    value[r] = rising ? low : high;
                    value[other] = rising ? high : low;
                }
                continue;
            }
#pragma unroll
            for (int r = 0; r < kValues; ++r) {
                const float other = __shfl_xor_sync(kFullMask, value[r], apart);
                const bool rising = ((lane + 32 * r) & size) == 0, first = (lane & apart) == 0;
                value[r] = (value[r] < other) == (rising == first) ? value[r] : other;  // a comparison and a choice
            }
        }
}

// Noise of the points [begin, end) of `value`, at most 32 kValues of them, each with two neighbours; in every lane.
template <int kValues>
__device__ __forceinline__ float warp_noise(const float* value, int64_t begin, int64_t end) {
    const int lane = threadIdx.x & 31, n = static_cast<int>(end - begin), middle = n / 2;
    float rough[kValues];
#pragma unroll
    for (int r = 0; r < kValues; ++r) {
        const int i = lane + 32 * r;
        rough[r] = i < n ? roughness(value, begin + i) : INFINITY;
    }
    warp_sort(rough);
    float median = 0.0f;
#pragma unroll
    for (int r = 0; r < kValues; ++r) {  // shuffled before it is chosen, or nvcc indexes the array in local memory
        const float candidate = __shfl_sync(kFullMask, rough[r], middle & 31);
        median = r == middle / 32 ? candidate : median;
    }
    return n > 0 ? kDeviationsAMedian * median : 0.0f;
}

// Noise of a block of a pattern of n points; all of a warp takes part.
__device__ __forceinline__ float block_noise_of(const float* value, int64_t n, int64_t block) {
    const PointRange points = block_points(n, block);
    if (points.end - points.begin <= kSignificanceBlock) return warp_noise<2>(value, points.begin, points.end);
    return warp_noise<4>(value, points.begin, points.end);
}
static_assert(2 * kSignificanceBlock == 4 * 32, "the last block holds up to 127 points");

// The noise at a point, between the blocks'.
__device__ __forceinline__ float noise_at(const float* noise, int n_blocks, int point) {
    const int middle = point >= kSignificanceBlock / 2 ? (point - kSignificanceBlock / 2) / kSignificanceBlock : -1;
    const int block = min(middle, n_blocks - 1), low = max(block, 0), high = min(block + 1, n_blocks - 1);
    return noise_between(noise[low], noise[high], noise_share(block, point));
}

}  // namespace xrdfast
