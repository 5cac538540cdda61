// peak_norm.h: batch norm, residual, LeakyReLU and pool over lists of rows, packed or dense (xrdfast/ops/peak_norm.py says
// what these are). Plain C++; no torch, no CUDA headers.
#pragma once
#include <cstdint>

namespace xrdfast {

constexpr double kNegativeSlope = 0.01;  // of LeakyReLU
constexpr int kMaxTake = 2;              // rows that make one row of a result

// Batch norm, residual and LeakyReLU of rows, y = LeakyReLU(gamma (h - mean) / sqrt(var + eps) + beta + residual), and
// then, for each row of the result, the maximum or mean of one or two rows of y.
template <typename T>
struct PeakNormParams {
    const T* h;           // (n_rows, n_channels)
    const T* residual;    // the same, or null
    const T* gamma;       // (n_channels)
    const T* beta;        // (n_channels)
    const float* count;   // (n_rows) samples that a row stands for; null: one each
    const int32_t* take;  // (n_take, n_rows_out) rows of y, -1 for zeros; null: each row itself
    T* mean;              // (n_channels), read, or written where `batch`
    T* var;               // (n_channels), the same; biased
    int64_t n_rows;
    int64_t n_rows_out;
    int64_t n_channels;
    int64_t n_touched;  // rows before the blank pattern: each of them is taken once at most
    int n_take;         // 1 or 2
    bool maximum;       // of two rows, else their mean
    bool batch;         // statistics of this batch
    double eps;
    double total;  // sum of `count`
};

template <typename T>
void peak_norm_cpu(const PeakNormParams<T>& params, T* out, int n_threads);

// With z the argument of LeakyReLU, x the normalised h and n = total:
//   grad_residual = dL/dz, each row of the result passing its gradient to the rows it took (of equal maxima, the first)
//   grad_beta = sum dL/dz;  grad_gamma = sum dL/dz x
//   grad_h = gamma / sqrt(var + eps) (dL/dz - count (grad_beta + x grad_gamma) / n), without the bracket's second part
//            where the statistics are not the batch's
template <typename T>
struct PeakNormGrads {
    const T* grad_out;  // (n_rows_out, n_channels)
    T* grad_h;          // (n_rows, n_channels)
    T* grad_residual;   // (n_rows, n_channels)
    T* grad_gamma;      // (n_channels)
    T* grad_beta;       // (n_channels)
};

template <typename T>
void peak_norm_backward_cpu(const PeakNormParams<T>& params, const PeakNormGrads<T>& grads, int n_threads);

constexpr int64_t kNormParts = 128;  // partial sums over rows that the CUDA kernels write and join

// What the CUDA kernels work in.
template <typename T>
struct PeakNormScratch {
    T* sums;                 // (kNormParts, 2, n_channels)
    T* weights;              // (kNormParts)
    const int32_t* taker;    // (n_take * n_rows_out) places in `take`, ordered by the row there: which rows a row went to
    const int32_t* taken;    // (n_rows + 1) where each row's takers begin; both only for the backward, null with `take`
};

// The same on a device. Return a cudaError_t as int; `stream` is a cudaStream_t.
template <typename T>
int peak_norm_cuda(const PeakNormParams<T>& params, const PeakNormScratch<T>& scratch, T* out, void* stream);
template <typename T>
int peak_norm_backward_cuda(const PeakNormParams<T>& params, const PeakNormScratch<T>& scratch,
                            const PeakNormGrads<T>& grads, void* stream);

}  // namespace xrdfast
