// peak_conv.cpp: CPU kernels of the thin, long stages: 3-wide convolutions over lists of rows with few channels, and norm,
// residual, activation and pool in one pass. The wide, short stages are library matrix products (xrdfast/ops/peak_conv.py).
//
// All sums run over fixed blocks of rows, and the blocks in order, so results do not depend on the number of threads.
#include "peak_conv.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "reflection_math.h"

namespace xrdfast {
namespace {

constexpr int kVectorBytes = 64;  // one AVX-512 register; narrower machines take it in pieces
template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
    typedef float type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
    typedef double type __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;
template <typename T>
constexpr int kLanes = kVectorBytes / sizeof(T);
template <typename T>
constexpr int kPanel = 2 * kLanes<T>;  // channels of a register tile

// 12 rows x 2 vectors of sums, 2 of weights and a broadcast: 27 of 32 registers.
constexpr int kTileRows = 12;
constexpr int kTaps = 3;
// 96 rows of 128 float channels are 48 kB: with one panel of weights as large they stay in L2 (2 MB).
constexpr int64_t kBlockRows = 96;
static_assert(kBlockRows % kTileRows == 0, "whole tiles but for the last");
constexpr int64_t kSumRows = 256;       // rows whose float sums are added up in double
constexpr int64_t kWeightParts = 16;    // partial sums of a weight's gradient
constexpr int64_t kMinPartRows = 512;   // rows of such a part, at least

template <typename T>
XRDFAST_INLINE Vector<T> load(const T* from) {
    Vector<T> v;
    std::memcpy(&v, from, sizeof v);
    return v;
}
template <typename T>
XRDFAST_INLINE void store(T* to, Vector<T> v) {
    std::memcpy(to, &v, sizeof v);
}

// sums[i] += sum over c of a[i * stride + c] * panel[c], for kRows rows and one panel of channels.
template <typename T, int kRows>
XRDFAST_INLINE void multiply_add(Vector<T> (&sums)[kRows][2], const T* __restrict a, int64_t stride, int64_t n,
                                 const T* __restrict panel) {
    for (int64_t c = 0; c < n; ++c) {
        const Vector<T> left = load(panel + c * kPanel<T>), right = load(panel + c * kPanel<T> + kLanes<T>);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
            const T value = a[i * stride + c];
            sums[i][0] += value * left;
            sums[i][1] += value * right;
        }
    }
}

// Weights (n_matrices, n_in, n_out) as (n_matrices, n_panels, n_in, kPanel), with zeros beyond n_out.
template <typename T>
struct PackedWeights {
    int64_t size;  // of a matrix
    std::vector<T> numbers;

    PackedWeights(const T* weight, int64_t n_matrices, int64_t n_in, int64_t n_out)
        : size((n_out + kPanel<T> - 1) / kPanel<T> * kPanel<T> * n_in), numbers(n_matrices * size, T(0)) {
        for (int64_t row = 0; row < n_matrices * n_in; ++row)
            for (int64_t column = 0; column < n_out; ++column)
                numbers[row / n_in * size + column / kPanel<T> * kPanel<T> * n_in + row % n_in * kPanel<T> +
                        column % kPanel<T>] = weight[row * n_out + column];
    }
    const T* matrix(int64_t i) const { return numbers.data() + i * size; }
};

template <typename T>
XRDFAST_INLINE T leaky(T z) {
    return z > T(0) ? z : static_cast<T>(kNegativeSlope) * z;
}

// Rows of a factor of a product: `n` numbers each, `stride` apart, and the packed weights they meet.
template <typename T>
struct Factor {
    const T* rows;
    int64_t stride, n;
    const T* packed;
};

// What happens to sums before they are stored. Plain: nothing.
template <typename T>
struct Finish {
    const T* offset;    // (n_out), null for a plain product; else LeakyReLU follows
    const T* residual;  // rows `stride` apart, or null
    int64_t stride;
};

// kRows rows and one panel of columns of a sum of products.
template <typename T, int kRows>
XRDFAST_INLINE void multiply_tile(const Factor<T>* factors, int n_factors, int64_t row, int64_t column,
                                  int64_t n_columns, const Finish<T>& finish, T* out, int64_t out_stride) {
    Vector<T> sums[kRows][2] = {};
    for (int f = 0; f < n_factors; ++f)
        multiply_add<T, kRows>(sums, factors[f].rows + row * factors[f].stride, factors[f].stride, factors[f].n,
                               factors[f].packed + column * factors[f].n);
    out += row * out_stride + column;
    const T* residual = finish.residual ? finish.residual + row * finish.stride + column : nullptr;
    const T* offset = finish.offset ? finish.offset + column : nullptr;
    for (int i = 0; i < kRows; ++i) {
        if (n_columns == kPanel<T>) {
            for (int half = 0; half < 2; ++half) {
                const int64_t at = half * kLanes<T>;
                Vector<T> sum = sums[i][half];
                if (offset) {
                    sum += load(offset + at);
                    if (residual) sum += load(residual + i * finish.stride + at);
                    sum = sum > T(0) ? sum : sum * static_cast<T>(kNegativeSlope);
                }
                store(out + i * out_stride + at, sum);
            }
            continue;
        }
        T whole[kPanel<T>];
        store(whole, sums[i][0]);
        store(whole + kLanes<T>, sums[i][1]);
        for (int64_t c = 0; c < n_columns; ++c) {
            const T more = residual ? residual[i * finish.stride + c] : T(0);
            out[i * out_stride + c] = offset ? leaky(whole[c] + offset[c] + more) : whole[c];
        }
    }
}

// n_rows rows of a sum of products, (n_rows, n_out).
template <typename T>
XRDFAST_CLONES void multiply_rows(const Factor<T>* factors, int n_factors, int64_t n_rows, int64_t n_out,
                                  const Finish<T>& finish, T* out, int64_t out_stride) {
    for (int64_t column = 0; column < n_out; column += kPanel<T>) {
        const int64_t n_columns = std::min<int64_t>(kPanel<T>, n_out - column);
        int64_t row = 0;
        for (; row + kTileRows <= n_rows; row += kTileRows)
            multiply_tile<T, kTileRows>(factors, n_factors, row, column, n_columns, finish, out, out_stride);
        for (; row + 4 <= n_rows; row += 4)
            multiply_tile<T, 4>(factors, n_factors, row, column, n_columns, finish, out, out_stride);
        for (; row + 2 <= n_rows; row += 2)
            multiply_tile<T, 2>(factors, n_factors, row, column, n_columns, finish, out, out_stride);
        for (; row < n_rows; ++row)
            multiply_tile<T, 1>(factors, n_factors, row, column, n_columns, finish, out, out_stride);
    }
}

// Rows that are neighbours of each other, `stride` numbers apart; zero beyond both ends.
template <typename T>
struct Sequence {
    const T* rows;
    int64_t stride, n_rows;
};

// Rows [begin, end) of a 3-wide convolution of a sequence, and what follows. `zeros` are a row of x.
template <typename T>
void convolve_rows(const Sequence<T>& x, int64_t n_in, const PackedWeights<T>& weights, int64_t n_out, int64_t shift,
                   int64_t begin, int64_t end, const Finish<T>& finish, T* out, int64_t out_stride, const T* zeros) {
    const auto some = [&](int64_t from, int64_t to) {
        Factor<T> factors[kTaps];
        for (int tap = 0; tap < kTaps; ++tap) {
            const int64_t first = from + (tap - 1) * shift;
            const bool beyond = first < 0 || first >= x.n_rows;
            factors[tap] = {beyond ? zeros : x.rows + first * x.stride, x.stride, n_in, weights.matrix(tap)};
        }
        multiply_rows(factors, kTaps, to - from, n_out, finish, out + (from - begin) * out_stride, out_stride);
    };
    // Where a tap meets zeros, rows go one by one.
    const int64_t reach = shift < 0 ? -shift : shift;
    const int64_t inner_begin = std::min(end, std::max(begin, reach));
    const int64_t inner_end = std::max(inner_begin, std::min(end, x.n_rows - reach));
    for (int64_t r = begin; r < inner_begin; ++r) some(r, r + 1);
    if (inner_begin < inner_end) some(inner_begin, inner_end);
    for (int64_t r = inner_end; r < end; ++r) some(r, r + 1);
}

// sums (kRows channels of x, kPanel of grad_out) += the outer products of rows [begin, end); `shift` leads to x's rows.
template <typename T, int kRows>
XRDFAST_INLINE void add_outer_products(const PeakConvWeightParams<T>& p, int64_t begin, int64_t end, int64_t shift,
                                       int64_t channel, int64_t column, T* grad) {
    Vector<T> sums[kRows][2];
    for (int i = 0; i < kRows; ++i) {
        sums[i][0] = load(grad + i * p.n_out);
        sums[i][1] = load(grad + i * p.n_out + kLanes<T>);
    }
    for (int64_t r = begin; r < end; ++r) {
        const T *g = p.grad_out + r * p.n_out + column, *x = p.x + (r + shift) * p.n_in + channel;
        const Vector<T> left = load(g), right = load(g + kLanes<T>);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
            sums[i][0] += x[i] * left;
            sums[i][1] += x[i] * right;
        }
    }
    for (int i = 0; i < kRows; ++i) {
        store(grad + i * p.n_out, sums[i][0]);
        store(grad + i * p.n_out + kLanes<T>, sums[i][1]);
    }
}

