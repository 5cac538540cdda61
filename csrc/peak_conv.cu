// peak_conv.cu: CUDA kernels of thin, long convolution stages: 3-wide convolutions over lists of rows with few channels,
// their weights' gradient, and whole stages in evaluation mode. Wide, short stages are library matrix products
// (xrdfast/ops/peak_conv.py).
//
// A block holds a tile of the result in registers and takes what it is made of through shared memory, 8 channels (or,
// for the weights, 32 rows) at a time: 3 x 8 x 132 numbers of the list and 3 x 8 x 32 of the weights are 16 kB in
// float32, so that occupancy is bound by registers. Each number of the list comes from memory once and from the caches
// for the other two taps. Nothing is atomic: a weight's gradient is summed part by part, so results are the same in
// every run.
#include "xrd_cuda.h"

#include "peak_conv.h"
#include "peak_norm.h"

namespace xrdfast {
namespace {

constexpr int kTaps = 3;
constexpr int kThreads = 128;
constexpr int kPanel = 32;  // channels of a tile

// Convolution: a thread holds 8 rows x 4 channels of a tile of 128 rows.
constexpr int kTileRows = 128, kDepth = 8, kThreadRows = 8, kThreadChannels = 4;
// Eight channels of four rows go to 32 different banks.
constexpr int kRowStride = kTileRows + 4;
static_assert(kThreads == kTileRows / kThreadRows * kPanel / kThreadChannels, "each thread its part of the tile");
static_assert(kThreads % kDepth == 0 && kThreads % kPanel == 0, "whole rows at a time");

// Gradient of weights: a thread holds 3 taps x 2 input channels x 4 output channels of a tile of 32 x 32.
constexpr int kChunkRows = 32, kThreadInputs = 2;
static_assert(kThreads == kPanel / kThreadInputs * kPanel / kThreadChannels, "each thread its part of the tile");

// Blocks a processor: 100 registers, in float64 160; left alone, ptxas spills for the sake of more blocks.
template <typename T>
constexpr int kBlocks = sizeof(T) == 4 ? 5 : 3;
constexpr int64_t kMaxBlocks = 1 << 16;  // of the elementwise kernels, which stride over the rest

// Neighbours in shared memory, for 128-bit accesses.
template <typename T>
struct alignas(16) Four {
    T value[4];
};
static_assert(kThreadChannels == 4 && kThreadRows % 4 == 0 && kRowStride % 4 == 0 && kPanel % 4 == 0, "whole fours");

// Rows to multiply with weights, tap by tap.
template <typename T>
struct Factor {
    const T* rows;        // (n_rows, n_in)
    const int32_t* take;  // (n_rows) the row to read instead of each, -1: zeros; or null
    const T* weight;      // (n_taps, n_in, n_out)
    int64_t n_in;
    int64_t shift;  // rows from tap to tap
};

// What follows the sums; null where it is left out.
template <typename T>
struct Finish {
    const T* offset;    // (n_out), and LeakyReLU
    const T* residual;  // (n_rows, n_out)
};

template <typename T>
struct Tile {
    T sums[kThreadRows][kThreadChannels];
    int64_t first_row, n_rows;
    int64_t first_channel, n_out;
};

template <typename T>
__device__ __forceinline__ Four<T> four(const T* shared) {
    return *reinterpret_cast<const Four<T>*>(shared);
}

// tile += the products of a factor. All threads of the block take part; `rows` is [n_taps][kDepth][kRowStride] and
// `weights` [n_taps][kDepth][kPanel].
template <int kFactorTaps, typename T>
__device__ __forceinline__ void multiply(Tile<T>& tile, const Factor<T>& factor, T* rows, T* weights) {
    const int channel = threadIdx.x % (kPanel / kThreadChannels) * kThreadChannels;
    const int row = threadIdx.x / (kPanel / kThreadChannels) * kThreadRows;
    for (int64_t depth = 0; depth < factor.n_in; depth += kDepth) {
        const int n_depth = static_cast<int>(min(static_cast<int64_t>(kDepth), factor.n_in - depth));
        const int k_own = threadIdx.x % kDepth;
        for (int i = threadIdx.x / kDepth; i < kFactorTaps * kTileRows; i += kThreads / kDepth) {
            const int tap = i / kTileRows, tile_row = i - tap * kTileRows;
            int64_t from = tile.first_row + tile_row + (tap - kFactorTaps / 2) * factor.shift;
            if (from < 0 || from >= tile.n_rows) from = -1;
            if (factor.take && from >= 0) from = factor.take[from];
            const bool inside = from >= 0 && k_own < n_depth;
            rows[(tap * kDepth + k_own) * kRowStride + tile_row] =
                inside ? factor.rows[from * factor.n_in + depth + k_own] : T(0);
        }
        const int c_own = threadIdx.x % kPanel;
        for (int i = threadIdx.x / kPanel; i < kFactorTaps * kDepth; i += kThreads / kPanel) {
            const int tap = i / kDepth, k = i - tap * kDepth;
            const int64_t c = tile.first_channel + c_own;
            const bool inside = k < n_depth && c < tile.n_out;
            weights[i * kPanel + c_own] =
                inside ? factor.weight[(tap * factor.n_in + depth + k) * tile.n_out + c] : T(0);
        }
        __syncthreads();
        for (int tap = 0; tap < kFactorTaps; ++tap)
            for (int k = 0; k < n_depth; ++k) {
                const Four<T> b = four(weights + (tap * kDepth + k) * kPanel + channel);
#pragma unroll
                for (int i = 0; i < kThreadRows; i += 4) {
                    const Four<T> a = four(rows + (tap * kDepth + k) * kRowStride + row + i);
#pragma unroll
                    for (int m = 0; m < 4; ++m)
#pragma unroll
                        for (int j = 0; j < kThreadChannels; ++j) tile.sums[i + m][j] += a.value[m] * b.value[j];
                }
            }
        __syncthreads();
    }
}

// Block (rows, channels): a tile of a convolution, of one more product where `beside` has rows, and what follows.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    convolve(Factor<T> factor, Factor<T> beside, Finish<T> finish, T* out, int64_t n_rows, int64_t n_out) {
    XRD_SHARED(Four<T>, row_fours, kTaps * kDepth * kRowStride / 4);
    XRD_SHARED(Four<T>, weight_fours, kTaps * kDepth * kPanel / 4);
    T *rows = row_fours->value, *weights = weight_fours->value;
    Tile<T> tile{};
    tile.first_row = static_cast<int64_t>(blockIdx.x) * kTileRows, tile.n_rows = n_rows;
    tile.first_channel = static_cast<int64_t>(blockIdx.y) * kPanel, tile.n_out = n_out;
    multiply<kTaps>(tile, factor, rows, weights);
    if (beside.rows) multiply<1>(tile, beside, rows, weights);
    const int64_t channel = tile.first_channel + threadIdx.x % (kPanel / kThreadChannels) * kThreadChannels;
    const int64_t row = tile.first_row + threadIdx.x / (kPanel / kThreadChannels) * kThreadRows;
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i)
#pragma unroll
        for (int j = 0; j < kThreadChannels; ++j) {
            if (row + i >= n_rows || channel + j >= n_out) continue;
            const int64_t at = (row + i) * n_out + channel + j;
            T y = tile.sums[i][j];
            if (finish.residual) y += finish.residual[at];
            if (finish.offset) {
                y += finish.offset[channel + j];
                y = y > T(0) ? y : static_cast<T>(kNegativeSlope) * y;
            }
            out[at] = y;
        }
}

