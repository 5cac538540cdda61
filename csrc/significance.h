// significance.h: which points of a pattern rise above its noise. The noise is estimated in blocks of 64 points as
// median |second difference| / (0.6745 sqrt 6), which peaks that are wide compared with a step hardly change, and is
// linear between the middles of the blocks; points below k times it become exactly 0. Header of .cpp and .cu files;
// what only device code can use is in significance.cuh.
#pragma once
#include "portable_math.h"

namespace xrdfast {

constexpr int kSignificanceBlock = 64;
constexpr float kDeviationsAMedian = 0.60526982f;  // 1 / (0.6744897501960817 sqrt 6)

// Blocks of n points; the last one takes what is left over.
XRD_PORTABLE int64_t significance_blocks(int64_t n) { return n < 2 * kSignificanceBlock ? 1 : n / kSignificanceBlock; }

// |second difference| at a point that has two neighbours; 0 where that is not a number, so that it can be sorted.
XRD_PORTABLE float roughness(const float* value, int64_t point) {
    const float rough = fabsf((value[point - 1] - value[point]) + (value[point + 1] - value[point]));
    return rough >= 0.0f ? rough : 0.0f;
}

// Points whose roughness a block's noise is the median of: those of the block that have two neighbours. Of an even
// number of values the median is the larger of the two in the middle.
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

#if !defined(__CUDACC__)
#include <algorithm>

namespace xrdfast {

// Batcher's odd-even merge sort of a block: which two values to put in order, step by step (Knuth, The Art of Computer
// Programming 3, 5.2.2, algorithm M).
struct BlockSortingNetwork {
    static constexpr int kExchanges = 543;
    uint8_t low[kExchanges], high[kExchanges];

    constexpr BlockSortingNetwork() : low(), high() {
        constexpr int n = kSignificanceBlock;
        int at = 0;
        for (int p = 1; p < n; p *= 2)
            for (int k = p; k > 0; k /= 2)
                for (int j = k % p; j + k < n; j += 2 * k)
                    for (int i = j; i < j + k && i + k < n; ++i) {
                        if (i / (2 * p) != (i + k) / (2 * p)) continue;
                        low[at] = static_cast<uint8_t>(i);
                        high[at++] = static_cast<uint8_t>(i + k);
                    }
    }
};
inline constexpr BlockSortingNetwork kBlockSort;
static_assert(kBlockSort.high[BlockSortingNetwork::kExchanges - 1] == kSignificanceBlock - 2, "the network is complete");

constexpr int kSignificanceLanes = 16;  // blocks sorted side by side: a vector of AVX-512, two of AVX2

// Noise of kSignificanceLanes whole blocks at once, one a vector lane: a tenth of the time of std::nth_element.
XRD_PORTABLE void whole_block_noise(const float* __restrict rough, float* __restrict noise) {
    float value[kSignificanceBlock][kSignificanceLanes];
    for (int lane = 0; lane < kSignificanceLanes; ++lane)
        for (int i = 0; i < kSignificanceBlock; ++i) value[i][lane] = rough[lane * kSignificanceBlock + i];
    for (int exchange = 0; exchange < BlockSortingNetwork::kExchanges; ++exchange) {
        float *__restrict a = value[kBlockSort.low[exchange]], *__restrict b = value[kBlockSort.high[exchange]];
#pragma omp simd
        for (int lane = 0; lane < kSignificanceLanes; ++lane) {
            const float low = a[lane] < b[lane] ? a[lane] : b[lane];
            b[lane] = a[lane] < b[lane] ? b[lane] : a[lane];
            a[lane] = low;
        }
    }
    for (int lane = 0; lane < kSignificanceLanes; ++lane)
        noise[lane] = kDeviationsAMedian * value[kSignificanceBlock / 2][lane];
}

// Noise of every block of `value` (n) into `noise` (significance_blocks(n)). `rough` (n) is overwritten and
// must not be `value`.
XRD_PORTABLE void estimate_noise(const float* __restrict value, int64_t n, float* __restrict rough,
                                 float* __restrict noise) {
    for (int64_t i = 1; i < n - 1; ++i) rough[i] = roughness(value, i);
    const int64_t n_blocks = significance_blocks(n), last = n_blocks - 1;
    for (int64_t b = 0; b < n_blocks;) {
        if (b > 0 && b < last && last > kSignificanceLanes) {  // whole blocks; the last few are done twice
            b = std::min<int64_t>(b, last - kSignificanceLanes);
            whole_block_noise(rough + b * kSignificanceBlock, noise + b);
            b += kSignificanceLanes;
            continue;
        }
        const PointRange points = block_points(n, b);
        float *begin = rough + points.begin, *end = rough + points.end, *middle = begin + (end - begin) / 2;
        std::nth_element(begin, middle, end);
        noise[b++] = begin < end ? kDeviationsAMedian * *middle : 0.0f;
    }
}

// Points of `value` (n) less than k times the noise between the blocks above a background become 0; the background lies
// `raised` times the noise above 0.
XRD_PORTABLE void clip_insignificant(float* __restrict value, int64_t n, float k, const float* __restrict noise,
                                     float raised = 0.0f) {
    const int64_t n_blocks = significance_blocks(n), last = n_blocks - 1;
    for (int64_t b = -1; b < n_blocks; ++b) {  // from the middle of block b to the next
        const float low = noise[std::max<int64_t>(b, 0)], high = noise[std::min(b + 1, last)];
        const int64_t begin = std::max<int64_t>(noise_middle(b), 0), end = b == last ? n : noise_middle(b + 1);
        for (int32_t i = static_cast<int32_t>(begin); i < static_cast<int32_t>(std::min(end, n)); ++i) {
            const float level = noise_between(low, high, noise_share(static_cast<int32_t>(b), i));
            value[i] = significant(fmaf(-raised, level, value[i]), k * level);
        }
    }
}

}  // namespace xrdfast
#endif
