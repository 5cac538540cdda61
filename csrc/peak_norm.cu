// peak_norm.cu: CUDA kernels of norm, residual, activation and pool over lists of rows.
//
// Bound by memory: the forward reads h once for the statistics and once for the result (and the residual), the backward
// reads h, residual and the result's gradient once and dL/dz twice. No atomics: sums are written part by part and joined
// in order, and each row collects its gradient from the rows that took it, so results are the same in every run.
#include "xrd_cuda.h"

#include <cmath>

#include "peak_norm.h"

namespace xrdfast {
namespace {

constexpr int kLanes = 32;  // channels of a block, neighbours in memory
constexpr int kWarps = 8;   // rows that a block looks at side by side
constexpr int kThreads = kLanes * kWarps;
constexpr int kBlocks = 3;  // a processor: 80 registers; left alone, ptxas spills to keep within 64
constexpr int64_t kMaxBlocks = 1 << 16;  // of the elementwise kernels, which stride over the rest

// The factors of one channel.
template <typename T>
struct Channel {
    T mean, rstd, scale, beta;

    __device__ __forceinline__ Channel(const PeakNormParams<T>& p, int64_t c)
        : mean(p.mean[c]),
          rstd(T(1) / std::sqrt(p.var[c] + static_cast<T>(p.eps))),
          scale(p.gamma[c] * rstd),
          beta(p.beta[c]) {}
    // The argument of LeakyReLU.
    __device__ __forceinline__ T argument(const PeakNormParams<T>& p, int64_t row, int64_t c) const {
        const int64_t at = row * p.n_channels + c;
        const T z = (p.h[at] - mean) * scale + beta;
        return p.residual ? z + p.residual[at] : z;
    }
};

template <typename T>
__device__ __forceinline__ T leaky(T z) {
    return z > T(0) ? z : static_cast<T>(kNegativeSlope) * z;
}

template <typename T>
__device__ __forceinline__ T weight_of(const PeakNormParams<T>& p, int64_t row) {
    return p.count ? static_cast<T>(p.count[row]) : T(1);
}

// Sum over the warps of the block, lane by lane.
template <typename T>
__device__ __forceinline__ T sum_over_warps(T value, T* partial) {
    partial[threadIdx.x] = value;
    __syncthreads();
    T sum = T(0);
    for (int w = 0; w < kWarps; ++w) sum += partial[w * kLanes + threadIdx.x % kLanes];
    __syncthreads();
    return sum;
}

// Block (part, channels): weighted mean and squared deviations of the part's rows.
template <typename T>
__global__ void __launch_bounds__(kThreads) part_moments(PeakNormParams<T> p, PeakNormScratch<T> scratch) {
    XRD_SHARED(T, partial, kThreads);
    const int64_t c = static_cast<int64_t>(blockIdx.y) * kLanes + threadIdx.x % kLanes;
    const int64_t n_rows = (p.n_rows + kNormParts - 1) / kNormParts, begin = blockIdx.x * n_rows;
    const int64_t end = min(p.n_rows, begin + n_rows);
    const bool inside = c < p.n_channels;
    T weight = T(0), sum = T(0);
    for (int64_t r = begin + threadIdx.x / kLanes; r < end; r += kWarps) {
        const T w = weight_of(p, r);
        weight += w;
        if (inside && w != T(0)) sum += w * p.h[r * p.n_channels + c];
    }
    weight = sum_over_warps(weight, partial);
    const T mean = sum_over_warps(sum, partial) / (weight > T(0) ? weight : T(1));
    T squares = T(0);
    for (int64_t r = begin + threadIdx.x / kLanes; r < end; r += kWarps) {
        const T w = weight_of(p, r);
        if (!inside || w == T(0)) continue;
        const T distance = p.h[r * p.n_channels + c] - mean;
        squares += w * distance * distance;
    }
    squares = sum_over_warps(squares, partial);
    if (threadIdx.x >= kLanes || !inside) return;
    T* sums = scratch.sums + 2 * blockIdx.x * p.n_channels;
    sums[c] = mean;
    sums[p.n_channels + c] = squares;
    if (c == 0) scratch.weights[blockIdx.x] = weight;
}

// Joins the parts' moments in order, a thread a channel (Chan, Golub and LeVeque, 1979).
template <typename T>
__global__ void __launch_bounds__(kThreads) join_moments(PeakNormParams<T> p, PeakNormScratch<T> scratch) {
    const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (c >= p.n_channels) return;
    double total = 0.0, mean = 0.0, squares = 0.0;
    for (int64_t part = 0; part < kNormParts; ++part) {
        const double weight = scratch.weights[part];
        if (weight == 0.0) continue;
        const T* sums = scratch.sums + 2 * part * p.n_channels;
        const double joined = total + weight, distance = sums[c] - mean;
        mean += distance * (weight / joined);
        squares += sums[p.n_channels + c] + distance * distance * total * (weight / joined);
        total = joined;
    }
    p.mean[c] = static_cast<T>(mean);
    p.var[c] = static_cast<T>(squares / p.total);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) norm_rows(PeakNormParams<T> p, T* out) {
    const int64_t n = p.n_rows_out * p.n_channels, stride = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += stride) {
        const int64_t j = i / p.n_channels, c = i - j * p.n_channels;
        const Channel<T> channel(p, c);
        const int64_t first = p.take ? p.take[j] : j;
        T y = first < 0 ? T(0) : leaky(channel.argument(p, first, c));
        if (p.take && p.n_take == 2) {
            const int64_t second = p.take[p.n_rows_out + j];
            const T other = second < 0 ? T(0) : leaky(channel.argument(p, second, c));
            y = !p.maximum ? T(0.5) * (y + other) : other > y || other != other ? other : y;
        }
        out[i] = y;
    }
}

// dL/dz of every row, from the rows of the result that took it.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    collect_gradients(PeakNormParams<T> p, PeakNormScratch<T> scratch, PeakNormGrads<T> grads) {
    const int64_t n = p.n_rows * p.n_channels, stride = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += stride) {
        const int64_t r = i / p.n_channels, c = i - r * p.n_channels;
        const Channel<T> channel(p, c);
        const T z = channel.argument(p, r, c);
        T sum = T(0);
        const int64_t begin = p.take ? scratch.taken[r] : r, end = p.take ? scratch.taken[r + 1] : r + 1;
        for (int64_t k = begin; k < end; ++k) {
            const int64_t place = p.take ? scratch.taker[k] : r;
            const bool is_second = place >= p.n_rows_out;
            const int64_t j = is_second ? place - p.n_rows_out : place;
            T g = grads.grad_out[j * p.n_channels + c];
            if (p.take && p.n_take == 2) {
                const int64_t partner = p.take[is_second ? j : p.n_rows_out + j];
                if (p.maximum) {
                    // LeakyReLU rises, so arguments compare as values do; the first wins where they are equal.
                    const T other = partner < 0 ? T(0) : channel.argument(p, partner, c);
                    const T first = is_second ? other : z, second = is_second ? z : other;
                    const bool second_wins = second > first || second != second;
                    if (second_wins != is_second) g = T(0);
                } else {
                    g *= T(0.5);
                }
            }
            sum += g;
        }
        grads.grad_residual[i] = z > T(0) ? sum : static_cast<T>(kNegativeSlope) * sum;
    }
}