// Adds what rows [begin, end) of grad_out give to `grad` (3, n_in, n_out).
template <typename T>
XRDFAST_CLONES void add_weight_gradient(const PeakConvWeightParams<T>& p, int64_t begin, int64_t end, T* grad) {
    const int64_t whole_columns = p.n_out / kPanel<T> * kPanel<T>;
    for (int64_t block = begin; block < end; block += kBlockRows) {
        for (int tap = 0; tap < kTaps; ++tap) {
            const int64_t shift = (tap - 1) * p.shift;
            const int64_t first = std::max(block, -shift);
            const int64_t last = std::min({end, block + kBlockRows, p.n_rows - shift});
            for (int64_t channel = 0; channel < p.n_in;) {
                const int64_t left = p.n_in - channel, n = left >= kTileRows ? kTileRows : left >= 4 ? 4 : 1;
                T* at = grad + (tap * p.n_in + channel) * p.n_out;
                for (int64_t column = 0; column < whole_columns; column += kPanel<T>) {
                    if (n == kTileRows)
                        add_outer_products<T, kTileRows>(p, first, last, shift, channel, column, at + column);
                    else if (n == 4)
                        add_outer_products<T, 4>(p, first, last, shift, channel, column, at + column);
                    else
                        add_outer_products<T, 1>(p, first, last, shift, channel, column, at + column);
                }
                for (int64_t r = first; r < last; ++r)  // columns that fill no panel
                    for (int64_t i = 0; i < n; ++i)
                        for (int64_t column = whole_columns; column < p.n_out; ++column)
                            at[i * p.n_out + column] +=
                                p.x[(r + shift) * p.n_in + channel + i] * p.grad_out[r * p.n_out + column];
                channel += n;
            }
        }
    }
}

int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

// The channels' factors of a norm: y = (h - mean) * scale + beta.
template <typename T>
struct Factors {
    std::vector<T> scale, rstd;
    explicit Factors(const PeakNormParams<T>& p) : scale(p.n_channels), rstd(p.n_channels) {
        for (int64_t c = 0; c < p.n_channels; ++c) {
            rstd[c] = static_cast<T>(1.0 / std::sqrt(static_cast<double>(p.var[c]) + p.eps));
            scale[c] = p.gamma[c] * rstd[c];
        }
    }
};

