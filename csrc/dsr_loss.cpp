// dsr_loss.cpp: ranked-output self-distillation loss on the CPU.
//
// Ranking is most of the work. In float, sixteen rows are ranked side by side, a register or two of them per class, by a
// sorting network: the same exchanges for every row, no branch on data. A logit gives its last bits to its class, so that
// an exchange is a minimum and a maximum of integers; the few neighbours that differ in those bits alone are put right
// row by row. Floors and what is reached: benchmarks/NOTES.md.
#include "dsr_loss.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <type_traits>

#include "block_math.h"
#include "reflection_math.h"
#include "thread_own.h"

namespace xrdfast {
namespace {

constexpr int kRows = 16;   // ranked side by side; sixteen integers are a cache line and an AVX-512 register
constexpr int kWhole = 16;  // rows are padded to whole AVX-512 registers of floats, so no loop has a tail
static_assert(kMaxHeadClasses % kWhole == 0, "padding keeps within the workspace");

// e^x for x <= 0, and 0 where the result would be subnormal. Taylor series of degree 7 in |r| <= ln2 / 2 (remainder
// 5e-9), else as exp_nonpositive in double.
XRDFAST_INLINE float exp_or_zero(float x) {
    constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
    const float bounded = x < -87.0f ? -87.0f : x;
    const float shifted = bounded * 1.44269504f + kMagic;
    const float n = shifted - kMagic;
    const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
    // In pairs (Estrin): one after the other, each step waits for the last, and too few numbers are under way at once.
    const float r2 = r * r;
    const float high = (1.0f / 5040.0f * r + 1.0f / 720.0f) * r2 + (1.0f / 120.0f * r + 1.0f / 24.0f);
    const float low = (1.0f / 6.0f * r + 0.5f) * r2 + (r + 1.0f);
    const float p = high * (r2 * r2) + low;
    uint32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    const uint32_t power = (bits + 127u) << 23;
    float scale;
    std::memcpy(&scale, &power, sizeof scale);
    return x < -87.0f ? 0.0f : p * scale;
}
XRDFAST_INLINE double exp_or_zero(double x) { return x < -700.0 ? 0.0 : exp_nonpositive(x); }

// Rows are not a power of two apart, or the same class of all rows would fall into one set of the first-level cache.
constexpr int kRowRoom = kMaxHeadClasses + 32;

template <typename Real>
struct alignas(64) Workspace {
    const Real* row[kRows];        // logits of a head: the caller's, or in `logits`
    Real logits[kRows][kRowRoom];  // of another type than Real, converted
    Real ranked[kRows][kRowRoom];
    int32_t order[kRows][kRowRoom];
    Real previous[kMaxHeadClasses];
    Real soft[kMaxHeadClasses], soft_previous[kMaxHeadClasses];  // softmax before normalisation
    int32_t keys[kMaxHeadClasses * kRows];                       // (classes, kRows)
};

// A float as an integer of the same order: -0 equals 0, and NaN, whatever its sign, comes last.
XRDFAST_INLINE int32_t rank_key(float x) {
    const float value = x + 0.0f;
    int32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits ^= (bits >> 31) & INT32_MAX;
    return x != x ? INT32_MAX : bits;
}

// A key whose last bits are the class; `class_mask` has so many bits that all classes of the head fit.
XRDFAST_CLONES void pack_rows(Workspace<float>& ws, int n, int32_t class_mask) {
    for (int j = 0; j < n; ++j)
        for (int row = 0; row < kRows; ++row)
            ws.keys[j * kRows + row] = (rank_key(ws.row[row][j]) & ~class_mask) | j;
}

// The classes of every row in the order of their keys: four keys of a row become one store.
XRDFAST_CLONES void unpack_rows(Workspace<float>& ws, int n_padded, int32_t class_mask) {
    for (int j = 0; j < n_padded; j += 4)
        for (int row = 0; row < kRows; ++row) {
            const int32_t* key = ws.keys + j * kRows + row;
            const int32_t four[4] = {key[0] & class_mask, key[kRows] & class_mask, key[2 * kRows] & class_mask,
                                     key[3 * kRows] & class_mask};
            std::memcpy(ws.order[row] + j, four, sizeof four);
        }
}

// Ranks by whole values what is ranked by their first bits; equal ones stay in the order of their classes. NaNs, which
// compare as nothing, are last already.
void take_in_order(const float* __restrict logits, int n, int32_t* __restrict order, float* __restrict ranked) {
    float before = -std::numeric_limits<float>::infinity();
    for (int j = 0; j < n; ++j) {
        const int32_t from = order[j];
        const float value = logits[from];
        ranked[j] = value;
        if (value < before) {
            int at = j;
            for (; at > 0 && value < ranked[at - 1]; --at) {
                ranked[at] = ranked[at - 1];
                order[at] = order[at - 1];
            }
            ranked[at] = value;
            order[at] = from;
        } else {
            before = value;
        }
    }
}

// The smaller one first. Each comparison is used once, which makes one instruction of it and what it chooses.
template <class V>
XRDFAST_INLINE void exchange(V& a, V& b) {
    const V low = a < b ? a : b;
    b = a > b ? a : b;
    a = low;
}

// Batcher's odd-even merge sort; exchanges with classes past the last, which would hold the largest values, are left
// out. Where classes are less than eight apart, exchanges follow each other in registers, as what takes time is loads
// and stores. Vectors by name: of a plain loop GCC makes stores under a mask, which take some 20 cycles on an AMD
// processor.
struct SortKeys {
    int32_t* keys;  // (n, kRows)
    int n;          // a multiple of kEight