// Block (part, channels): sums over the part's rows of dL/dz and of dL/dz times the normalised h. A row that counts for
// no sample is not left out (peak_norm.cpp says why).
template <typename T>
__global__ void __launch_bounds__(kThreads)
    part_gradients(PeakNormParams<T> p, PeakNormScratch<T> scratch, PeakNormGrads<T> grads) {
    XRD_SHARED(T, partial, kThreads);
    const int64_t c = static_cast<int64_t>(blockIdx.y) * kLanes + threadIdx.x % kLanes;
    const int64_t n_rows = (p.n_rows + kNormParts - 1) / kNormParts, begin = blockIdx.x * n_rows;
    const int64_t end = min(p.n_rows, begin + n_rows);
    const bool inside = c < p.n_channels;
    const Channel<T> channel(p, inside ? c : 0);
    T plain = T(0), scaled = T(0);
    for (int64_t r = begin + threadIdx.x / kLanes; r < end; r += kWarps) {
        if (!inside) continue;
        const int64_t at = r * p.n_channels + c;
        plain += grads.grad_residual[at];
        scaled += grads.grad_residual[at] * ((p.h[at] - channel.mean) * channel.rstd);
    }
    plain = sum_over_warps(plain, partial);
    scaled = sum_over_warps(scaled, partial);
    if (threadIdx.x >= kLanes || !inside) return;
    T* sums = scratch.sums + 2 * blockIdx.x * p.n_channels;
    sums[c] = plain;
    sums[p.n_channels + c] = scaled;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    join_gradients(PeakNormParams<T> p, PeakNormScratch<T> scratch, PeakNormGrads<T> grads) {
    const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (c >= p.n_channels) return;
    double plain = 0.0, scaled = 0.0;
    for (int64_t part = 0; part < kNormParts; ++part) {
        const T* sums = scratch.sums + 2 * part * p.n_channels;
        plain += sums[c];
        scaled += sums[p.n_channels + c];
    }
    grads.grad_beta[c] = static_cast<T>(plain);
    grads.grad_gamma[c] = static_cast<T>(scaled);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks) input_gradients(PeakNormParams<T> p, PeakNormGrads<T> grads) {
    const int64_t n = p.n_rows * p.n_channels, stride = static_cast<int64_t>(gridDim.x) * kThreads;
    const T inverse = p.batch ? static_cast<T>(1.0 / p.total) : T(0);
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += stride) {
        const int64_t r = i / p.n_channels, c = i - r * p.n_channels;
        const Channel<T> channel(p, c);
        const T normed = (p.h[i] - channel.mean) * channel.rstd;
        const T common = weight_of(p, r) * inverse * (grads.grad_beta[c] + normed * grads.grad_gamma[c]);
        grads.grad_h[i] = channel.scale * (grads.grad_residual[i] - common);
    }
}

