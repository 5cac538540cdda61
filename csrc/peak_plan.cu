// peak_plan.cu: CUDA kernels that find which rows each stage of a batch computes, and list them.
//
// Bound by memory: intensities are read once, and a stage's rows are written once (44 bytes each in the first stage, 20
// in the others). What lies between, two bytes and a row number for every position, stays in the second-level cache.
// Nothing is atomic, so lists are the same in every run.
#include "xrd_cuda.h"

#include "block_reduce.cuh"
#include "peak_plan.h"

namespace xrdfast {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 16;  // of the elementwise kernel, which strides over the rest

// One stage's part of every array, or the dense stage after the last.
struct StagePart {
    int64_t length;
    int64_t padding;  // of the pool before it
    uint8_t *felt, *computed;
    int64_t *first_row, *n_rows;
    int64_t room;
    float* count;
    int32_t *halo, *row_at;
    int32_t* pairs;  // of the pool before it
};

// Whether a peak lies at a position of the stage's input.
template <typename T>
__device__ __forceinline__ bool touched(const T* intensity, const StagePart& stage, const uint8_t* felt_before,
                                        int64_t length_before, int64_t position) {
    if (!felt_before) return intensity[position] != T(0);
    const int64_t first = 2 * position - stage.padding;
    return (first >= 0 && felt_before[first]) || (first + 1 < length_before && felt_before[first + 1]);
}

// A position of no peak between two segments that are joined.
__device__ __forceinline__ bool joins(const uint8_t* felt, int64_t length, int64_t position, int64_t max_gap) {
    for (int64_t left = 1; left <= max_gap && left <= position; ++left) {
        if (!felt[position - left]) continue;
        for (int64_t right = 1; left + right - 1 <= max_gap && position + right < length; ++right)
            if (felt[position + right]) return true;
        return false;
    }
    return false;
}

// Block (pattern): the first point that is zero.
template <typename T>
__global__ void __launch_bounds__(kThreads) find_blank(const T* intensity, int64_t length, int64_t* blank) {
    XRD_SHARED(int64_t, partial, kThreads / 32);
    const int64_t pattern = blockIdx.x;
    int64_t first = -length;  // minus the position
    for (int64_t i = threadIdx.x; i < length; i += kThreads)
        if (intensity[pattern * length + i] == T(0)) first = max(first, -i);
    first = block_max<kThreads>(first, partial);
    if (threadIdx.x == 0) blank[pattern] = first == -length ? -1 : pattern * length - first;
}

// Block (pattern): what the pattern computes of a stage, and how many rows that takes.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    count_rows(const T* intensity, int64_t reach, int64_t max_gap, StagePart stage, StagePart before) {
    XRD_SHARED(int, partial, kThreads / 32);
    const int64_t pattern = blockIdx.x, length = stage.length;
    const T* own = intensity + pattern * length;  // only the first stage is as long as the patterns
    const uint8_t* felt_before = before.felt ? before.felt + pattern * before.length : nullptr;
    uint8_t *felt = stage.felt + pattern * length, *computed = stage.computed + pattern * length;
    for (int64_t i = threadIdx.x; i < length; i += kThreads) {
        bool any = false;
        for (int64_t k = max(int64_t{0}, i - reach); !any && k <= i + reach && k < length; ++k)
            any = touched(own, stage, felt_before, before.length, k);
        felt[i] = any;
    }
    __syncthreads();
    for (int64_t i = threadIdx.x; i < length; i += kThreads) computed[i] = felt[i] || joins(felt, length, i, max_gap);
    __syncthreads();
    int n_rows = 0;
    for (int64_t i = threadIdx.x; i < length; i += kThreads)
        if (computed[i]) n_rows += i == 0 || !computed[i - 1] ? 3 : 1;  // a segment's first brings two halos
    n_rows = block_sum<kThreads>(n_rows, partial);
    if (threadIdx.x == 0) stage.first_row[pattern] = n_rows;
}

// One block: from numbers of rows to first rows.
__global__ void __launch_bounds__(kThreads) add_rows(int64_t n_patterns, StagePart stage) {
    XRD_SHARED(int, partial, kThreads / 32);
    int64_t done = 0;
    for (int64_t base = 0; base < n_patterns; base += kThreads) {
        const int64_t pattern = base + threadIdx.x;
        int all;
        const int own = pattern < n_patterns ? static_cast<int>(stage.first_row[pattern]) : 0;
        const int before = block_exclusive_sum<kThreads>(own, partial, &all);
        if (pattern < n_patterns) stage.first_row[pattern] = done + before;
        done += all;
    }
    if (threadIdx.x > 0) return;
    stage.first_row[n_patterns] = done;
    *stage.n_rows = done + stage.length + 2;
}