    static constexpr int kEight = 8;

    template <int kBytes>
    XRDFAST_INLINE void run() const {
        using S = Simd<int32_t, kBytes>;
        int32_t* const rows = keys;
        const int n_classes = n;
        for (int begin = 0; begin < n_classes; begin += kEight) sort_eight<S>(rows + begin * kRows);
        for (int merged = kEight; merged < n_classes; merged *= 2)
            for (int begin = 0; begin + merged < n_classes; begin += 2 * merged)
                merge<S>(rows + begin * kRows, merged, std::min(2 * merged, n_classes - begin));
    }

    template <class S>
    XRDFAST_INLINE static void sort_eight(int32_t* rows) {
        constexpr int kPairs[][2] = {{0, 1}, {2, 3}, {4, 5}, {6, 7}, {0, 2}, {1, 3}, {4, 6}, {5, 7}, {1, 2}, {5, 6},
                                     {0, 4}, {1, 5}, {2, 6}, {3, 7}, {2, 4}, {3, 5}, {1, 2}, {3, 4}, {5, 6}};
        for (int lane = 0; lane < kRows; lane += S::kLanes) {
            typename S::Vector x[kEight];
            load_classes(rows + lane, x);
#pragma GCC unroll 19
            for (const auto& pair : kPairs) exchange(x[pair[0]], x[pair[1]]);
#pragma GCC unroll 8
            for (int i = 0; i < kEight; ++i) store(rows + lane + i * kRows, x[i]);
        }
    }

    // The first `merged` classes and those after them.
    template <class S>
    XRDFAST_INLINE static void merge(int32_t* rows, int merged, int n_classes) {
        for (int distance = merged; distance >= kEight; distance /= 2)
            for (int first = distance & (merged - 1); first + distance < n_classes; first += 2 * distance) {
                int32_t *low = rows + first * kRows, *high = low + distance * kRows;
                for (int count = std::min(distance, n_classes - first - distance); count > 0; --count)
#pragma GCC unroll 4
                    for (int lane = 0; lane < kRows; lane += S::kLanes, low += S::kLanes, high += S::kLanes) {
                        auto a = load<typename S::Vector>(low), b = load<typename S::Vector>(high);
                        exchange(a, b);
                        store(low, a);
                        store(high, b);
                    }
            }
        for (int lane = 0; lane < kRows; lane += S::kLanes) finish_merge<S>(rows + lane, n_classes);
    }

    // The exchanges of a merge at distances 4, 2 and 1, from the first class to the last: `before` are three classes
    // that wait for those after them.
    template <class S>
    XRDFAST_INLINE static void finish_merge(int32_t* rows, int n_classes) {
        using V = typename S::Vector;
        V before[3], x[kEight], last[4];
        load_classes(rows + kRows, before);
        int32_t* at = rows + 4 * kRows;
        for (int left = n_classes - 4; left > 4; left -= kEight, at += kEight * kRows) {
            load_classes(at, x);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) exchange(x[i], x[i + 4]);
            exchange(before[1], x[0]);
            exchange(before[2], x[1]);
            exchange(x[2], x[4]);
            exchange(x[3], x[5]);
            exchange(before[0], before[1]);
            exchange(before[2], x[0]);
            exchange(x[1], x[2]);
            exchange(x[3], x[4]);
#pragma GCC unroll 3
            for (int i = 0; i < 3; ++i) store(at + (i - 3) * kRows, before[i]);
#pragma GCC unroll 5
            for (int i = 0; i < 5; ++i) store(at + i * kRows, x[i]);
#pragma GCC unroll 3
            for (int i = 0; i < 3; ++i) before[i] = x[5 + i];
        }
        load_classes(at, last);
        exchange(before[1], last[0]);
        exchange(before[2], last[1]);
        exchange(before[0], before[1]);
        exchange(before[2], last[0]);
        exchange(last[1], last[2]);
#pragma GCC unroll 3
        for (int i = 0; i < 3; ++i) store(at + (i - 3) * kRows, before[i]);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) store(at + i * kRows, last[i]);
    }

