// peak_conv.cpp: CPU kernels of thin, long convolution stages: 3-wide convolutions over lists of rows with few channels,
// their weights' gradient, and whole stages in evaluation mode. Wide, short stages are library matrix products
// (xrdfast/ops/peak_conv.py).
#include "peak_conv.h"

#include <algorithm>
#include <vector>

#include "block_math.h"
#include "row_kernels.h"

namespace xrdfast {
namespace {

// Rows of a register tile of two vectors. AVX-512: 12 x 2 sums, 2 of weights and a broadcast are 27 of 32 registers;
// elsewhere 6 x 2, 2 and 1 are 15 of 16.
template <class S>
constexpr int kTileRows = S::kRegisters == 32 ? 12 : 6;
constexpr int kTaps = 3;
// 96 rows of 128 float channels are 48 kB: with one panel of weights as large (AVX-512; else half of that) they stay in
// L2 (2 MB, 512 kB).
constexpr int64_t kBlockRows = 96;
static_assert(kBlockRows % 12 == 0, "whole tiles but for the last");
constexpr int64_t kWeightParts = 16;    // partial sums of a weight's gradient
constexpr int64_t kMinPartRows = 512;   // rows of such a part, at least

// sums[i] += sum over c of a[i * stride + c] * panel[c], for kRows rows and one panel of channels.
template <class S, int kRows, typename T>
XRDFAST_INLINE void multiply_add(typename S::Vector (&sums)[kRows][2], const T* __restrict a, int64_t stride, int64_t n,
                                 const T* __restrict panel) {
    using V = typename S::Vector;
    for (int64_t c = 0; c < n; ++c) {
        const V left = load<V>(panel + c * S::kBlock), right = load<V>(panel + c * S::kBlock + S::kLanes);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
            const T value = a[i * stride + c];
            sums[i][0] += value * left;
            sums[i][1] += value * right;
        }
    }
}

// Weights (n_matrices, n_in, n_out) as (n_matrices, n_panels, n_in, panel), with zeros beyond n_out; a panel is the
// channels of a register tile.
template <typename T>
struct PackedWeights {
    int64_t size;  // of a matrix
    std::vector<T> numbers;

    PackedWeights(const T* weight, int64_t n_matrices, int64_t n_in, int64_t n_out) {
        const int64_t panel = 2 * best_vector_bytes() / sizeof(T);
        size = round_up(n_out, panel) * n_in;
        numbers.assign(n_matrices * size, T(0));
        for (int64_t row = 0; row < n_matrices * n_in; ++row)
            for (int64_t column = 0; column < n_out; ++column)
                numbers[row / n_in * size + column / panel * panel * n_in + row % n_in * panel + column % panel] =
                    weight[row * n_out + column];
    }
    const T* matrix(int64_t i) const { return numbers.data() + i * size; }
};

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

// n_rows rows of a sum of products, (n_rows, n_out).
template <typename T>
struct MultiplyRows {
    const Factor<T>* factors;
    int n_factors;
    int64_t n_rows, n_out;
    Finish<T> finish;
    T* out;
    int64_t out_stride;

    template <int kBytes>
    XRDFAST_INLINE void run() const {
        using S = Simd<T, kBytes>;
        for (int64_t column = 0; column < n_out; column += S::kBlock) {
            int64_t row = 0;
            for (; row + kTileRows<S> <= n_rows; row += kTileRows<S>) tile<S, kTileRows<S>>(row, column);
            for (; row + 4 <= n_rows; row += 4) tile<S, 4>(row, column);
            for (; row + 2 <= n_rows; row += 2) tile<S, 2>(row, column);
            for (; row < n_rows; ++row) tile<S, 1>(row, column);
        }
    }

    // kRows rows and one panel of columns.
    template <class S, int kRows>
    XRDFAST_INLINE void tile(int64_t row, int64_t column) const {
        using V = typename S::Vector;
        V sums[kRows][2] = {};
        for (int f = 0; f < n_factors; ++f)
            multiply_add<S, kRows>(sums, factors[f].rows + row * factors[f].stride, factors[f].stride, factors[f].n,
                                   factors[f].packed + column * factors[f].n);
        const int64_t n_columns = std::min<int64_t>(S::kBlock, n_out - column);
        T* to = out + row * out_stride + column;
        const T* residual = finish.residual ? finish.residual + row * finish.stride + column : nullptr;
        const T* offset = finish.offset ? finish.offset + column : nullptr;
        for (int i = 0; i < kRows; ++i) {
            if (n_columns == S::kBlock) {
                for (int half = 0; half < 2; ++half) {
                    const int64_t at = half * S::kLanes;
                    V sum = sums[i][half];
                    if (offset) {
                        sum += load<V>(offset + at);
                        if (residual) sum += load<V>(residual + i * finish.stride + at);
                        sum = sum > T(0) ? sum : sum * static_cast<T>(kNegativeSlope);
                    }
                    store(to + i * out_stride + at, sum);
                }
                continue;
            }
            T whole[S::kBlock];
            store(whole, sums[i][0]);
            store(whole + S::kLanes, sums[i][1]);
            for (int64_t c = 0; c < n_columns; ++c) {
                const T more = residual ? residual[i * finish.stride + c] : T(0);
                to[i * out_stride + c] = offset ? leaky(whole[c] + offset[c] + more) : whole[c];
            }
        }
    }
};

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
        run_best(MultiplyRows<T>{factors, kTaps, to - from, n_out, finish, out + (from - begin) * out_stride,
                                 out_stride});
    };
    // Where a tap meets zeros, rows go one by one.
    const int64_t reach = shift < 0 ? -shift : shift;
    const int64_t inner_begin = std::min(end, std::max(begin, reach));
    const int64_t inner_end = std::max(inner_begin, std::min(end, x.n_rows - reach));
    for (int64_t r = begin; r < inner_begin; ++r) some(r, r + 1);
    if (inner_begin < inner_end) some(inner_begin, inner_end);
    for (int64_t r = inner_end; r < end; ++r) some(r, r + 1);
}

