// dsr_loss.cpp: ranked-output self-distillation loss on the CPU.
//
// Ranking is most of the work. In float, eight rows are ranked side by side, a register of them per class, by a sorting
// network: the same exchanges for every row, no branch on data. A logit and its class become one double, so that an
// exchange is a minimum and a maximum, which every instruction set has for doubles. Floors and what is reached:
// benchmarks/NOTES.md.
#include "dsr_loss.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "block_math.h"
#include "reflection_math.h"

namespace xrdfast {
namespace {

constexpr int kRows = 8;   // ranked side by side; eight doubles are a cache line and an AVX-512 register
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
    Real logits[kRows][kRowRoom];
    Real ranked[kRows][kRowRoom];
    int16_t order[kRows][kRowRoom];
    Real previous[kMaxHeadClasses];
    Real soft[kMaxHeadClasses], soft_previous[kMaxHeadClasses];  // softmax before normalisation
    double packed[kMaxHeadClasses * kRows];                      // (classes, kRows)
};

// A float as an integer of the same order: -0 equals 0, and NaN, whatever its sign, comes last.
XRDFAST_INLINE int32_t rank_key(float x) {
    const float value = x + 0.0f;
    int32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits ^= (bits >> 31) & INT32_MAX;
    return x != x ? INT32_MAX : bits;
}
XRDFAST_INLINE float value_of(int32_t key) {
    key ^= (key >> 31) & INT32_MAX;
    float x;
    std::memcpy(&x, &key, sizeof x);
    return x;
}

// (key, class) as the integer 1024 key + class, which a double holds exactly, and back through the integer that adding
// 1.5 * 2^52 leaves in the mantissa.
constexpr int kClassBits = 10;
static_assert(kMaxHeadClasses == 1 << kClassBits && kClassBits + 32 < 52, "the pair fits in a mantissa");

XRDFAST_CLONES void pack_rows(Workspace<float>& ws, int n) {
    for (int j = 0; j < n; ++j)
        for (int row = 0; row < kRows; ++row)
            ws.packed[j * kRows + row] = rank_key(ws.logits[row][j]) * static_cast<double>(kMaxHeadClasses) + j;
}

XRDFAST_CLONES void unpack_rows(Workspace<float>& ws, int n) {
    for (int j = 0; j < n; ++j)
        for (int row = 0; row < kRows; ++row) {
            const double shifted = ws.packed[j * kRows + row] + 6755399441055744.0;
            uint64_t bits;
            std::memcpy(&bits, &shifted, sizeof bits);
            ws.ranked[row][j] = value_of(static_cast<int32_t>(static_cast<uint32_t>(bits >> kClassBits)));
            ws.order[row][j] = static_cast<int16_t>(bits & (kMaxHeadClasses - 1));
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
// out. 3,419 exchanges for 230 classes. Vectors by name: of a plain loop GCC makes stores under a mask, which take some
// 20 cycles on an AMD processor.
struct SortPacked {
    double* packed;  // (n, kRows)
    int n;

    template <int kBytes>
    XRDFAST_INLINE void run() const {
        using S = Simd<double, kBytes>;
        double* const rows = packed;
        const int n_classes = n;
        // The merges up to eight classes take place in registers.
        int begin = 0;
        for (; begin + kEight <= n_classes; begin += kEight)
            for (int lane = 0; lane < kRows; lane += S::kLanes) sort_eight<S>(rows + begin * kRows + lane);
        merge<S>(rows + begin * kRows, n_classes - begin, 1, kEight);
        merge<S>(rows, n_classes, kEight, n_classes);
    }

    static constexpr int kEight = 8;

    template <class S>
    XRDFAST_INLINE static void sort_eight(double* rows) {
        constexpr int kPairs[][2] = {{0, 1}, {2, 3}, {4, 5}, {6, 7}, {0, 2}, {1, 3}, {4, 6}, {5, 7}, {1, 2}, {5, 6},
                                     {0, 4}, {1, 5}, {2, 6}, {3, 7}, {2, 4}, {3, 5}, {1, 2}, {3, 4}, {5, 6}};
        typename S::Vector x[kEight];
#pragma GCC unroll 8
        for (int i = 0; i < kEight; ++i) x[i] = load<typename S::Vector>(rows + i * kRows);
#pragma GCC unroll 19
        for (const auto& pair : kPairs) exchange(x[pair[0]], x[pair[1]]);
#pragma GCC unroll 8
        for (int i = 0; i < kEight; ++i) store(rows + i * kRows, x[i]);
    }

    // Runs of `merged` classes into runs of `last` or more.
    template <class S>
    XRDFAST_INLINE static void merge(double* rows, int n_classes, int merged, int last) {
        for (; merged < std::min(last, n_classes); merged *= 2)
            for (int distance = merged; distance >= 1; distance /= 2)
                for (int first = distance & (merged - 1); first + distance < n_classes; first += 2 * distance) {
                    // of two merges
                    if (distance < merged && ((first + distance) & (2 * merged - 1)) == 0) continue;
                    double *low = rows + first * kRows, *high = low + distance * kRows;
                    for (int count = std::min(distance, n_classes - first - distance); count > 0; --count)
#pragma GCC unroll 4
                        for (int lane = 0; lane < kRows; lane += S::kLanes, low += S::kLanes, high += S::kLanes) {
                            auto a = load<typename S::Vector>(low), b = load<typename S::Vector>(high);
                            exchange(a, b);
                            store(low, a);
                            store(high, b);
                        }
                }
    }
};

void rank_rows(Workspace<float>& ws, int n, int) {
    pack_rows(ws, n);
    run_best(SortPacked{ws.packed, n});
    unpack_rows(ws, n);
}

// In double, which is there for the tests of the gradient, a key and a class don't fit in one number.
void rank_rows(Workspace<double>& ws, int n, int n_rows) {
    for (int row = 0; row < n_rows; ++row) {
        const double* x = ws.logits[row];
        int16_t* order = ws.order[row];
        std::iota(order, order + n, static_cast<int16_t>(0));
        std::stable_sort(order, order + n,
                         [x](int16_t a, int16_t b) { return x[a] < x[b] || (x[a] == x[a] && x[b] != x[b]); });
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

template <typename Element, typename Real = typename DsrLossParams<Element>::Real>
void forward_rows(const DsrLossParams<Element>& p, int64_t begin, int n_rows, Workspace<Real>& ws) {
    const Real rate = 1 / p.temperature;
    for (int head = 0; head < p.n_heads; ++head) {
        const int64_t first = p.class_offset[head];
        const int n = static_cast<int>(p.class_offset[head + 1] - first);
        for (int row = 0; row < kRows; ++row) {  // a short last group ranks its last row more than once
            const int64_t pattern = begin + std::min(row, n_rows - 1);
            convert(p.logits + pattern * p.logits_stride + first, n, ws.logits[row]);
        }
        rank_rows(ws, n, n_rows);
        for (int row = 0; row < n_rows; ++row) {
            const int64_t pattern = begin + row;
            Real* ranked = ws.ranked[row];
            convert(ranked, n, p.ranked + pattern * p.n_classes + first);
            std::copy_n(ws.order[row], n, p.order + pattern * p.n_classes + first);
            const int n_padded = pad(ranked, n);
            const Real* previous = ranked;
            if (p.previous_ranked) {
                convert(p.previous_ranked + pattern * p.previous_stride + first, n, ws.previous);
                pad(ws.previous, n);
                previous = ws.previous;
            }
            const Softmax<Real> softmax = soften(ranked, n_padded, rate, ws.soft);
            const Softmax<Real> softmax_previous = soften(previous, n_padded, rate, ws.soft_previous);
            p.loss[pattern * p.n_heads + head] =
                p.temperature * p.temperature *
                divergence(ranked, softmax, previous, softmax_previous, ws.soft_previous, n_padded, rate);
        }
    }
}

// dL/dz[order[j]] = T (p_j - q_j) dL/dloss
template <typename Element, typename Real = typename DsrLossParams<Element>::Real>
void backward_row(const DsrLossParams<Element>& p, int64_t pattern, Workspace<Real>& ws) {
    const Real rate = 1 / p.temperature;
    for (int head = 0; head < p.n_heads; ++head) {
        const int64_t first = p.class_offset[head], at = pattern * p.n_classes + first;
        const int n = static_cast<int>(p.class_offset[head + 1] - first);
        convert(p.ranked + at, n, ws.ranked[0]);
        convert(p.previous_ranked + pattern * p.previous_stride + first, n, ws.previous);
        const int n_padded = pad(ws.ranked[0], n);
        pad(ws.previous, n);
        const Real grad = p.temperature *
                          p.grad_loss[pattern * p.grad_pattern_stride + head * p.grad_head_stride];
        const Real scale = grad / soften(ws.ranked[0], n_padded, rate, ws.soft).sum;
        const Real scale_previous = grad / soften(ws.previous, n_padded, rate, ws.soft_previous).sum;
        for (int j = 0; j < n; ++j) {
            const uint16_t to = static_cast<uint16_t>(p.order[at + j]);
            if (to < n)  // whatever came as an order
                p.grad_logits[at + to] =
                    static_cast<Element>(ws.soft[j] * scale - ws.soft_previous[j] * scale_previous);
        }
    }
}

}  // namespace

template <typename Element>
void dsr_loss_forward_cpu(const DsrLossParams<Element>& params, int n_threads) {
    const int64_t n_groups = (params.n_patterns + kRows - 1) / kRows;
#pragma omp parallel for num_threads(n_threads) if (n_groups > 1 && n_threads > 1)
    for (int64_t group = 0; group < n_groups; ++group) {
        static thread_local Workspace<typename DsrLossParams<Element>::Real> ws;
        const int64_t begin = group * kRows;
        forward_rows(params, begin, static_cast<int>(std::min<int64_t>(kRows, params.n_patterns - begin)), ws);
    }
}

template <typename Element>
void dsr_loss_backward_cpu(const DsrLossParams<Element>& params, int n_threads) {
#pragma omp parallel for num_threads(n_threads) if (params.n_patterns > kRows && n_threads > 1)
    for (int64_t pattern = 0; pattern < params.n_patterns; ++pattern) {
        static thread_local Workspace<typename DsrLossParams<Element>::Real> ws;
        backward_row(params, pattern, ws);
    }
}

template void dsr_loss_forward_cpu(const DsrLossParams<float>&, int);
template void dsr_loss_forward_cpu(const DsrLossParams<double>&, int);
template void dsr_loss_forward_cpu(const DsrLossParams<BFloat16>&, int);
template void dsr_loss_backward_cpu(const DsrLossParams<float>&, int);
template void dsr_loss_backward_cpu(const DsrLossParams<double>&, int);
template void dsr_loss_backward_cpu(const DsrLossParams<BFloat16>&, int);

}  // namespace xrdfast
