// peak_plan.h: which rows each stage of a batch computes (xrdfast/ops/peak_plan.py). Plain C++; no torch, no CUDA headers.
#pragma once
#include <cstdint>

namespace xrdfast {

// Rows of the packed stages of a plan, which come first. All arrays have room for n_patterns * length rows a stage.
template <typename T>
struct PeakPlanParams {
    const T* intensity;       // (n_patterns, length); what is not zero is a peak
    const int64_t* paddings;  // (n_stages) of the pools after the stages, 0 or 1
    int64_t n_patterns;
    int64_t length;  // enough for a position after every pool
    int64_t n_stages;
    int64_t packed_stages;  // most stages that may be packed
    int64_t reach;          // positions that a stage sees to each side
    int64_t max_gap;        // segments with no more positions between them are joined
    double packed_share;    // a stage is packed where that takes fewer rows than this share of the dense ones; <= 1
    int64_t* n_rows;        // (packed_stages) rows of each stage; 0: dense, as all that follow
    int64_t* point;         // into the flat input, for the rows of the first stage; 0 where beyond the grid
    int64_t* position;      // on the grid, for the same rows; -1 beyond it
    float* count;           // (packed_stages, room) samples that a row stands for
    int32_t* halo;          // (packed_stages, room) the row whose value a row has; -1: zero
    int32_t* pairs;         // (packed_stages, 2 room) the two rows that the pool joins: all first ones, all second ones
};

template <typename T>
void peak_plan_cpu(const PeakPlanParams<T>& params);

}  // namespace xrdfast