    template <class V, int kClasses>
    XRDFAST_INLINE static void load_classes(const int32_t* rows, V (&x)[kClasses]) {
#pragma GCC unroll 8
        for (int i = 0; i < kClasses; ++i) x[i] = load<V>(rows + i * kRows);
    }
};

void rank_rows(Workspace<float>& ws, int n, int n_rows) {
    int32_t class_mask = 0;
    while (class_mask < n - 1) class_mask = 2 * class_mask + 1;
    pack_rows(ws, n, class_mask);
    const int n_padded = (n + SortKeys::kEight - 1) / SortKeys::kEight * SortKeys::kEight;
    std::fill(ws.keys + n * kRows, ws.keys + n_padded * kRows, INT32_MAX);  // behind all of the head, NaNs too
    run_best(SortKeys{ws.keys, n_padded});
    unpack_rows(ws, n_padded, class_mask);
    for (int row = 0; row < n_rows; ++row) take_in_order(ws.row[row], n, ws.order[row], ws.ranked[row]);
}

// In double, which is there for the tests of the gradient, a key and a class don't fit in one number.
void rank_rows(Workspace<double>& ws, int n, int n_rows) {
    for (int row = 0; row < n_rows; ++row) {
        const double* x = ws.row[row];
        int32_t* order = ws.order[row];
        std::iota(order, order + n, 0);
        std::stable_sort(order, order + n,
                         [x](int32_t a, int32_t b) { return x[a] < x[b] || (x[a] == x[a] && x[b] != x[b]); });
        for (int j = 0; j < n; ++j) ws.ranked[row][j] = x[order[j]];
    }
}

// Exponents (x - largest) / T are at most 0; their exponentials over their sum are a softmax.
template <typename Real>
struct Softmax {
    Real largest, sum;
};

// exp of the exponents into `soft`, over a padded length.
template <typename Real>
XRDFAST_INLINE Softmax<Real> soften_inline(const Real* __restrict x, int n_padded, Real rate, Real* __restrict soft) {
    Real largest = x[0], sum = 0;
#pragma omp simd reduction(max : largest)
    for (int j = 0; j < n_padded; ++j) largest = x[j] > largest ? x[j] : largest;
#pragma omp simd reduction(+ : sum)
    for (int j = 0; j < n_padded; ++j) {
        soft[j] = exp_or_zero((x[j] - largest) * rate);
        sum += soft[j];
    }
    return {largest, sum};
}
XRDFAST_CLONES Softmax<float> soften(const float* x, int n_padded, float rate, float* soft) {
    return soften_inline(x, n_padded, rate, soft);
}
XRDFAST_CLONES Softmax<double> soften(const double* x, int n_padded, double rate, double* soft) {
    return soften_inline(x, n_padded, rate, soft);
}

// sum_j q_j (log q_j - log p_j). Every term has both normalisers: three sums put together at the end lose a digit.
template <typename Real>
XRDFAST_INLINE Real divergence_inline(const Real* __restrict x, const Softmax<Real>& p, const Real* __restrict y,
                                      const Softmax<Real>& q, const Real* __restrict soft_q, int n_padded, Real rate) {
    const Real log_sums = std::log(p.sum / q.sum);
    Real weighted = 0;
#pragma omp simd reduction(+ : weighted)
    for (int j = 0; j < n_padded; ++j) {
        const Real ratio = (y[j] - q.largest) * rate - (x[j] - p.largest) * rate + log_sums;
        weighted += soft_q[j] == 0 ? 0 : soft_q[j] * ratio;
    }
    return weighted / q.sum;
}
XRDFAST_CLONES float divergence(const float* x, const Softmax<float>& p, const float* y, const Softmax<float>& q,
                                const float* soft_q, int n_padded, float rate) {
    return divergence_inline(x, p, y, q, soft_q, n_padded, rate);
}
XRDFAST_CLONES double divergence(const double* x, const Softmax<double>& p, const double* y, const Softmax<double>& q,
                                 const double* soft_q, int n_padded, double rate) {
    return divergence_inline(x, p, y, q, soft_q, n_padded, rate);
}

// Lengthens a row to whole registers with -infinity, whose share of a softmax is 0; returns the length.
template <typename Real>
int pad(Real* row, int n) {
    const int n_padded = (n + kWhole - 1) / kWhole * kWhole;
    std::fill(row + n, row + n_padded, -std::numeric_limits<Real>::infinity());
    return n_padded;
}