// Mean and sum of squared deviations of some rows, weighted: (n_channels) each.
template <typename T>
XRDFAST_CLONES void block_moments(const PeakNormParams<T>& p, int64_t begin, int64_t end, T* __restrict mean,
                                  T* __restrict squares, double* weight) {
    const int64_t n = p.n_channels;
    double total = 0.0;
    std::fill_n(mean, n, T(0));
    std::fill_n(squares, n, T(0));
    for (int64_t r = begin; r < end; ++r) {
        const T w = p.count ? static_cast<T>(p.count[r]) : T(1);
        if (w == T(0)) continue;
        total += w;
        const T* h = p.h + r * n;
#pragma omp simd
        for (int64_t c = 0; c < n; ++c) mean[c] += w * h[c];
    }
    *weight = total;
    if (total == 0.0) return;
    const T inverse = static_cast<T>(1.0 / total);
    for (int64_t c = 0; c < n; ++c) mean[c] *= inverse;
    for (int64_t r = begin; r < end; ++r) {
        const T w = p.count ? static_cast<T>(p.count[r]) : T(1);
        if (w == T(0)) continue;
        const T* h = p.h + r * n;
#pragma omp simd
        for (int64_t c = 0; c < n; ++c) squares[c] += w * (h[c] - mean[c]) * (h[c] - mean[c]);
    }
}

// Joins the blocks' moments in order (Chan, Golub and LeVeque, 1979).
template <typename T>
void batch_moments(const PeakNormParams<T>& p, int n_threads) {
    const int64_t n = p.n_channels, n_blocks = blocks_of(p.n_rows, kSumRows);
    std::vector<T> moments(2 * n_blocks * n);
    std::vector<double> weights(n_blocks);
#pragma omp parallel for schedule(static) num_threads(n_threads) if (n_threads > 1 && n_blocks > 4)
    for (int64_t b = 0; b < n_blocks; ++b)
        block_moments(p, b * kSumRows, std::min(p.n_rows, (b + 1) * kSumRows), moments.data() + 2 * b * n,
                      moments.data() + (2 * b + 1) * n, &weights[b]);
    std::vector<double> mean(n, 0.0), squares(n, 0.0);
    double total = 0.0;
    for (int64_t b = 0; b < n_blocks; ++b) {
        if (weights[b] == 0.0) continue;
        const double joined = total + weights[b], share = weights[b] / joined;
        const T *block_mean = moments.data() + 2 * b * n, *block_squares = block_mean + n;
        for (int64_t c = 0; c < n; ++c) {
            const double distance = block_mean[c] - mean[c];
            mean[c] += share * distance;
            squares[c] += block_squares[c] + distance * distance * total * share;
        }
        total = joined;
    }
    for (int64_t c = 0; c < n; ++c) {
        p.mean[c] = static_cast<T>(mean[c]);
        p.var[c] = static_cast<T>(squares[c] / p.total);
    }
}

// z of one row, the argument of LeakyReLU.
template <typename T>
XRDFAST_INLINE void row_arguments(const PeakNormParams<T>& p, const T* __restrict scale, int64_t row, T* __restrict z) {
    const T *h = p.h + row * p.n_channels, *mean = p.mean, *beta = p.beta;
    if (p.residual) {
        const T* residual = p.residual + row * p.n_channels;
#pragma omp simd
        for (int64_t c = 0; c < p.n_channels; ++c) z[c] = (h[c] - mean[c]) * scale[c] + beta[c] + residual[c];
    } else {
#pragma omp simd
        for (int64_t c = 0; c < p.n_channels; ++c) z[c] = (h[c] - mean[c]) * scale[c] + beta[c];
    }
}

// y of one row; row -1 is zero.
template <typename T>
XRDFAST_INLINE void activated_row(const PeakNormParams<T>& p, const T* scale, int64_t row, T* __restrict y) {
    if (row < 0) {
        std::fill_n(y, p.n_channels, T(0));
        return;
    }
    row_arguments(p, scale, row, y);
#pragma omp simd
    for (int64_t c = 0; c < p.n_channels; ++c) y[c] = leaky(y[c]);
}

// Rows [begin, end) of the result. `room` holds n_channels numbers.
template <typename T>
XRDFAST_CLONES void norm_rows(const PeakNormParams<T>& p, const T* scale, int64_t begin, int64_t end,
                              T* __restrict room, T* out) {
    const int64_t n = p.n_channels;
    const int32_t *first = p.take, *second = p.take && p.n_take == 2 ? p.take + p.n_rows_out : nullptr;
    for (int64_t j = begin; j < end; ++j) {
        T* __restrict y = out + j * n;
        activated_row(p, scale, first ? first[j] : j, y);
        if (!second) continue;
        activated_row(p, scale, second[j], room);
        if (p.maximum) {
#pragma omp simd
            for (int64_t c = 0; c < n; ++c) y[c] = (room[c] > y[c]) | (room[c] != room[c]) ? room[c] : y[c];
        } else {
#pragma omp simd
            for (int64_t c = 0; c < n; ++c) y[c] = T(0.5) * (y[c] + room[c]);
        }
    }
}

// Rows [begin, end) of the pool of a whole stage.
template <typename T>
XRDFAST_CLONES void pool_rows(const PeakStageParams<T>& p, int64_t begin, int64_t end, const T* zeros) {
    const int64_t n = p.n_channels;
    for (int64_t j = begin; j < end; ++j) {
        const int64_t first = p.pairs[j], second = p.pairs[p.n_rows_out + j];
        const T *a = first < 0 ? zeros : p.y + first * n, *b = second < 0 ? zeros : p.y + second * n;
        T* __restrict out = p.out + j * n;
        if (p.maximum) {
#pragma omp simd
            for (int64_t c = 0; c < n; ++c) out[c] = (b[c] > a[c]) | (b[c] != b[c]) ? b[c] : a[c];
        } else {
#pragma omp simd
            for (int64_t c = 0; c < n; ++c) out[c] = T(0.5) * (a[c] + b[c]);
        }
    }
}

