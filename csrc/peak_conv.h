// peak_conv.h: 3-wide convolutions over lists of rows, packed or dense, and whole stages of them
// (xrdfast/ops/peak_conv.py). Plain C++; no torch, no CUDA headers.
#pragma once
#include <cstdint>

namespace xrdfast {

// 3-wide convolution: out[r] = x[r - shift] W[0] + x[r] W[1] + x[r + shift] W[2], zero rows beyond both ends.
template <typename T>
struct PeakConvParams {
    const T* x;       // (n_rows, n_in)
    const T* weight;  // (3, n_in, n_out)
    T* out;           // (n_rows, n_out)
    int64_t n_rows;
    int64_t n_in;
    int64_t n_out;
    int64_t shift;  // rows from a position to the next, either sign
};

template <typename T>
void peak_conv_cpu(const PeakConvParams<T>& params, int n_threads);

// Gradient of the taps: grad_weight[k] = sum over r of x[r + (k - 1) shift]^T grad_out[r].
template <typename T>
struct PeakConvWeightParams {
    const T* x;         // (n_rows, n_in)
    const T* grad_out;  // (n_rows, n_out)
    T* grad_weight;     // (3, n_in, n_out)
    int64_t n_rows;
    int64_t n_in;
    int64_t n_out;
    int64_t shift;
};

template <typename T>
void peak_conv_weight_cpu(const PeakConvWeightParams<T>& params, int n_threads);

// A whole stage in evaluation mode, for channels few enough that a piece of the list stays in cache from the first
// convolution to the second: y = LeakyReLU(LeakyReLU(x * first + offset1) * second + offset2 + x widen), then the pool.
// The norms' factors are in the weights, the rest of them in the offsets.
template <typename T>
struct PeakStageParams {
    const T* x;            // (n_rows, n_in)
    const T* first;        // (3, n_in, n_channels)
    const T* second;       // (3, n_channels, n_channels)
    const T* widen;        // (n_in, n_channels), or null where n_in is n_channels
    const T* offset1;      // (n_channels)
    const T* offset2;      // (n_channels)
    const int32_t* halo;   // (n_rows) the row whose value a row has, -1: zero; null where `shift` is not 1
    const int32_t* pairs;  // (2, n_rows_out) rows that the pool joins, -1: zero
    T* y;                  // (n_rows, n_channels) room for the rows before the pool
    T* out;                // (n_rows_out, n_channels)
    int64_t n_rows;
    int64_t n_rows_out;
    int64_t n_in;
    int64_t n_channels;
    int64_t n_touched;  // rows before the blank pattern
    int64_t shift;      // rows from a position to the next, > 0: as many patterns lie interleaved
    bool maximum;       // of a pair, else the mean
};

template <typename T>
void peak_stage_cpu(const PeakStageParams<T>& params, int n_threads);

// The same on a device. Return a cudaError_t as int; `stream` is a cudaStream_t.
template <typename T>
int peak_conv_cuda(const PeakConvParams<T>& params, void* stream);
// `parts` is (n_parts, 3, n_in, n_out): as many sums over rows, written side by side and joined in order.
template <typename T>
int peak_conv_weight_cuda(const PeakConvWeightParams<T>& params, T* parts, int64_t n_parts, void* stream);
// `inner` is (n_rows, n_channels): the rows between the two convolutions.
template <typename T>
int peak_stage_cuda(const PeakStageParams<T>& params, T* inner, void* stream);

}  // namespace xrdfast
