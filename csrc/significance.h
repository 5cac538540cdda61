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

// |second difference| at a point that has two neighbours.
XRD_PORTABLE float roughness(const float* value, int64_t point) {
    return fabsf((value[point - 1] - value[point]) + (value[point + 1] - value[point]));
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

// Where a point lies between the middles of two blocks.
struct NoisePosition {
    int32_t block, next;
    float share;  // of the next
};
XRD_PORTABLE NoisePosition noise_position(int32_t n_blocks, int32_t point) {
    const float last = static_cast<float>(n_blocks - 1);
    float position = fmaf(static_cast<float>(point), 1.0f / kSignificanceBlock, 0.5f / kSignificanceBlock - 0.5f);
    position = position > 0.0f ? position : 0.0f;
    position = position < last ? position : last;
    const int32_t block = static_cast<int32_t>(position);
    return {block, block + 1 < n_blocks ? block + 1 : block, position - static_cast<float>(block)};
}
XRD_PORTABLE float noise_between(float noise, float next, float share) { return fmaf(share, next - noise, noise); }

// Negative values are never significant.
XRD_PORTABLE float significant(float value, float threshold) {
    return value >= threshold && value > 0.0f ? value : 0.0f;
}

}  // namespace xrdfast
