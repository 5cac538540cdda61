// active_patches.h: which patches of a pattern the attention has to look at. Header of .cpp and .cu files; what only
// device code can use is in active_patches.cuh.
#pragma once
#include <cstdint>

namespace xrdfast {

// The encoder's patches, and the intensity from which a point makes its patch active (100 is the maximum).
constexpr int kPatchPoints = 10;
constexpr float kActiveIntensity = 1e-5f;

#if !defined(__CUDACC__)
// Indices of the active patches in rising order, then -1; returns how many there are.
inline int32_t list_active_patches(const float* intensity, int64_t n_points, int16_t* patch) {
    const int64_t n_patches = (n_points + kPatchPoints - 1) / kPatchPoints;
    int32_t n_active = 0;
    for (int64_t i = 0; i < n_patches; ++i) {
        const int64_t end = (i + 1) * kPatchPoints < n_points ? (i + 1) * kPatchPoints : n_points;
        int active = 0;
        for (int64_t k = i * kPatchPoints; k < end; ++k) active |= intensity[k] >= kActiveIntensity;
        patch[n_active] = static_cast<int16_t>(i);  // overwritten by the next one unless it counts
        n_active += active;
    }
    for (int64_t i = n_active; i < n_patches; ++i) patch[i] = -1;
    return n_active;
}
#endif

}  // namespace xrdfast