// Adds row j's gradient to dL/dz of the rows it took that are asked for, on channels [c0, c1). `room` holds two rows.
template <typename T, bool kBlank>
XRDFAST_INLINE void pass_gradient(const PeakNormParams<T>& p, const T* scale, const PeakNormGrads<T>& grads, int64_t j,
                                  int64_t c0, int64_t c1, T* __restrict room) {
    const int64_t n = p.n_channels;
    const int n_take = p.take ? p.n_take : 1;
    int64_t row[kMaxTake];
    T* z[kMaxTake] = {room, room + n};
    bool asked = false;
    for (int t = 0; t < n_take; ++t) {
        row[t] = p.take ? p.take[t * p.n_rows_out + j] : j;
        asked |= row[t] >= 0 && (row[t] >= p.n_touched) == kBlank;
    }
    if (!asked) return;
    for (int t = 0; t < n_take; ++t) {
        if (row[t] < 0) {
            std::fill_n(z[t], n, T(0));
            continue;
        }
        const T *h = p.h + row[t] * n, *residual = p.residual ? p.residual + row[t] * n : nullptr;
#pragma omp simd
        for (int64_t c = c0; c < c1; ++c)
            z[t][c] = (h[c] - p.mean[c]) * scale[c] + p.beta[c] + (residual ? residual[c] : T(0));
    }
    const T* __restrict g = grads.grad_out + j * n;
    for (int t = 0; t < n_take; ++t) {
        if (row[t] < 0 || (row[t] >= p.n_touched) != kBlank) continue;
        T* __restrict to = grads.grad_residual + row[t] * n;
        const T *own = z[t], *other = z[1 - t];
        const T slope = static_cast<T>(kNegativeSlope), half = n_take == 2 && !p.maximum ? T(0.5) : T(1);
        if (n_take == 2 && p.maximum) {
            // LeakyReLU rises, so the larger argument has the larger value; the first wins where they are equal.
            if (t == 0) {
#pragma omp simd
                for (int64_t c = c0; c < c1; ++c)
                    to[c] += (other[c] > own[c]) | (other[c] != other[c]) ? T(0) : own[c] > T(0) ? g[c] : slope * g[c];
            } else {
#pragma omp simd
                for (int64_t c = c0; c < c1; ++c)
                    to[c] += (own[c] > other[c]) | (own[c] != own[c]) ? (own[c] > T(0) ? g[c] : slope * g[c]) : T(0);
            }
        } else {
#pragma omp simd
            for (int64_t c = c0; c < c1; ++c) to[c] += half * (own[c] > T(0) ? g[c] : slope * g[c]);
        }
    }
}

template <typename T>
XRDFAST_CLONES void pass_to_touched(const PeakNormParams<T>& p, const T* scale, const PeakNormGrads<T>& grads,
                                    int64_t begin, int64_t end, T* room) {
    for (int64_t j = begin; j < end; ++j) pass_gradient<T, false>(p, scale, grads, j, 0, p.n_channels, room);
}

template <typename T>
XRDFAST_CLONES void pass_to_blank(const PeakNormParams<T>& p, const T* scale, const PeakNormGrads<T>& grads,
                                  const std::vector<int64_t>& takers, int64_t c0, int64_t c1, T* room) {
    for (const int64_t j : takers) pass_gradient<T, true>(p, scale, grads, j, c0, c1, room);
}

// Sums over rows [begin, end) of dL/dz and of dL/dz times the normalised h. A row that counts for no sample is not left
// out: a blank row where every pattern has its own still stands for those of its blank neighbours' inputs.
template <typename T>
XRDFAST_CLONES void sum_gradients(const PeakNormParams<T>& p, const T* __restrict rstd, const T* grad_z, int64_t begin,
                                  int64_t end, T* __restrict plain, T* __restrict scaled) {
    const int64_t n = p.n_channels;
    std::fill_n(plain, n, T(0));
    std::fill_n(scaled, n, T(0));
    for (int64_t r = begin; r < end; ++r) {
        const T *g = grad_z + r * n, *h = p.h + r * n, *mean = p.mean;
#pragma omp simd
        for (int64_t c = 0; c < n; ++c) {
            plain[c] += g[c];
            scaled[c] += g[c] * ((h[c] - mean[c]) * rstd[c]);
        }
    }
}

template <typename T>
XRDFAST_CLONES void input_gradients(const PeakNormParams<T>& p, const T* __restrict scale, const T* __restrict rstd,
                                    const PeakNormGrads<T>& grads, int64_t begin, int64_t end) {
    const int64_t n = p.n_channels;
    const T inverse = p.batch ? static_cast<T>(1.0 / p.total) : T(0);
    const T *mean = p.mean, *plain = grads.grad_beta, *scaled = grads.grad_gamma;
    for (int64_t r = begin; r < end; ++r) {
        T* __restrict to = grads.grad_h + r * n;
        const T *g = grads.grad_residual + r * n, *h = p.h + r * n;
        const T weight = (p.count ? static_cast<T>(p.count[r]) : T(1)) * inverse;
#pragma omp simd
        for (int64_t c = 0; c < n; ++c)
            to[c] = scale[c] * (g[c] - weight * (plain[c] + (h[c] - mean[c]) * rstd[c] * scaled[c]));
    }
}

constexpr int64_t kSliceNumbers = 4096;  // of one position or plane that a thread takes at a time

// Calls visit(tile, first, last) for slices of all tiles, side by side; kinds of tiles differ at the ends only.
template <typename Visit>
void for_each_slice(int64_t tile_begin, int64_t tile_end, int64_t size, int n_threads, Visit visit) {
    const int64_t n_slices = blocks_of(size, kSliceNumbers), n = (tile_end - tile_begin) * n_slices;
#pragma omp parallel for schedule(static) num_threads(n_threads) if (n_threads > 1 && n > 1)
    for (int64_t i = 0; i < n; ++i) {
        const int64_t first = i % n_slices * kSliceNumbers;
        visit(tile_begin + i / n_slices, first, std::min(size, first + kSliceNumbers));
    }
}

template <typename T>
XRDFAST_CLONES void input_planes(const T* d0, const T* d1, const T* d2, const T* d3, int64_t n, T* __restrict v0,
                                 T* __restrict v1, T* __restrict v2, T* __restrict v3) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        v0[i] = d0[i] - d2[i];
        v1[i] = d1[i] + d2[i];
        v2[i] = d2[i] - d1[i];
        v3[i] = d1[i] - d3[i];
    }
}

// y1 is null at the end of an odd number of positions.
template <typename T>
XRDFAST_CLONES void output_rows(const T* m0, const T* m1, const T* m2, const T* m3, int64_t n, T* __restrict y0,
                                T* __restrict y1) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) y0[i] = m0[i] + m1[i] + m2[i];
    if (!y1) return;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) y1[i] = m1[i] - m2[i] - m3[i];
}

