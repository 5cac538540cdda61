// peak_attention.cu: CUDA attention over active patches, forward and backward.
//
// One block takes a tile of rows (queries; keys in the second backward kernel) of one pattern, kSplit threads a row, and
// passes over the other side in tiles of shared memory. It lists the active patches itself: 850 flags are 7 loads a
// thread, and no count has to reach the host. Every sum has one owner and a fixed order, so results repeat bit for bit.
#include "xrd_cuda.h"

#include <cmath>
#include <type_traits>

#include "bfloat16.h"
#include "block_reduce.cuh"
#include "peak_attention.h"

namespace xrdfast {
namespace {

constexpr int kThreads = 128;
constexpr int kTile = 32;  // rows of shared memory; with width 64 in double the two tiles are 32 kB
template <typename T>
constexpr int kSteps = sizeof(T) == 8 ? 4 : 8;  // keys between two looks at the running maximum; 8 doubles would spill
static_assert(kTile % kSteps<float> == 0 && kTile % kSteps<double> == 0, "whole steps");
static_assert(kMaxPatches <= 65536, "places are 16-bit");
// Features that a thread holds: the kernel for keys keeps four such rows, 128 registers.
template <typename T>
constexpr int kFeatures = 128 / sizeof(T);
static_assert(kMaxAttentionWidth <= 4 * kFeatures<double>, "at most four threads a row");

// What one 128-bit access to shared memory moves.
template <typename T>
struct alignas(16) Pack {
    static constexpr int kSize = 16 / sizeof(T);
    T x[kSize];
};

template <typename T>
constexpr int kPacks = kFeatures<T> / Pack<T>::kSize;

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }

// What a stored number is worth, and how one is stored.
template <typename T>
__device__ __forceinline__ T widened(T x) {
    return x;
}
__device__ __forceinline__ float widened(BFloat16 x) { return x; }

template <typename S, typename T>
__device__ __forceinline__ void put(S* to, T x) {
    *to = S(x);
}

// A thread's part of a row: pack i of thread `part` is the row's pack i * kSplit + part, so that neighbours read
// neighbouring banks.
template <typename T, int kSplit>
struct Row {
    T x[kFeatures<T>];

    static __device__ __forceinline__ int feature(int part, int i) {
        constexpr int kSize = Pack<T>::kSize;
        return (i / kSize * kSplit + part) * kSize + i % kSize;
    }
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < kFeatures<T>; ++i) x[i] = T(0);
    }
    template <typename S>
    __device__ __forceinline__ void read(const S* row, bool there, int part, int width) {
#pragma unroll
        for (int i = 0; i < kFeatures<T>; ++i) {
            const int f = feature(part, i);
            x[i] = there && f < width ? widened(row[f]) : T(0);
        }
    }
    template <typename S>
    __device__ __forceinline__ void write(S* row, int part, int width, T factor) const {
#pragma unroll
        for (int i = 0; i < kFeatures<T>; ++i) {
            const int f = feature(part, i);
            if (f < width) put(row + f, x[i] * factor);
        }
    }
    // The row's product with a shared row, the same in all its threads.
    __device__ __forceinline__ T dot(const Pack<T>* shared_row, int part) const {
        T sum = T(0);
#pragma unroll
        for (int i = 0; i < kPacks<T>; ++i) {
            const Pack<T> pack = shared_row[i * kSplit + part];
#pragma unroll
            for (int j = 0; j < Pack<T>::kSize; ++j) sum += x[i * Pack<T>::kSize + j] * pack.x[j];
        }
#pragma unroll
        for (int distance = 1; distance < kSplit; distance *= 2) sum += __shfl_xor_sync(kFullMask, sum, distance);
        return sum;
    }
    __device__ __forceinline__ void add(T factor, const Pack<T>* shared_row, int part) {
#pragma unroll
        for (int i = 0; i < kPacks<T>; ++i) {
            const Pack<T> pack = shared_row[i * kSplit + part];
#pragma unroll
            for (int j = 0; j < Pack<T>::kSize; ++j) x[i * Pack<T>::kSize + j] += factor * pack.x[j];
        }
    }
};

template <typename T, int kSplit>
constexpr int kPacksARow = kPacks<T> * kSplit;
template <typename T, int kSplit>
constexpr int kTilePacks = kTile * kPacksARow<T, kSplit>;

