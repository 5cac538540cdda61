// winograd.cpp: CPU kernels of the transforms on either side of Winograd's products.
#include "winograd.h"

#include <algorithm>
#include <vector>

#include "row_kernels.h"

namespace xrdfast {
namespace {

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

}  // namespace

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

template void winograd_input_cpu(const WinogradParams<float>&, int);
template void winograd_output_cpu(const WinogradParams<float>&, int);
template void winograd_output_backward_cpu(const WinogradParams<float>&, int);
template void winograd_weight_cpu(const float*, float*, int64_t, bool, int);
template void winograd_weight_backward_cpu(const float*, float*, int64_t, int);
template void winograd_input_cpu(const WinogradParams<double>&, int);
template void winograd_output_cpu(const WinogradParams<double>&, int);
template void winograd_output_backward_cpu(const WinogradParams<double>&, int);
template void winograd_weight_cpu(const double*, double*, int64_t, bool, int);
template void winograd_weight_backward_cpu(const double*, double*, int64_t, int);

}  // namespace xrdfast