template <typename T>
XRDFAST_CLONES void gradient_planes(const T* g0, const T* g1, int64_t n, T* __restrict m0, T* __restrict m1,
                                    T* __restrict m2, T* __restrict m3) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        m0[i] = g0[i];
        m1[i] = g0[i] + g1[i];
        m2[i] = g0[i] - g1[i];
        m3[i] = -g1[i];
    }
}

template <typename T>
XRDFAST_CLONES void weight_planes(const T* w0, const T* w1, const T* w2, int64_t n, T* __restrict u0, T* __restrict u1,
                                  T* __restrict u2, T* __restrict u3) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const T outer = T(0.5) * (w0[i] + w2[i]), middle = T(0.5) * w1[i];
        u0[i] = w0[i];
        u1[i] = outer + middle;
        u2[i] = outer - middle;
        u3[i] = w2[i];
    }
}

template <typename T>
XRDFAST_CLONES void gradient_taps(const T* u0, const T* u1, const T* u2, const T* u3, int64_t n, T* __restrict w0,
                                  T* __restrict w1, T* __restrict w2) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const T outer = T(0.5) * (u1[i] + u2[i]);
        w0[i] = u0[i] + outer;
        w1[i] = T(0.5) * (u1[i] - u2[i]);
        w2[i] = outer + u3[i];
    }
}

struct Segment {
    int64_t begin, end;
};
using Segments = std::vector<Segment>;  // of one pattern, in order, apart

// Appends a segment that begins no earlier than the last one, joined to it where at most `gap` positions lie between.
void append(Segments& segments, Segment next, int64_t gap) {
    if (next.begin >= next.end) return;
    if (!segments.empty() && next.begin - segments.back().end <= gap)
        segments.back().end = std::max(segments.back().end, next.end);
    else
        segments.push_back(next);
}

template <typename T>
Segments peaks_of(const T* intensity, int64_t length) {
    constexpr int64_t kStride = 16;  // positions looked at in one go
    Segments peaks;
    for (int64_t first = 0; first < length; first += kStride) {
        const int64_t last = std::min(length, first + kStride);
        int any = 0;
        for (int64_t i = first; i < last; ++i) any |= intensity[i] != T(0);
        for (int64_t i = first; any && i < last; ++i)
            if (intensity[i] != T(0)) append(peaks, {i, i + 1}, 0);
    }
    return peaks;
}

// Rows of one stage: pattern by pattern the segments between halos, then the blank pattern between halos; or dense.
struct Layout {
    bool packed;
    int64_t length, n_rows, blank;        // `blank`: row of the blank pattern's first position
    std::vector<Segments> computed;       // of each pattern
    std::vector<int64_t> first_row;       // of each pattern
};

// Finds rows of rising positions of one pattern.
class RowFinder {
   public:
    RowFinder(const Layout& layout, int64_t pattern)
        : layout_(layout),
          segment_(layout.computed[pattern].data()),
          end_(segment_ + layout.computed[pattern].size()),
          row_(layout.first_row[pattern] + 1) {}

    // The row with the value at a position, a blank one where the pattern has none of its own; -1 beyond the grid.
    int32_t at(int64_t position) {
        if (position < 0 || position >= layout_.length) return -1;
        for (; segment_ != end_ && segment_->end <= position; ++segment_) row_ += segment_->end - segment_->begin + 2;
        const bool own = segment_ != end_ && segment_->begin <= position;
        return static_cast<int32_t>(own ? row_ + position - segment_->begin : layout_.blank + position);
    }

   private:
    const Layout& layout_;
    const Segment *segment_, *end_;
    int64_t row_;  // of the segment's first position
};

Layout packed_layout(const std::vector<Segments>& felt, int64_t length, int64_t max_gap) {
    Layout layout{true, length, 0, 0, {}, {}};
    for (const Segments& pattern : felt) {
        layout.first_row.push_back(layout.n_rows);
        Segments joined;
        for (const Segment& s : pattern) append(joined, s, max_gap);
        for (const Segment& s : joined) layout.n_rows += s.end - s.begin + 2;
        layout.computed.push_back(std::move(joined));
    }
    layout.blank = layout.n_rows + 1;
    layout.n_rows += length + 2;
    return layout;
}

// Calls visit(pattern, position, row, is a halo) for every row of a packed layout; the blank pattern is the last.
template <typename Visit>
void for_each_row(const Layout& layout, Visit visit) {
    int64_t row = 0;
    const int64_t n_patterns = static_cast<int64_t>(layout.computed.size());
    const Segments whole{{0, layout.length}};
    for (int64_t pattern = 0; pattern <= n_patterns; ++pattern)
        for (const Segment& s : pattern < n_patterns ? layout.computed[pattern] : whole) {
            visit(pattern, s.begin - 1, row++, true);
            for (int64_t position = s.begin; position < s.end; ++position) visit(pattern, position, row++, false);
            visit(pattern, s.end, row++, true);
        }
}

template <typename T>
void describe_stage(const PeakPlanParams<T>& p, const Layout& layout, float* count, int32_t* halo) {
    std::vector<int64_t> lacking(layout.length + 1, 0);  // steps, then patterns without a row of their own
    for (const Segments& pattern : layout.computed)
        for (const Segment& s : pattern) {
            --lacking[s.begin];
            ++lacking[s.end];
        }
    int64_t running = p.n_patterns;
    for (int64_t& patterns : lacking) patterns = running += patterns;
    for_each_row(layout, [&](int64_t pattern, int64_t position, int64_t row, bool is_halo) {
        const bool inside = position >= 0 && position < layout.length;
        halo[row] = static_cast<int32_t>(!is_halo ? row : inside ? layout.blank + position : -1);
        count[row] = is_halo ? 0.0f : pattern < p.n_patterns ? 1.0f : static_cast<float>(lacking[position]);
    });
}