// Rows of a (n_patches, width) table into shared memory, zero where features are missing; `place` names the row.
template <int kSplit, typename T, typename S, typename Place>
__device__ __forceinline__ void fill_tile(Pack<T>* tile, const S* table, int n_rows, int width, Place place) {
    constexpr int kSize = Pack<T>::kSize;
    for (int i = threadIdx.x; i < n_rows * kPacksARow<T, kSplit>; i += kThreads) {
        const int first = i % kPacksARow<T, kSplit> * kSize;
        const S* from = table + static_cast<int64_t>(place(i / kPacksARow<T, kSplit>)) * width + first;
        Pack<T> pack;
#pragma unroll
        for (int j = 0; j < kSize; ++j) pack.x[j] = first + j < width ? widened(from[j]) : T(0);
        tile[i] = pack;
    }
}

struct Keys {
    int count;
    bool any;  // else all patches are keys, with scores of zero
};

// Lists the places of the keys in order; every thread of the block takes part.
__device__ __forceinline__ Keys list_keys(const bool* active, int n_patches, uint16_t* list, int* partial) {
    const int a_thread = (n_patches + kThreads - 1) / kThreads;
    const int begin = min(static_cast<int>(threadIdx.x) * a_thread, n_patches), end = min(begin + a_thread, n_patches);
    int count = 0, total;
    for (int i = begin; i < end; ++i) count += active[i];
    int at = block_exclusive_sum<kThreads>(count, partial, &total);
    for (int i = begin; i < end; ++i) {
        if (total == 0) list[i] = static_cast<uint16_t>(i);
        else if (active[i]) list[at++] = static_cast<uint16_t>(i);
    }
    __syncthreads();
    return {total ? total : n_patches, total > 0};
}

// Which pattern and which tile of its rows a block has.
struct Place {
    int64_t pattern;
    int tile;
};
template <int kSplit>
__host__ __device__ __forceinline__ int tiles(int64_t n_patches) {
    constexpr int kRows = kThreads / kSplit;
    return static_cast<int>((n_patches + kRows - 1) / kRows);
}
template <int kSplit>
__device__ __forceinline__ Place place_of_block(int64_t n_patches) {
    const int n_tiles = tiles<kSplit>(n_patches);
    return {static_cast<int64_t>(blockIdx.x) / n_tiles, static_cast<int>(blockIdx.x % n_tiles)};
}

template <typename T>
__device__ __forceinline__ T score_scale(bool any, int width) {
    return any ? T(1) / sqrt(static_cast<T>(width)) : T(0);
}

template <typename T, typename S, int kSplit>
__global__ void __launch_bounds__(kThreads) attend(PeakAttentionParams<T, S> p) {
    constexpr int kStride = kPacksARow<T, kSplit>, kStep = kSteps<T>;
    XRD_DYNAMIC_SHARED(uint16_t, list);  // n_patches
    XRD_SHARED(int, partial, kThreads / 32);
    XRD_SHARED(Pack<T>, key_tile, (kTilePacks<T, kSplit>));
    XRD_SHARED(Pack<T>, value_tile, (kTilePacks<T, kSplit>));
    const int n = static_cast<int>(p.n_patches), width = static_cast<int>(p.width);
    const Place place = place_of_block<kSplit>(n);
    const int64_t start = place.pattern * n * width;
    const Keys keys = list_keys(p.active + place.pattern * n, n, list, partial);
    const int row = place.tile * (kThreads / kSplit) + threadIdx.x / kSplit, part = threadIdx.x % kSplit;
    Row<T, kSplit> query, output;
    query.read(p.query + start + static_cast<int64_t>(row) * width, row < n, part, width);
    const T scale = score_scale<T>(keys.any, width);
#pragma unroll
    for (int i = 0; i < kFeatures<T>; ++i) query.x[i] *= scale;
    output.clear();
    T largest = -INFINITY, sum = T(0);
    for (int first = 0; first < keys.count; first += kTile) {
        const int here = min(kTile, keys.count - first);
        const auto listed = [=](int i) { return list[first + i]; };
        __syncthreads();
        fill_tile<kSplit>(key_tile, p.key + start, here, width, listed);
        fill_tile<kSplit>(value_tile, p.value + start, here, width, listed);
        __syncthreads();
        for (int step = 0; step < here; step += kStep) {
            T score[kStep], top = largest;
#pragma unroll
            for (int j = 0; j < kStep; ++j) {
                const int r = min(step + j, here - 1);
                const T s = query.dot(key_tile + r * kStride, part);
                score[j] = step + j < here ? s : -INFINITY;
                top = score[j] > top ? score[j] : top;
            }
            const T shrink = exponential(largest - top);
            largest = top;
            sum *= shrink;
#pragma unroll
            for (int i = 0; i < kFeatures<T>; ++i) output.x[i] *= shrink;
#pragma unroll
            for (int j = 0; j < kStep; ++j) {
                const T probability = exponential(score[j] - top);
                sum += probability;
                output.add(probability, value_tile + min(step + j, here - 1) * kStride, part);
            }
        }
    }
    if (row >= n) return;
    output.write(p.output + start + static_cast<int64_t>(row) * width, part, width, T(1) / sum);
    if (part == 0) p.logsumexp[place.pattern * n + row] = largest + logarithm(sum);
}

