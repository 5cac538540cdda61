// significance.h: which points of a pattern rise above its noise. The noise is estimated in blocks of 64 points as
// median |second difference| / (0.6745 sqrt 6), which peaks that are wide compared with a step hardly change, and is
// linear between the middles of the blocks; points below k times it become exactly 0. Header of .cpp and .cu files.
#pragma once
#include "portable_math.h"

namespace xrdfast {

constexpr int kSignificanceBlock = 64;
constexpr float kDeviationsAMedian = 0.605261f;  // 1 / (0.6745 sqrt 6)

// Blocks of n points; the last one takes what is left over.
XRD_PORTABLE int64_t significance_blocks(int64_t n) { return n < 2 * kSignificanceBlock ? 1 : n / kSignificanceBlock; }

// |second difference| at a point that has two neighbours; 0 where that is not a number, so that it can be sorted.
XRD_PORTABLE float roughness(const float* value, int64_t point) {
    const float rough = fabsf((value[point - 1] - value[point]) + (value[point + 1] - value[point]));
    return rough >= 0.0f ? rough : 0.0f;
}

// Points whose roughness a block's noise is the median of: those of the block that have two neighbours.
struct PointRange {
    int64_t begin, end;
};
XRD_PORTABLE PointRange block_points(int64_t n, int64_t block) {
    const int64_t begin = block == 0 ? 1 : block * kSignificanceBlock;
    const int64_t end = block == significance_blocks(n) - 1 ? n - 1 : (block + 1) * kSignificanceBlock;
    return {begin, end > begin ? end : begin};
}

// The first point beyond the middle of a block, and how far a point is from there to the middle of the next one, 0..1.
XRD_PORTABLE int64_t noise_middle(int64_t block) { return block * kSignificanceBlock + kSignificanceBlock / 2; }
XRD_PORTABLE float noise_share(int32_t block, int32_t point) {
    constexpr float kBlocksAPoint = 1.0f / kSignificanceBlock;  // a power of two: nothing is rounded
    const int32_t beyond = point - block * kSignificanceBlock;
    return fmaf(static_cast<float>(beyond), kBlocksAPoint, 0.5f * kBlocksAPoint - 0.5f);
}
XRD_PORTABLE float noise_between(float noise, float next, float share) { return fmaf(share, next - noise, noise); }

// Negative values are never significant.
XRD_PORTABLE float significant(float value, float threshold) {
    return value >= threshold && value > 0.0f ? value : 0.0f;
}

}  // namespace xrdfast
