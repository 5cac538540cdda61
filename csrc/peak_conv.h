// peak_conv.h: residual convolution stages over lists of rows, packed or dense (xrdfast/ops/peak_conv.py says what these
// are). Plain C++; no torch, no CUDA headers.
#pragma once
#include <cstdint>

namespace xrdfast {

constexpr double kNegativeSlope = 0.01;  // of LeakyReLU
constexpr int kMaxTake = 2;              // rows that make one row of a result

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

// Winograd's F(2, 3): two neighbouring positions of a 3-wide convolution from four products instead of six. A tile is the
// positions 2t and 2t + 1; the products in between, x-plane times weight-plane, are the library's. A position holds
// `size` numbers (patterns times channels); planes are (4, n_tiles, size) for the tiles [tile_begin, tile_end) asked for.
//   x: d0 - d2, d1 + d2, d2 - d1, d1 - d3 with d the positions 2t - 1 .. 2t + 2, zero beyond both ends
//   y: m0 + m1 + m2, m1 - m2 - m3
//   w: w0, (w0 + w1 + w2) / 2, (w0 - w1 + w2) / 2, w2
// and, for the gradient of w, the transposed maps of y and w.
template <typename T>
struct WinogradParams {
    T* rows;    // (n_positions, size), read or written
    T* planes;  // (4, n_tiles, size), written or read
    int64_t n_positions;
    int64_t size;
    int64_t tile_begin;
    int64_t tile_end;
};

template <typename T>
void winograd_input_cpu(const WinogradParams<T>& params, int n_threads);
template <typename T>
void winograd_output_cpu(const WinogradParams<T>& params, int n_threads);
// planes from the gradient of y.
template <typename T>
void winograd_output_backward_cpu(const WinogradParams<T>& params, int n_threads);
// (4, size) planes from (3, size) taps, the last tap first where `reversed`; and the gradient of the taps.
template <typename T>
void winograd_weight_cpu(const T* weight, T* planes, int64_t size, bool reversed, int n_threads);
template <typename T>
void winograd_weight_backward_cpu(const T* planes, T* grad_weight, int64_t size, int n_threads);

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

// Rows of the packed stages of a plan, which come first. All arrays have room for n_patterns * length rows a stage.
template <typename T>
struct PeakPlanParams {
    const T* intensity;       // (n_patterns, length); what is not zero is a peak
    const int64_t* paddings;  // (n_stages) of the pools after the stages, 0 or 1
    int64_t n_patterns;
    int64_t length;  // enough for a position after every pool
    int64_t n_stages;
    int64_t packed_stages;  // most stages that may be packed
    int64_t reach;          // positions that a stage sees to each side
    int64_t max_gap;        // segments with no more positions between them are joined
    double packed_share;    // a stage is packed where that takes fewer rows than this share of the dense ones; <= 1
    int64_t* n_rows;        // (packed_stages) rows of each stage; 0: dense, as all that follow
    int64_t* point;         // into the flat input, for the rows of the first stage; 0 where beyond the grid
    int64_t* position;      // on the grid, for the same rows; -1 beyond it
    float* count;           // (packed_stages, room) samples that a row stands for
    int32_t* halo;          // (packed_stages, room) the row whose value a row has; -1: zero
    int32_t* pairs;         // (packed_stages, 2 room) the two rows that the pool joins: all first ones, all second ones
};

template <typename T>
void peak_plan_cpu(const PeakPlanParams<T>& params);

}  // namespace xrdfast