// With P the probabilities and D = P * (dO V^T - delta), elementwise products, delta = rowsum(dO * O):
//   dQ = scale D K,   dK = scale D^T Q,   dV = P^T dO.
template <typename T, typename S, int kSplit>
__global__ void __launch_bounds__(kThreads) grad_of_queries(PeakAttentionBackwardParams<T, S> p, T* delta_out) {
    constexpr int kStride = kPacksARow<T, kSplit>;
    XRD_DYNAMIC_SHARED(uint16_t, list);  // n_patches
    XRD_SHARED(int, partial, kThreads / 32);
    XRD_SHARED(Pack<T>, key_tile, (kTilePacks<T, kSplit>));
    XRD_SHARED(Pack<T>, value_tile, (kTilePacks<T, kSplit>));
    const int n = static_cast<int>(p.n_patches), width = static_cast<int>(p.width);
    const Place place = place_of_block<kSplit>(n);
    const int64_t start = place.pattern * n * width;
    const Keys keys = list_keys(p.active + place.pattern * n, n, list, partial);
    const int row = place.tile * (kThreads / kSplit) + threadIdx.x / kSplit, part = threadIdx.x % kSplit;
    const bool there = row < n;
    const int64_t at = start + static_cast<int64_t>(row) * width;
    Row<T, kSplit> query, grad, sum;
    query.read(p.output + at, there, part, width);
    grad.read(p.grad_output + at, there, part, width);
    T delta = T(0);
#pragma unroll
    for (int i = 0; i < kFeatures<T>; ++i) delta += grad.x[i] * query.x[i];
#pragma unroll
    for (int distance = 1; distance < kSplit; distance *= 2) delta += __shfl_xor_sync(kFullMask, delta, distance);
    if (there && part == 0) delta_out[place.pattern * n + row] = delta;
    const T scale = score_scale<T>(keys.any, width);
    query.read(p.query + at, there, part, width);
#pragma unroll
    for (int i = 0; i < kFeatures<T>; ++i) query.x[i] *= scale;
    sum.clear();
    const T logsumexp = there ? p.logsumexp[place.pattern * n + row] : T(0);
    for (int first = 0; first < keys.count; first += kTile) {
        const int here = min(kTile, keys.count - first);
        const auto listed = [=](int i) { return list[first + i]; };
        __syncthreads();
        fill_tile<kSplit>(key_tile, p.key + start, here, width, listed);
        fill_tile<kSplit>(value_tile, p.value + start, here, width, listed);
        __syncthreads();
        for (int r = 0; r < here; ++r) {
            const T probability = exponential(query.dot(key_tile + r * kStride, part) - logsumexp);
            const T difference = grad.dot(value_tile + r * kStride, part) - delta;
            sum.add(probability * difference, key_tile + r * kStride, part);
        }
    }
    if (there) sum.write(p.grad_query + at, part, width, scale);
}