// Adds what rows [begin, end) of grad_out give to `grad` (3, n_in, n_out).
template <typename T>
struct AddWeightGradient {
    const PeakConvWeightParams<T>& p;
    int64_t begin, end;
    T* grad;

    template <int kBytes>
    XRDFAST_INLINE void run() const {
        using S = Simd<T, kBytes>;
        const int64_t whole_columns = p.n_out / S::kBlock * S::kBlock;
        for (int64_t block = begin; block < end; block += kBlockRows) {
            for (int tap = 0; tap < kTaps; ++tap) {
                const int64_t shift = (tap - 1) * p.shift;
                const int64_t first = std::max(block, -shift);
                const int64_t last = std::min({end, block + kBlockRows, p.n_rows - shift});
                for (int64_t channel = 0; channel < p.n_in;) {
                    const int64_t left = p.n_in - channel;
                    const int64_t n = left >= kTileRows<S> && left != 8 ? kTileRows<S> : left >= 4 ? 4 : 1;
                    T* at = grad + (tap * p.n_in + channel) * p.n_out;
                    for (int64_t column = 0; column < whole_columns; column += S::kBlock) {
                        if (n == kTileRows<S>)
                            tile<S, kTileRows<S>>(first, last, shift, channel, column, at + column);
                        else if (n == 4)
                            tile<S, 4>(first, last, shift, channel, column, at + column);
                        else
                            tile<S, 1>(first, last, shift, channel, column, at + column);
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

    // to (kRows channels of x, a panel of grad_out) += the outer products of rows [first, last); `shift` leads to x's.
    template <class S, int kRows>
    XRDFAST_INLINE void tile(int64_t first, int64_t last, int64_t shift, int64_t channel, int64_t column, T* to) const {
        using V = typename S::Vector;
        V sums[kRows][2];
        for (int i = 0; i < kRows; ++i) {
            sums[i][0] = load<V>(to + i * p.n_out);
            sums[i][1] = load<V>(to + i * p.n_out + S::kLanes);
        }
        for (int64_t r = first; r < last; ++r) {
            const T *g = p.grad_out + r * p.n_out + column, *x = p.x + (r + shift) * p.n_in + channel;
            const V left = load<V>(g), right = load<V>(g + S::kLanes);
#pragma GCC unroll 16
            for (int i = 0; i < kRows; ++i) {
                sums[i][0] += x[i] * left;
                sums[i][1] += x[i] * right;
            }
        }
        for (int i = 0; i < kRows; ++i) {
            store(to + i * p.n_out, sums[i][0]);
            store(to + i * p.n_out + S::kLanes, sums[i][1]);
        }
    }
};

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

}  // namespace

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
void peak_conv_weight_cpu(const PeakConvWeightParams<T>& p, int n_threads) {
    const int64_t n_parts = std::max<int64_t>(1, std::min(kWeightParts, blocks_of(p.n_rows, kMinPartRows)));
    const int64_t n_rows = blocks_of(blocks_of(p.n_rows, n_parts), kBlockRows) * kBlockRows;
    const int64_t size = kTaps * p.n_in * p.n_out;
    std::vector<T> parts(n_parts * size, T(0));
#pragma omp parallel for schedule(static) num_threads(n_threads) if (n_threads > 1 && n_parts > 1)
    for (int64_t i = 0; i < n_parts; ++i)
        run_best(AddWeightGradient<T>{p, std::min(p.n_rows, i * n_rows), std::min(p.n_rows, (i + 1) * n_rows),
                                      parts.data() + i * size});
    std::copy_n(parts.data(), size, p.grad_weight);
    for (int64_t i = 1; i < n_parts; ++i) {
        const T* part = parts.data() + i * size;
        for (int64_t k = 0; k < size; ++k) p.grad_weight[k] += part[k];
    }
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
            run_best(MultiplyRows<T>{factors, p.widen ? kTaps + 1 : kTaps, end - begin, n, finish,
                                     p.y + (begin * p.shift + i / n_blocks) * n, p.shift * n});
        }
#pragma omp for schedule(static)
        for (int64_t b = 0; b < n_pools; ++b)
            pool_rows(p, b * kSumRows, std::min(p.n_rows_out, (b + 1) * kSumRows), zeros.data());
    }
}

template void peak_conv_cpu(const PeakConvParams<float>&, int);
template void peak_conv_weight_cpu(const PeakConvWeightParams<float>&, int);
template void peak_stage_cpu(const PeakStageParams<float>&, int);
template void peak_conv_cpu(const PeakConvParams<double>&, int);
template void peak_conv_weight_cpu(const PeakConvWeightParams<double>&, int);
template void peak_stage_cpu(const PeakStageParams<double>&, int);

}  // namespace xrdfast
