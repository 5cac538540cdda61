// dsr_loss.h: KL divergence between the ranked, temperature-softened outputs of two batches, for several heads at once.
// Plain C++; no torch, no CUDA headers.
#pragma once
#include <cstdint>
#include <type_traits>

#include "bfloat16.h"

namespace xrdfast {

constexpr int kMaxHeads = 8;
constexpr int kMaxHeadClasses = 1024;

// Element: float, double, or BFloat16, whose arithmetic is float.
template <typename Element>
struct DsrLossParams {
    using Real = std::conditional_t<std::is_same_v<Element, double>, double, float>;

    int64_t n_patterns;
    int64_t n_classes;                     // of all heads together
    int32_t n_heads;                       // 1 to kMaxHeads
    int32_t class_offset[kMaxHeads + 1];   // first class of each head, then n_classes; 1 to kMaxHeadClasses a head
    Real temperature;                      // > 0
    const Element* previous_ranked;        // (n_patterns, n_classes), rows previous_stride elements apart; constant.
    int64_t previous_stride;               // Null in a forward: the batch is compared with itself.

    // Forward.
    const Element* logits;  // (n_patterns, n_classes), rows logits_stride elements apart
    int64_t logits_stride;
    Element* ranked;  // (n_patterns, n_classes), ascending in each head, NaN last
    Real* loss;       // (n_patterns, n_heads)

    // Written by the forward, read by the backward: dloss / dlogits of each head's own loss.
    Real* slope;  // (n_patterns, n_classes)

    // Backward.
    const Real* grad_loss;  // (n_patterns, n_heads), any strides, in elements
    int64_t grad_pattern_stride;
    int64_t grad_head_stride;
    Element* grad_logits;  // (n_patterns, n_classes)
};
static_assert(kMaxHeadClasses - 1 <= INT16_MAX, "a class within a head fits in the int16 of the CUDA kernel");

// loss = T^2 sum_j q_j (log q_j - log p_j), p = softmax(ranked / T), q = softmax(previous_ranked / T), per head;
// slope[order[j]] = T (p_j - q_j), order the stable ranking.
template <typename Element>
void dsr_loss_forward_cpu(const DsrLossParams<Element>& params, int n_threads);
// grad_logits = grad_loss slope
template <typename Element>
void dsr_loss_backward_cpu(const DsrLossParams<Element>& params, int n_threads);

// The same on a device. Returns a cudaError_t as int; `stream` is a cudaStream_t.
template <typename Element>
int dsr_loss_forward_cuda(const DsrLossParams<Element>& params, void* stream);
template <typename Element>
int dsr_loss_backward_cuda(const DsrLossParams<Element>& params, void* stream);

}  // namespace xrdfast