// Block (part, input channels, output channels): the part's rows' share of a tile of the weights' gradient.
template <typename T>
__global__ void __launch_bounds__(kThreads) weight_parts(PeakConvWeightParams<T> p, T* parts, int64_t part_rows) {
    XRD_SHARED(Four<T>, x_fours, kTaps * kChunkRows * kPanel / 4);
    XRD_SHARED(Four<T>, g_fours, kChunkRows * kPanel / 4);
    T *x = x_fours->value, *g = g_fours->value;
    const int64_t first_input = static_cast<int64_t>(blockIdx.y) * kPanel;
    const int64_t first_output = static_cast<int64_t>(blockIdx.z) * kPanel;
    const int output = threadIdx.x % (kPanel / kThreadChannels) * kThreadChannels;
    const int input = threadIdx.x / (kPanel / kThreadChannels) * kThreadInputs;
    const int c_own = threadIdx.x % kPanel;
    const int64_t begin = blockIdx.x * part_rows, end = min(p.n_rows, begin + part_rows);
    T sums[kTaps][kThreadInputs][kThreadChannels] = {};
    for (int64_t first = begin; first < end; first += kChunkRows) {
        for (int i = threadIdx.x / kPanel; i < kTaps * kChunkRows; i += kThreads / kPanel) {
            const int tap = i / kChunkRows;
            const int64_t r = first + i - tap * kChunkRows, from = r + (tap - kTaps / 2) * p.shift;
            const bool inside = r < end && from >= 0 && from < p.n_rows && first_input + c_own < p.n_in;
            x[i * kPanel + c_own] = inside ? p.x[from * p.n_in + first_input + c_own] : T(0);
        }
        for (int i = threadIdx.x / kPanel; i < kChunkRows; i += kThreads / kPanel) {
            const bool inside = first + i < end && first_output + c_own < p.n_out;
            g[i * kPanel + c_own] = inside ? p.grad_out[(first + i) * p.n_out + first_output + c_own] : T(0);
        }
        __syncthreads();
        for (int r = 0; r < kChunkRows; ++r) {
            const Four<T> b = four(g + r * kPanel + output);
#pragma unroll
            for (int tap = 0; tap < kTaps; ++tap)
#pragma unroll
                for (int i = 0; i < kThreadInputs; ++i) {
                    const T a = x[(tap * kChunkRows + r) * kPanel + input + i];
#pragma unroll
                    for (int j = 0; j < kThreadChannels; ++j) sums[tap][i][j] += a * b.value[j];
                }
        }
        __syncthreads();
    }
    T* part = parts + blockIdx.x * kTaps * p.n_in * p.n_out;
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap)
#pragma unroll
        for (int i = 0; i < kThreadInputs; ++i)