template <typename T>
void describe_input(const PeakPlanParams<T>& p, const Layout& layout) {
    int64_t blank = 0;  // some point that is zero: no pattern is touched everywhere, or this would be dense
    while (p.intensity[blank] != T(0)) ++blank;
    for_each_row(layout, [&](int64_t pattern, int64_t position, int64_t row, bool is_halo) {
        const bool inside = position >= 0 && position < p.length;
        p.position[row] = inside ? position : -1;
        p.point[row] = !inside ? 0 : is_halo || pattern == p.n_patterns ? blank : pattern * p.length + position;
    });
}

void describe_pool(const Layout& before, const Layout& after, int64_t n_patterns, int64_t padding, int32_t* pairs) {
    int32_t *first = pairs, *second = pairs + after.n_rows;
    if (!after.packed) {
        for (int64_t pattern = 0; pattern < n_patterns; ++pattern) {
            RowFinder finder(before, pattern);
            for (int64_t position = 0; position < after.length; ++position) {
                first[position * n_patterns + pattern] = finder.at(2 * position - padding);
                second[position * n_patterns + pattern] = finder.at(2 * position - padding + 1);
            }
        }
        return;
    }
    int64_t row = 0;
    const auto describe = [&](RowFinder& finder, int64_t position) {
        const bool inside = position >= 0 && position < after.length;
        first[row] = inside ? finder.at(2 * position - padding) : -1;
        second[row++] = inside ? finder.at(2 * position - padding + 1) : -1;
    };
    for (int64_t pattern = 0; pattern < n_patterns; ++pattern) {
        RowFinder finder(before, pattern);
        for (const Segment& s : after.computed[pattern])
            for (int64_t position = s.begin - 1; position <= s.end; ++position) describe(finder, position);
    }
    for (int64_t position = -1; position <= after.length; ++position, ++row) {
        for (int which = 0; which < 2; ++which) {
            const int64_t from = 2 * position - padding + which;
            const bool inside = position >= 0 && position < after.length && from >= 0 && from < before.length;
            (which ? second : first)[row] = static_cast<int32_t>(inside ? before.blank + from : -1);
        }
    }
}

}  // namespace

template <typename T>
void peak_plan_cpu(const PeakPlanParams<T>& p) {
    const int64_t room = p.n_patterns * p.length;
    std::vector<Segments> touched;
    for (int64_t i = 0; i < p.n_patterns; ++i) touched.push_back(peaks_of(p.intensity + i * p.length, p.length));
    std::fill_n(p.n_rows, p.packed_stages, 0);
    Layout before{};
    int64_t length = p.length;
    for (int64_t stage = 0; stage <= p.n_stages; ++stage) {
        const int64_t dense_rows = p.n_patterns * length;
        Layout layout{false, length, dense_rows, 0, {}, {}};
        if (stage < p.packed_stages) {
            std::vector<Segments> felt(touched.size());
            for (size_t i = 0; i < touched.size(); ++i)
                for (const Segment& s : touched[i])
                    append(felt[i], {std::max<int64_t>(0, s.begin - p.reach), std::min(length, s.end + p.reach)}, 0);
            Layout packed = packed_layout(felt, length, p.max_gap);
            if (static_cast<double>(packed.n_rows) < p.packed_share * static_cast<double>(dense_rows)) {
                layout = std::move(packed);
                touched = std::move(felt);
            }
        }
        if (stage > 0)
            describe_pool(before, layout, p.n_patterns, p.paddings[stage - 1], p.pairs + 2 * (stage - 1) * room);
        if (!layout.packed) return;
        p.n_rows[stage] = layout.n_rows;
        describe_stage(p, layout, p.count + stage * room, p.halo + stage * room);
        if (stage == 0) describe_input(p, layout);
        const int64_t padding = p.paddings[stage], next = (length + 2 * padding) / 2;
        for (Segments& pattern : touched) {
            Segments pooled;
            for (const Segment& s : pattern)
                append(pooled, {(s.begin + padding) / 2, std::min(next, (s.end - 1 + padding) / 2 + 1)}, 0);
            pattern = std::move(pooled);
        }
        before = std::move(layout);
        length = next;
    }
}

template <typename T>
void peak_conv_cpu(const PeakConvParams<T>& p, int n_threads) {
    const PackedWeights<T> weights(p.weight, kTaps, p.n_in, p.n_out);
    const std::vector<T> zeros(p.n_in, T(0));
    const int64_t n_blocks = blocks_of(p.n_rows, kBlockRows);
    const Sequence<T> x{p.x, p.n_in, p.n_rows};
#pragma omp parallel for schedule(static) num_threads(n_threads) if (n_threads > 1 && n_blocks > 1)
    for (int64_t b = 0; b < n_blocks; ++b)
        convolve_rows(x, p.n_in, weights, p.n_out, p.shift, b * kBlockRows, std::min(p.n_rows, (b + 1) * kBlockRows),
                      Finish<T>{nullptr, nullptr, 0}, p.out + b * kBlockRows * p.n_out, p.n_out, zeros.data());
}