// One block: some point that is zero, for the blank pattern.
__global__ void __launch_bounds__(kThreads) choose_blank(int64_t n_patterns, int64_t n_points, int64_t* blank) {
    XRD_SHARED(int64_t, partial, kThreads / 32);
    int64_t first = -n_points;
    for (int64_t i = threadIdx.x; i < n_patterns; i += kThreads)
        if (blank[i] >= 0) first = max(first, -blank[i]);
    first = block_max<kThreads>(first, partial);
    if (threadIdx.x == 0) blank[n_patterns] = first == -n_points ? 0 : -first;
}

// One thread. Constant indices: an array among the arguments that is indexed by a variable goes to local memory.
__global__ void __launch_bounds__(32) check_room(const int64_t* n_rows, int64_t n_stages, PeakListParams lists) {
    bool overflow = false;
#pragma unroll
    for (int i = 0; i < kMaxPackedStages; ++i) overflow |= i < n_stages && n_rows[i] > lists.room[i];
    *lists.overflow = overflow;
}

// The row that a stage has a pattern's value at a position in; -1 beyond the grid. The blank pattern is the last.
__device__ __forceinline__ int32_t row_with(const StagePart& stage, int64_t n_patterns, int64_t pattern,
                                            int64_t position) {
    if (position < 0 || position >= stage.length) return -1;
    if (pattern == n_patterns) return static_cast<int32_t>(stage.first_row[n_patterns] + 1 + position);
    return stage.row_at[pattern * stage.length + position];
}

// Block (pattern; the blank one is the last): its rows of a stage, and the rows that the pool before joins for them.
// `point` and `position` only for the first stage.
__global__ void __launch_bounds__(kThreads)
    list_rows(int64_t n_patterns, StagePart stage, StagePart before, const int64_t* blank_point, int64_t* point,
              int64_t* position, const bool* overflow) {
    XRD_SHARED(int, partial, kThreads / 32);
    if (*overflow) return;
    const int64_t pattern = blockIdx.x, length = stage.length, blank = stage.first_row[n_patterns] + 1;
    const bool is_blank = pattern == n_patterns;
    const uint8_t* computed = stage.computed + (is_blank ? 0 : pattern) * length;
    const auto own = [&](int64_t i) { return i >= 0 && i < length && (is_blank || computed[i]); };
    int64_t row = stage.first_row[pattern];
    for (int64_t base = -1; base <= length; base += kThreads) {
        const int64_t i = base + threadIdx.x;
        const bool is_own = own(i), is_listed = is_own || own(i - 1) || own(i + 1);
        int found;
        const int64_t at = row + block_exclusive_sum<kThreads>(is_listed, partial, &found);
        row += found;
        const bool is_inside = i >= 0 && i < length;
        if (is_inside && !is_blank) stage.row_at[pattern * length + i] = static_cast<int32_t>(is_own ? at : blank + i);
        if (!is_listed) continue;
        stage.halo[at] = static_cast<int32_t>(is_own ? at : is_inside ? blank + i : -1);
        if (!is_own || !is_blank) stage.count[at] = is_own ? 1.0f : 0.0f;  // of blank rows: count_lacking
        if (point) {
            position[at] = is_inside ? i : -1;
            point[at] = !is_inside ? 0 : is_own && !is_blank ? pattern * length + i : *blank_point;
            continue;
        }
        const int64_t first = 2 * i - stage.padding;
        stage.pairs[at] = is_inside ? row_with(before, n_patterns, pattern, first) : -1;
        stage.pairs[stage.room + at] = is_inside ? row_with(before, n_patterns, pattern, first + 1) : -1;
    }
}

// Thread (position): how many patterns lack it, which is what its blank row stands for.
__global__ void __launch_bounds__(kThreads)
    count_lacking(int64_t n_patterns, StagePart stage, const bool* overflow) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (*overflow || i >= stage.length) return;
    int64_t lacking = n_patterns;
    for (int64_t pattern = 0; pattern < n_patterns; ++pattern) lacking -= stage.computed[pattern * stage.length + i];
    stage.count[stage.first_row[n_patterns] + 1 + i] = static_cast<float>(lacking);
}