#pragma unroll
            for (int j = 0; j < kThreadChannels; ++j) {
                const int64_t c = first_input + input + i, k = first_output + output + j;
                if (c < p.n_in && k < p.n_out) part[(tap * p.n_in + c) * p.n_out + k] = sums[tap][i][j];
            }
}

// Joins the parts in order, a thread a weight.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    join_parts(const T* parts, int64_t n_parts, int64_t size, T* grad_weight) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= size) return;
    double sum = 0.0;
    for (int64_t part = 0; part < n_parts; ++part) sum += parts[part * size + i];
    grad_weight[i] = static_cast<T>(sum);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) pool_rows(PeakStageParams<T> p) {
    const int64_t n = p.n_rows_out * p.n_channels, stride = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += stride) {
        const int64_t j = i / p.n_channels, c = i - j * p.n_channels;
        const int64_t first = p.pairs[j], second = p.pairs[p.n_rows_out + j];
        const T a = first < 0 ? T(0) : p.y[first * p.n_channels + c];
        const T b = second < 0 ? T(0) : p.y[second * p.n_channels + c];
        p.out[i] = !p.maximum ? T(0.5) * (a + b) : b > a || b != b ? b : a;
    }
}

unsigned blocks_of(int64_t n, int64_t size) { return static_cast<unsigned>((n + size - 1) / size); }

template <typename T>
void launch_convolution(const Factor<T>& factor, const Factor<T>& beside, const Finish<T>& finish, T* out,
                        int64_t n_rows, int64_t n_out, void* stream) {
    const dim3 tiles(blocks_of(n_rows, kTileRows), blocks_of(n_out, kPanel));
    XRD_LAUNCH((convolve<T>), tiles, dim3(kThreads), 0, stream, factor, beside, finish, out, n_rows, n_out);
}

}  // namespace

template <typename T>
int peak_conv_cuda(const PeakConvParams<T>& p, void* stream) {
    if (p.n_rows == 0 || p.n_out == 0) return 0;
    launch_convolution({p.x, nullptr, p.weight, p.n_in, p.shift}, {}, {}, p.out, p.n_rows, p.n_out, stream);
    return XRD_LAST_ERROR();
}

template <typename T>
int peak_conv_weight_cuda(const PeakConvWeightParams<T>& p, T* parts, int64_t n_parts, void* stream) {
    const int64_t size = kTaps * p.n_in * p.n_out;
    if (size == 0) return 0;
    const dim3 tiles(static_cast<unsigned>(n_parts), blocks_of(p.n_in, kPanel), blocks_of(p.n_out, kPanel));
    XRD_LAUNCH((weight_parts<T>), tiles, dim3(kThreads), 0, stream, p, parts, (p.n_rows + n_parts - 1) / n_parts);
    XRD_LAUNCH((join_parts<T>), dim3(blocks_of(size, kThreads)), dim3(kThreads), 0, stream, parts, n_parts, size,
               p.grad_weight);
    return XRD_LAST_ERROR();
}

template <typename T>
int peak_stage_cuda(const PeakStageParams<T>& p, T* inner, void* stream) {
    const int64_t n = p.n_channels;
    if (n == 0) return 0;
    if (p.n_rows > 0) {
        // What lies beyond a segment is read through `halo`, and never written into the rows themselves.
        launch_convolution({p.x, nullptr, p.first, p.n_in, p.shift}, {}, {p.offset1, nullptr}, inner, p.n_rows, n,
                           stream);
        launch_convolution({inner, p.halo, p.second, n, p.shift},
                           {p.widen ? p.x : nullptr, nullptr, p.widen, p.n_in, 0},
                           {p.offset2, p.widen ? nullptr : p.x}, p.y, p.n_rows, n, stream);
    }
    const int64_t blocks = blocks_of(p.n_rows_out * n, kThreads);
    if (blocks > 0)
        XRD_LAUNCH((pool_rows<T>), dim3(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks)),
                   dim3(kThreads), 0, stream, p);
    return XRD_LAST_ERROR();
}

template int peak_conv_cuda(const PeakConvParams<float>&, void*);
template int peak_conv_weight_cuda(const PeakConvWeightParams<float>&, float*, int64_t, void*);
template int peak_stage_cuda(const PeakStageParams<float>&, float*, void*);
template int peak_conv_cuda(const PeakConvParams<double>&, void*);
template int peak_conv_weight_cuda(const PeakConvWeightParams<double>&, double*, int64_t, void*);
template int peak_stage_cuda(const PeakStageParams<double>&, double*, void*);

}  // namespace xrdfast