template <typename T>
void peak_stage_cpu(const PeakStageParams<T>& p, int n_threads) {
    const int64_t n = p.n_channels;
    const PackedWeights<T> first(p.first, kTaps, p.n_in, n), second(p.second, kTaps, n, n);
    const PackedWeights<T> widen(p.widen, p.widen ? 1 : 0, p.n_in, n);
    const std::vector<T> zeros(std::max(p.n_in, n), T(0));
    // The interleaved patterns of a dense list are sequences of their own; a packed list is one.
    const auto sequence = [&](int64_t i) {
        return Sequence<T>{p.x + i * p.n_in, p.shift * p.n_in, p.n_rows / p.shift};
    };
    const Finish<T> activate{p.offset1, nullptr, 0};
    const int64_t blank = p.n_touched + 1, n_blank = std::max<int64_t>(0, p.n_rows - blank - 1);
    std::vector<T> blank_inner(n_blank * n);  // what the second convolution meets in the halos
    const int64_t n_blank_blocks = blocks_of(n_blank, kBlockRows);
    const int64_t n_rows = p.n_rows / p.shift, n_blocks = blocks_of(n_rows, kBlockRows);
    const int64_t n_pools = blocks_of(p.n_rows_out, kSumRows);
#pragma omp parallel num_threads(n_threads) if (n_threads > 1)
    {
        std::vector<T> inner((kBlockRows + 2) * n);
#pragma omp for schedule(static)
        for (int64_t b = 0; b < n_blank_blocks; ++b)
            convolve_rows(sequence(0), p.n_in, first, n, 1, blank + b * kBlockRows,
                          blank + std::min(n_blank, (b + 1) * kBlockRows), activate,
                          blank_inner.data() + b * kBlockRows * n, n, zeros.data());
#pragma omp for schedule(static)
        for (int64_t i = 0; i < p.shift * n_blocks; ++i) {
            const int64_t begin = i % n_blocks * kBlockRows, end = std::min(n_rows, begin + kBlockRows);
            const Sequence<T> x = sequence(i / n_blocks);
            const int64_t from = std::max<int64_t>(0, begin - 1), to = std::min(n_rows, end + 1);
            std::fill_n(inner.data(), n, T(0));
            std::fill_n(inner.data() + (end - begin + 1) * n, n, T(0));
            convolve_rows(x, p.n_in, first, n, 1, from, to, activate, inner.data() + (from - begin + 1) * n, n,
                          zeros.data());
            for (int64_t r = from; p.halo && r < to; ++r)
                if (p.halo[r] != r)
                    std::copy_n(p.halo[r] < 0 ? zeros.data() : blank_inner.data() + (p.halo[r] - blank) * n, n,
                                inner.data() + (r - begin + 1) * n);
            const T* own = x.rows + begin * x.stride;
            Factor<T> factors[kTaps + 1] = {};
            for (int tap = 0; tap < kTaps; ++tap) factors[tap] = {inner.data() + tap * n, n, n, second.matrix(tap)};
            if (p.widen) factors[kTaps] = {own, x.stride, p.n_in, widen.matrix(0)};
            const Finish<T> finish{p.offset2, p.widen ? nullptr : own, x.stride};
            multiply_rows(factors, p.widen ? kTaps + 1 : kTaps, end - begin, n, finish,
                          p.y + (begin * p.shift + i / n_blocks) * n, p.shift * n);
        }
#pragma omp for schedule(static)
        for (int64_t b = 0; b < n_pools; ++b)
            pool_rows(p, b * kSumRows, std::min(p.n_rows_out, (b + 1) * kSumRows), zeros.data());
    }
}

template <typename T>
void peak_conv_weight_cpu(const PeakConvWeightParams<T>& p, int n_threads) {
    const int64_t n_parts = std::max<int64_t>(1, std::min(kWeightParts, blocks_of(p.n_rows, kMinPartRows)));
    const int64_t n_rows = blocks_of(blocks_of(p.n_rows, n_parts), kBlockRows) * kBlockRows;
    const int64_t size = kTaps * p.n_in * p.n_out;
    std::vector<T> parts(n_parts * size, T(0));
#pragma omp parallel for schedule(static) num_threads(n_threads) if (n_threads > 1 && n_parts > 1)
    for (int64_t i = 0; i < n_parts; ++i)
        add_weight_gradient(p, std::min(p.n_rows, i * n_rows), std::min(p.n_rows, (i + 1) * n_rows),
                            parts.data() + i * size);
    std::copy_n(parts.data(), size, p.grad_weight);
    for (int64_t i = 1; i < n_parts; ++i) {
        const T* part = parts.data() + i * size;
        for (int64_t k = 0; k < size; ++k) p.grad_weight[k] += part[k];
    }
}

template <typename T>
void winograd_input_cpu(const WinogradParams<T>& p, int n_threads) {
    const std::vector<T> zeros(std::min(p.size, kSliceNumbers), T(0));
    const int64_t plane = (p.tile_end - p.tile_begin) * p.size;
    for_each_slice(p.tile_begin, p.tile_end, p.size, n_threads, [&](int64_t tile, int64_t first, int64_t last) {
        const T* d[4];
        for (int i = 0; i < 4; ++i) {
            const int64_t position = 2 * tile - 1 + i;
            const bool inside = position >= 0 && position < p.n_positions;
            d[i] = inside ? p.rows + position * p.size + first : zeros.data();
        }
        T* v = p.planes + (tile - p.tile_begin) * p.size + first;
        input_planes(d[0], d[1], d[2], d[3], last - first, v, v + plane, v + 2 * plane, v + 3 * plane);
    });
}

template <typename T>
void winograd_output_cpu(const WinogradParams<T>& p, int n_threads) {
    const int64_t plane = (p.tile_end - p.tile_begin) * p.size;
    for_each_slice(p.tile_begin, p.tile_end, p.size, n_threads, [&](int64_t tile, int64_t first, int64_t last) {
        const T* m = p.planes + (tile - p.tile_begin) * p.size + first;
        T* y = p.rows + 2 * tile * p.size + first;
        output_rows(m, m + plane, m + 2 * plane, m + 3 * plane, last - first, y,
                    2 * tile + 1 < p.n_positions ? y + p.size : nullptr);
    });
}

template <typename T>
void winograd_output_backward_cpu(const WinogradParams<T>& p, int n_threads) {
    const std::vector<T> zeros(std::min(p.size, kSliceNumbers), T(0));
    const int64_t plane = (p.tile_end - p.tile_begin) * p.size;
    for_each_slice(p.tile_begin, p.tile_end, p.size, n_threads, [&](int64_t tile, int64_t first, int64_t last) {
        const T* g = p.rows + 2 * tile * p.size + first;
        T* m = p.planes + (tile - p.tile_begin) * p.size + first;
        gradient_planes(g, 2 * tile + 1 < p.n_positions ? g + p.size : zeros.data(), last - first, m, m + plane,
                        m + 2 * plane, m + 3 * plane);
    });
}

template <typename T>
void winograd_weight_cpu(const T* weight, T* planes, int64_t size, bool reversed, int n_threads) {
    const T *w0 = weight + (reversed ? 2 * size : 0), *w2 = weight + (reversed ? 0 : 2 * size);
    for_each_slice(0, 1, size, n_threads, [&](int64_t, int64_t first, int64_t last) {
        T* u = planes + first;
        weight_planes(w0 + first, weight + size + first, w2 + first, last - first, u, u + size, u + 2 * size,
                      u + 3 * size);
    });
}