// Also writes the zeros of the patches that are no keys.
template <typename T, typename S, int kSplit>
__global__ void __launch_bounds__(kThreads) grad_of_keys(PeakAttentionBackwardParams<T, S> p, const T* delta_in) {
    constexpr int kStride = kPacksARow<T, kSplit>, kRows = kThreads / kSplit;
    XRD_DYNAMIC_SHARED(uint16_t, list);  // n_patches
    XRD_SHARED(int, partial, kThreads / 32);
    XRD_SHARED(Pack<T>, query_tile, (kTilePacks<T, kSplit>));
    XRD_SHARED(Pack<T>, grad_tile, (kTilePacks<T, kSplit>));
    XRD_SHARED(T, logsumexp, kTile);
    XRD_SHARED(T, delta, kTile);
    const int n = static_cast<int>(p.n_patches), width = static_cast<int>(p.width);
    const Place place = place_of_block<kSplit>(n);
    const int64_t start = place.pattern * n * width;
    const bool* active = p.active + place.pattern * n;
    const Keys keys = list_keys(active, n, list, partial);
    const int first_row = place.tile * kRows, row = first_row + threadIdx.x / kSplit, part = threadIdx.x % kSplit;
    Row<T, kSplit> key, value, grad_key, grad_value;
    grad_key.clear();
    grad_value.clear();
    if (keys.any && row < n && !active[row]) {
        grad_key.write(p.grad_key + start + static_cast<int64_t>(row) * width, part, width, T(0));
        grad_value.write(p.grad_value + start + static_cast<int64_t>(row) * width, part, width, T(0));
    }
    if (first_row >= keys.count) return;  // the whole block
    const bool there = row < keys.count;
    const int64_t at = start + static_cast<int64_t>(list[there ? row : 0]) * width;
    key.read(p.key + at, there, part, width);
    value.read(p.value + at, there, part, width);
    const T scale = score_scale<T>(keys.any, width);
#pragma unroll
    for (int i = 0; i < kFeatures<T>; ++i) key.x[i] *= scale;
    for (int first = 0; first < n; first += kTile) {
        const int here = min(kTile, n - first);
        const auto in_order = [=](int i) { return first + i; };
        __syncthreads();
        fill_tile<kSplit>(query_tile, p.query + start, here, width, in_order);
        fill_tile<kSplit>(grad_tile, p.grad_output + start, here, width, in_order);
        for (int i = threadIdx.x; i < here; i += kThreads) {
            logsumexp[i] = p.logsumexp[place.pattern * n + first + i];
            delta[i] = delta_in[place.pattern * n + first + i];
        }
        __syncthreads();
        for (int r = 0; r < here; ++r) {
            const T probability = exponential(key.dot(query_tile + r * kStride, part) - logsumexp[r]);
            const T difference = value.dot(grad_tile + r * kStride, part) - delta[r];
            grad_value.add(probability, grad_tile + r * kStride, part);
            grad_key.add(probability * difference, query_tile + r * kStride, part);
        }
    }
    if (!there) return;
    grad_key.write(p.grad_key + at, part, width, scale);
    grad_value.write(p.grad_value + at, part, width, T(1));
}

// Calls `launch` with the number of threads a row as a compile-time constant.
template <typename T, typename Launch>
int with_split(int64_t width, const Launch& launch) {
    if (width <= kFeatures<T>) launch(std::integral_constant<int, 1>());
    else if (width <= 2 * kFeatures<T>) launch(std::integral_constant<int, 2>());
    else if constexpr (kMaxAttentionWidth > 2 * kFeatures<T>) launch(std::integral_constant<int, 4>());
    return XRD_LAST_ERROR();
}

}  // namespace

template <typename T, typename S>
int peak_attention_forward_cuda(const PeakAttentionParams<T, S>& params, void* stream) {
    if (params.n_patterns == 0) return 0;
    return with_split<T>(params.width, [&](auto split) {
        constexpr int kSplit = decltype(split)::value;
        const dim3 grid(static_cast<unsigned>(params.n_patterns * tiles<kSplit>(params.n_patches)));
        const size_t list_bytes = params.n_patches * sizeof(uint16_t);
        XRD_LAUNCH((attend<T, S, kSplit>), grid, dim3(kThreads), list_bytes, stream, params);
    });
}

template <typename T, typename S>
int peak_attention_backward_cuda(const PeakAttentionBackwardParams<T, S>& params, T* delta, void* stream) {
    if (params.n_patterns == 0) return 0;
    return with_split<T>(params.width, [&](auto split) {
        constexpr int kSplit = decltype(split)::value;
        const dim3 grid(static_cast<unsigned>(params.n_patterns * tiles<kSplit>(params.n_patches)));
        const size_t list_bytes = params.n_patches * sizeof(uint16_t);
        XRD_LAUNCH((grad_of_queries<T, S, kSplit>), grid, dim3(kThreads), list_bytes, stream, params, delta);
        XRD_LAUNCH((grad_of_keys<T, S, kSplit>), grid, dim3(kThreads), list_bytes, stream, params, delta);
    });
}

template int peak_attention_forward_cuda(const PeakAttentionParams<float, float>&, void*);
template int peak_attention_forward_cuda(const PeakAttentionParams<double, double>&, void*);
template int peak_attention_forward_cuda(const PeakAttentionParams<float, BFloat16>&, void*);
template int peak_attention_backward_cuda(const PeakAttentionBackwardParams<float, float>&, float*, void*);
template int peak_attention_backward_cuda(const PeakAttentionBackwardParams<double, double>&, double*, void*);
template int peak_attention_backward_cuda(const PeakAttentionBackwardParams<float, BFloat16>&, float*, void*);

}  // namespace xrdfast
