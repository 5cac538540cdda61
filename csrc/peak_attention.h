// peak_attention.h: attention whose keys are the active patches of a pattern. Plain C++; no torch, no CUDA headers.
#pragma once
#include <cstdint>

namespace xrdfast {

constexpr int64_t kMaxPatches = 4096;
constexpr int64_t kMaxAttentionWidth = 64;

// T is the arithmetic, S what queries, keys, values, output and their gradients are stored as.
template <typename T, typename S = T>
struct PeakAttentionParams {
    const S* query;       // (n_patterns, n_patches, width), row-major as all that follow
    const S* key;         // same shape
    const S* value;       // same shape
    const bool* active;   // (n_patterns, n_patches), the patches that are keys; none: all are, with scores of zero
    S* output;            // (n_patterns, n_patches, width)
    T* logsumexp;         // (n_patterns, n_patches), natural, of the scaled scores
    int64_t n_patterns;
    int64_t n_patches;    // <= kMaxPatches
    int64_t width;        // a multiple of 8, <= kMaxAttentionWidth
};

template <typename T, typename S = T>
struct PeakAttentionBackwardParams {
    const S* grad_output;  // (n_patterns, n_patches, width)
    const S* query;        // as in the forward, to logsumexp
    const S* key;
    const S* value;
    const bool* active;
    const S* output;
    const T* logsumexp;
    S* grad_query;         // (n_patterns, n_patches, width)
    S* grad_key;           // same shape
    S* grad_value;         // same shape
    int64_t n_patterns;
    int64_t n_patches;
    int64_t width;
};

// The patch encoder in inference: embedding, attention layers, maximum over the patches.
template <typename T>
struct EncodePatchesParams {
    const T* intensity;     // (n_patterns, n_patches, patch_points)
    const T* patch_weight;  // (patch_points, n_embedded)
    const T* position;      // (n_patches, width), added to [embedded, 0 ..., patch maximum]
    const T* layers;        // (n_layers, ...), the tensors of a layer one after another, see LayerView
    T* features;            // (n_patterns, width)
    int64_t n_patterns;
    int64_t n_patches;
    int64_t patch_points;
    int64_t n_embedded;     // < width
    int64_t width;
    int64_t hidden;
    int64_t n_layers;
    T blank;                // a patch whose maximum is below is no key
    T norm_eps;
    T leaky_slope;
};

template <typename T>
void peak_attention_forward_cpu(const PeakAttentionParams<T>& params, int n_threads);
template <typename T>
void peak_attention_backward_cpu(const PeakAttentionBackwardParams<T>& params, int n_threads);
template <typename T>
void encode_patches_cpu(const EncodePatchesParams<T>& params, int n_threads);

// These return a cudaError_t as int; `stream` is a cudaStream_t. (T, S) is (float, float), (double, double) or
// (float, BFloat16). `delta` is (n_patterns, n_patches) of scratch.
template <typename T, typename S>
int peak_attention_forward_cuda(const PeakAttentionParams<T, S>& params, void* stream);
template <typename T, typename S>
int peak_attention_backward_cuda(const PeakAttentionBackwardParams<T, S>& params, T* delta, void* stream);

}  // namespace xrdfast