template <typename From, typename To>
void convert(const From* __restrict from, int n, To* __restrict to) {
    for (int j = 0; j < n; ++j) to[j] = static_cast<To>(from[j]);
}

// Slopes of the ranks, into `soft`, and from there to the classes.
template <typename Real>
void put_in_order(Real* __restrict soft, Real scale, const Real* __restrict soft_previous, Real scale_previous,
                  const int32_t* __restrict order, int n, Real* __restrict slope) {
    for (int j = 0; j < n; ++j) soft[j] = soft[j] * scale - soft_previous[j] * scale_previous;
    for (int j = 0; j < n; ++j) slope[order[j]] = soft[j];
}

template <typename Element, typename Real = typename DsrLossParams<Element>::Real>
void forward_rows(const DsrLossParams<Element>& p, int64_t begin, int n_rows, Workspace<Real>& ws) {
    const Real rate = 1 / p.temperature;
    for (int head = 0; head < p.n_heads; ++head) {
        const int64_t first = p.class_offset[head];
        const int n = static_cast<int>(p.class_offset[head + 1] - first);
        for (int row = 0; row < kRows; ++row) {  // a short last group ranks its last row more than once
            const int64_t pattern = begin + std::min(row, n_rows - 1);
            const Element* logits = p.logits + pattern * p.logits_stride + first;
            if constexpr (std::is_same_v<Element, Real>) {
                ws.row[row] = logits;
            } else {
                convert(logits, n, ws.logits[row]);
                ws.row[row] = ws.logits[row];
            }
        }
        rank_rows(ws, n, n_rows);
        for (int row = 0; row < n_rows; ++row) {
            const int64_t pattern = begin + row;
            Real* ranked = ws.ranked[row];
            convert(ranked, n, p.ranked + pattern * p.n_classes + first);
            const int n_padded = pad(ranked, n);
            const Real* previous = ranked;
            if (p.previous_ranked) {
                convert(p.previous_ranked + pattern * p.previous_stride + first, n, ws.previous);
                pad(ws.previous, n);
                previous = ws.previous;
            }
            const Softmax<Real> softmax = soften(ranked, n_padded, rate, ws.soft);
            const Softmax<Real> softmax_previous = soften(previous, n_padded, rate, ws.soft_previous);
            const Real scale = p.temperature / softmax.sum, scale_previous = p.temperature / softmax_previous.sum;
            put_in_order(ws.soft, scale, ws.soft_previous, scale_previous, ws.order[row], n,
                         p.slope + pattern * p.n_classes + first);
            p.loss[pattern * p.n_heads + head] =
                p.temperature * p.temperature *
                divergence(ranked, softmax, previous, softmax_previous, ws.soft_previous, n_padded, rate);
        }
    }
}

}  // namespace

template <typename Element>
void dsr_loss_forward_cpu(const DsrLossParams<Element>& params, int n_threads) {
    const int64_t n_groups = (params.n_patterns + kRows - 1) / kRows;
    // Dynamic: a thread that wakes late takes fewer groups.
#pragma omp parallel for schedule(dynamic) num_threads(n_threads) if (n_groups > 1 && n_threads > 1)
    for (int64_t group = 0; group < n_groups; ++group) {
        auto& ws = thread_own<Workspace<typename DsrLossParams<Element>::Real>>();
        const int64_t begin = group * kRows;
        forward_rows(params, begin, static_cast<int>(std::min<int64_t>(kRows, params.n_patterns - begin)), ws);
    }
}

template <typename Element>
void dsr_loss_backward_cpu(const DsrLossParams<Element>& p, int n_threads) {
#pragma omp parallel for num_threads(n_threads) if (p.n_patterns > kRows && n_threads > 1)
    for (int64_t pattern = 0; pattern < p.n_patterns; ++pattern)
        for (int head = 0; head < p.n_heads; ++head) {
            const auto grad = p.grad_loss[pattern * p.grad_pattern_stride + head * p.grad_head_stride];
            const int64_t begin = pattern * p.n_classes;
            for (int64_t i = begin + p.class_offset[head]; i < begin + p.class_offset[head + 1]; ++i)
                p.grad_logits[i] = static_cast<Element>(p.slope[i] * grad);
        }
}

template void dsr_loss_forward_cpu(const DsrLossParams<float>&, int);
template void dsr_loss_forward_cpu(const DsrLossParams<double>&, int);
template void dsr_loss_forward_cpu(const DsrLossParams<BFloat16>&, int);
template void dsr_loss_backward_cpu(const DsrLossParams<float>&, int);
template void dsr_loss_backward_cpu(const DsrLossParams<double>&, int);
template void dsr_loss_backward_cpu(const DsrLossParams<BFloat16>&, int);

}  // namespace xrdfast