dim3 blocks_for(int64_t n) {
    const int64_t blocks = (n + kThreads - 1) / kThreads;
    return dim3(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks));
}

// Parts along x, channels along y.
template <typename T>
dim3 parts_of(const PeakNormParams<T>& p) {
    return dim3(static_cast<unsigned>(kNormParts), static_cast<unsigned>((p.n_channels + kLanes - 1) / kLanes));
}

}  // namespace

template <typename T>
int peak_norm_cuda(const PeakNormParams<T>& p, const PeakNormScratch<T>& scratch, T* out, void* stream) {
    if (p.n_channels == 0) return 0;
    if (p.batch) {
        XRD_LAUNCH((part_moments<T>), parts_of(p), dim3(kThreads), 0, stream, p, scratch);
        XRD_LAUNCH((join_moments<T>), blocks_for(p.n_channels), dim3(kThreads), 0, stream, p, scratch);
    }
    if (p.n_rows_out > 0)
        XRD_LAUNCH((norm_rows<T>), blocks_for(p.n_rows_out * p.n_channels), dim3(kThreads), 0, stream, p, out);
    return XRD_LAST_ERROR();
}

template <typename T>
int peak_norm_backward_cuda(const PeakNormParams<T>& p, const PeakNormScratch<T>& scratch,
                            const PeakNormGrads<T>& grads, void* stream) {
    if (p.n_channels == 0) return 0;
    const int64_t n = p.n_rows * p.n_channels;
    if (n > 0) XRD_LAUNCH((collect_gradients<T>), blocks_for(n), dim3(kThreads), 0, stream, p, scratch, grads);
    XRD_LAUNCH((part_gradients<T>), parts_of(p), dim3(kThreads), 0, stream, p, scratch, grads);
    XRD_LAUNCH((join_gradients<T>), blocks_for(p.n_channels), dim3(kThreads), 0, stream, p, scratch, grads);
    if (n > 0) XRD_LAUNCH((input_gradients<T>), blocks_for(n), dim3(kThreads), 0, stream, p, grads);
    return XRD_LAST_ERROR();
}

template int peak_norm_cuda(const PeakNormParams<float>&, const PeakNormScratch<float>&, float*, void*);
template int peak_norm_cuda(const PeakNormParams<double>&, const PeakNormScratch<double>&, double*, void*);
template int peak_norm_backward_cuda(const PeakNormParams<float>&, const PeakNormScratch<float>&,
                                     const PeakNormGrads<float>&, void*);
template int peak_norm_backward_cuda(const PeakNormParams<double>&, const PeakNormScratch<double>&,
                                     const PeakNormGrads<double>&, void*);

}  // namespace xrdfast