template <typename T>
void winograd_weight_backward_cpu(const T* planes, T* grad_weight, int64_t size, int n_threads) {
    for_each_slice(0, 1, size, n_threads, [&](int64_t, int64_t first, int64_t last) {
        const T* u = planes + first;
        T* w = grad_weight + first;
        gradient_taps(u, u + size, u + 2 * size, u + 3 * size, last - first, w, w + size, w + 2 * size);
    });
}

template <typename T>
void peak_norm_cpu(const PeakNormParams<T>& p, T* out, int n_threads) {
    if (p.batch) batch_moments(p, n_threads);
    const Factors<T> factors(p);
    const int64_t n_blocks = blocks_of(p.n_rows_out, kSumRows);
#pragma omp parallel num_threads(n_threads) if (n_threads > 1 && n_blocks > 4)
    {
        std::vector<T> room(p.n_channels);
#pragma omp for schedule(static)
        for (int64_t b = 0; b < n_blocks; ++b)
            norm_rows(p, factors.scale.data(), b * kSumRows, std::min(p.n_rows_out, (b + 1) * kSumRows), room.data(),
                      out);
    }
}

template <typename T>
void peak_norm_backward_cpu(const PeakNormParams<T>& p, const PeakNormGrads<T>& grads, int n_threads) {
    const Factors<T> factors(p);
    const T *scale = factors.scale.data(), *rstd = factors.rstd.data();
    const int64_t n = p.n_channels, n_blocks = blocks_of(p.n_rows, kSumRows);
    const int64_t n_blocks_out = blocks_of(p.n_rows_out, kSumRows);
    // A touched row has one taker at most, so the results' blocks may run side by side. A blank row has many: its
    // channels are dealt out instead, a cache line each, and every one meets its takers in order.
    std::vector<int64_t> takers;
    if (p.n_touched < p.n_rows)
        for (int64_t j = 0; j < p.n_rows_out; ++j)
            if (p.take[j] >= p.n_touched || (p.n_take == 2 && p.take[p.n_rows_out + j] >= p.n_touched))
                takers.push_back(j);
    const int64_t n_slices = takers.empty() ? 0 : blocks_of(n, kLanes<T>);
    std::vector<T> sums(2 * n_blocks * n);
#pragma omp parallel num_threads(n_threads) if (n_threads > 1 && n_blocks > 4)
    {
        std::vector<T> room(2 * n);
#pragma omp for schedule(static)
        for (int64_t b = 0; b < n_blocks; ++b)
            std::fill(grads.grad_residual + b * kSumRows * n,
                      grads.grad_residual + std::min(p.n_rows, (b + 1) * kSumRows) * n, T(0));
#pragma omp for schedule(static) nowait
        for (int64_t b = 0; b < n_blocks_out; ++b)
            pass_to_touched(p, scale, grads, b * kSumRows, std::min(p.n_rows_out, (b + 1) * kSumRows), room.data());
#pragma omp for schedule(static)
        for (int64_t s = 0; s < n_slices; ++s)
            pass_to_blank(p, scale, grads, takers, s * kLanes<T>, std::min(n, (s + 1) * kLanes<T>), room.data());
#pragma omp for schedule(static)
        for (int64_t b = 0; b < n_blocks; ++b)
            sum_gradients(p, rstd, grads.grad_residual, b * kSumRows, std::min(p.n_rows, (b + 1) * kSumRows),
                          sums.data() + 2 * b * n, sums.data() + (2 * b + 1) * n);
    }
    std::vector<double> totals(2 * n, 0.0);
    for (int64_t b = 0; b < n_blocks; ++b)
        for (int64_t c = 0; c < 2 * n; ++c) totals[c] += sums[2 * b * n + c];
    for (int64_t c = 0; c < n; ++c) {
        grads.grad_beta[c] = static_cast<T>(totals[c]);
        grads.grad_gamma[c] = static_cast<T>(totals[n + c]);
    }
#pragma omp parallel for schedule(static) num_threads(n_threads) if (n_threads > 1 && n_blocks > 4)
    for (int64_t b = 0; b < n_blocks; ++b)
        input_gradients(p, scale, rstd, grads, b * kSumRows, std::min(p.n_rows, (b + 1) * kSumRows));
}

template void peak_plan_cpu(const PeakPlanParams<float>&);
template void peak_plan_cpu(const PeakPlanParams<double>&);
template void peak_conv_cpu(const PeakConvParams<float>&, int);
template void peak_stage_cpu(const PeakStageParams<float>&, int);
template void peak_conv_cpu(const PeakConvParams<double>&, int);
template void peak_stage_cpu(const PeakStageParams<double>&, int);
template void peak_conv_weight_cpu(const PeakConvWeightParams<float>&, int);
template void peak_conv_weight_cpu(const PeakConvWeightParams<double>&, int);
template void winograd_input_cpu(const WinogradParams<float>&, int);
template void winograd_output_cpu(const WinogradParams<float>&, int);
template void winograd_output_backward_cpu(const WinogradParams<float>&, int);
template void winograd_weight_cpu(const float*, float*, int64_t, bool, int);
template void winograd_weight_backward_cpu(const float*, float*, int64_t, int);
template void peak_norm_cpu(const PeakNormParams<float>&, float*, int);
template void winograd_input_cpu(const WinogradParams<double>&, int);
template void winograd_output_cpu(const WinogradParams<double>&, int);
template void winograd_output_backward_cpu(const WinogradParams<double>&, int);
template void winograd_weight_cpu(const double*, double*, int64_t, bool, int);
template void winograd_weight_backward_cpu(const double*, double*, int64_t, int);
template void peak_norm_cpu(const PeakNormParams<double>&, double*, int);
template void peak_norm_backward_cpu(const PeakNormParams<float>&, const PeakNormGrads<float>&, int);
template void peak_norm_backward_cpu(const PeakNormParams<double>&, const PeakNormGrads<double>&, int);

}  // namespace xrdfast
