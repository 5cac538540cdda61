// active_patches.cuh: active_patches.h in device code. Include xrd_cuda.h and block_reduce.cuh first.
#pragma once
#include "active_patches.h"

namespace xrdfast {

// Counts and lists the patches that are not blank; all of the block takes part. `partial` holds kThreads / 32 numbers.
template <int kThreads>
__device__ __forceinline__ void list_active_patches(const float* intensity, int n_points, int16_t* patch,
                                                    int32_t* count, int* partial) {
    const int n_patches = (n_points + kPatchPoints - 1) / kPatchPoints;
    int n_active = 0;
    for (int base = 0; base < n_patches; base += kThreads) {
        const int i = base + static_cast<int>(threadIdx.x);
        int active = 0, found;
        for (int k = i * kPatchPoints; k < (i + 1) * kPatchPoints && k < n_points; ++k)
            active |= intensity[k] >= kActiveIntensity;
        const int before = block_exclusive_sum<kThreads>(active, partial, &found);
        if (active) patch[n_active + before] = static_cast<int16_t>(i);
        n_active += found;
    }
    for (int i = n_active + static_cast<int>(threadIdx.x); i < n_patches; i += kThreads) patch[i] = -1;
    if (threadIdx.x == 0) *count = n_active;
}

}  // namespace xrdfast
