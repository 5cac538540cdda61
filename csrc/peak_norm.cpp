// peak_norm.cpp: CPU kernels of batch norm, residual, LeakyReLU and pool over lists of rows, in one pass.
#include "peak_norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "row_kernels.h"

namespace xrdfast {
namespace {

template <typename T>
constexpr int64_t kLineChannels = 64 / sizeof(T);  // of a cache line

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

}  // namespace

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
    const int64_t n_slices = takers.empty() ? 0 : blocks_of(n, kLineChannels<T>);
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
            pass_to_blank(p, scale, grads, takers, s * kLineChannels<T>, std::min(n, (s + 1) * kLineChannels<T>), room.data());
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

template void peak_norm_cpu(const PeakNormParams<float>&, float*, int);
template void peak_norm_backward_cpu(const PeakNormParams<float>&, const PeakNormGrads<float>&, int);
template void peak_norm_cpu(const PeakNormParams<double>&, double*, int);
template void peak_norm_backward_cpu(const PeakNormParams<double>&, const PeakNormGrads<double>&, int);

}  // namespace xrdfast