// The rows that the pool before a dense stage joins, for all positions of all patterns, position by position.
__global__ void __launch_bounds__(kThreads)
    pool_to_dense(int64_t n_patterns, StagePart dense, StagePart before, const bool* overflow) {
    if (*overflow) return;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t j = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; j < dense.room; j += stride) {
        const int64_t position = j / n_patterns, pattern = j - position * n_patterns;
        const int64_t first = 2 * position - dense.padding;
        dense.pairs[j] = row_with(before, n_patterns, pattern, first);
        dense.pairs[dense.room + j] = row_with(before, n_patterns, pattern, first + 1);
    }
}

// Steps from one stage's part of the arrays to the next one's; the first has none before it.
template <typename T>
class Parts {
   public:
    Parts(const PeakCountParams<T>& p, const PeakListParams* lists) : p_(p), lists_(lists) {
        own = {p.length, 0, p.felt, p.computed, p.first_row, p.n_rows, 0, nullptr, nullptr, nullptr, nullptr};
        if (lists) {
            own.room = lists->room[0];
            own.count = lists->count, own.halo = lists->halo, own.row_at = lists->row_at;
        }
    }
    void step() {
        const int64_t n_points = p_.n_patterns * own.length;
        before = own;
        own.padding = p_.padding[index_];
        own.length = (own.length + 2 * own.padding) / 2;
        own.felt += n_points, own.computed += n_points;
        own.first_row += p_.n_patterns + 1;
        ++own.n_rows;
        ++index_;
        if (!lists_) return;
        own.pairs = index_ == 1 ? lists_->pairs : own.pairs + 2 * own.room;
        own.count += own.room, own.halo += own.room, own.row_at += n_points;
        own.room = lists_->room[index_];
    }

    StagePart own{}, before{};

   private:
    const PeakCountParams<T>& p_;
    const PeakListParams* lists_;
    int64_t index_ = 0;
};

dim3 blocks_for(int64_t n) {
    const int64_t blocks = (n + kThreads - 1) / kThreads;
    return dim3(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks));
}

}  // namespace

template <typename T>
int peak_count_cuda(const PeakCountParams<T>& p, void* stream) {
    if (p.n_patterns == 0) return 0;
    const dim3 patterns(static_cast<unsigned>(p.n_patterns)), one(1), threads(kThreads);
    XRD_LAUNCH((find_blank<T>), patterns, threads, 0, stream, p.intensity, p.length, p.blank);
    XRD_LAUNCH(choose_blank, one, threads, 0, stream, p.n_patterns, p.n_patterns * p.length, p.blank);
    Parts<T> parts(p, nullptr);
    for (int64_t stage = 0; stage < p.n_stages; ++stage, parts.step()) {
        XRD_LAUNCH((count_rows<T>), patterns, threads, 0, stream, p.intensity, p.reach, p.max_gap, parts.own,
                   parts.before);
        XRD_LAUNCH(add_rows, one, threads, 0, stream, p.n_patterns, parts.own);
    }
    return XRD_LAST_ERROR();
}

template <typename T>
int peak_list_cuda(const PeakCountParams<T>& p, const PeakListParams& lists, void* stream) {
    if (p.n_patterns == 0) return 0;
    const dim3 patterns(static_cast<unsigned>(p.n_patterns + 1)), one(1), threads(kThreads);
    XRD_LAUNCH(check_room, one, one, 0, stream, p.n_rows, p.n_stages, lists);
    Parts<T> parts(p, &lists);
    for (int64_t stage = 0; stage < p.n_stages; ++stage, parts.step()) {
        XRD_LAUNCH(list_rows, patterns, threads, 0, stream, p.n_patterns, parts.own, parts.before,
                   p.blank + p.n_patterns, stage == 0 ? lists.point : nullptr, stage == 0 ? lists.position : nullptr,
                   lists.overflow);
        XRD_LAUNCH(count_lacking, blocks_for(parts.own.length), threads, 0, stream, p.n_patterns, parts.own,
                   lists.overflow);
    }
    XRD_LAUNCH(pool_to_dense, blocks_for(parts.own.room), threads, 0, stream, p.n_patterns, parts.own, parts.before,
               lists.overflow);
    return XRD_LAST_ERROR();
}

template int peak_count_cuda(const PeakCountParams<float>&, void*);
template int peak_list_cuda(const PeakCountParams<float>&, const PeakListParams&, void*);
template int peak_count_cuda(const PeakCountParams<double>&, void*);
template int peak_list_cuda(const PeakCountParams<double>&, const PeakListParams&, void*);

}  // namespace xrdfast
