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

constexpr int64_t kMaxPackedStages = 8;

// The same on a device, in two steps: rows are counted first, so that the lists can be made for just as many, or are
// made without waiting, for as many as there is room for. Stages' arrays lie one after the other.
template <typename T>
struct PeakCountParams {
    const T* intensity;  // (n_patterns, length); what is not zero is a peak
    int64_t n_patterns;
    int64_t length;
    int64_t n_stages;                   // packed ones, at most kMaxPackedStages
    int64_t padding[kMaxPackedStages];  // of the pool after each
    int64_t reach;
    int64_t max_gap;     // at least 1: segments share no halo
    uint8_t* felt;       // (n_patterns, length) of each stage: positions that a peak is felt at
    uint8_t* computed;   // the same, with those between segments that are joined
    int64_t* first_row;  // (n_stages, n_patterns + 1) of each pattern, and of the blank one
    int64_t* n_rows;     // (n_stages)
    int64_t* blank;      // (n_patterns + 1) a point that is zero, of each pattern and of all; -1, and 0, where none is
};

// Rows beyond `n_rows` stay as they were, and all of them where a stage has more rows than there is room for.
struct PeakListParams {
    int64_t room[kMaxPackedStages + 1];  // rows of each stage; at last the dense ones of the stage that follows
    bool* overflow;                      // (1) whether a stage has more
    int64_t* point;                      // (room[0]), this and the others as in PeakPlanParams
    int64_t* position;                   // (room[0])
    float* count;                        // (room[i]) of each stage
    int32_t* halo;                       // (room[i]) of each stage
    int32_t* pairs;                      // (2, room[i + 1]) of each stage
    int32_t* row_at;  // scratch, (n_patterns, length) of each stage: the row with a position's value
};

// Return a cudaError_t as int; `stream` is a cudaStream_t.
template <typename T>
int peak_count_cuda(const PeakCountParams<T>& params, void* stream);
template <typename T>
int peak_list_cuda(const PeakCountParams<T>& params, const PeakListParams& lists, void* stream);

}  // namespace xrdfast
