// bind_dsr_loss.h: dsr_loss for both pybind11 modules, which differ in their last argument: threads or a stream.
#pragma once
#include <algorithm>
#include <stdexcept>
#include <string>

#include "bind.h"
#include "dsr_loss.h"

namespace xrdfast {

template <typename Element>
DsrLossParams<Element> dsr_loss_params(uintptr_t class_offset, int32_t n_heads, int64_t n_patterns, uintptr_t slope) {
    DsrLossParams<Element> p{};
    if (n_heads < 1 || n_heads > kMaxHeads) throw std::length_error("dsr_loss: class_offset does not fit its array");
    std::copy_n(at<const int32_t>(class_offset), n_heads + 1, p.class_offset);
    p.n_patterns = n_patterns;
    p.n_classes = p.class_offset[n_heads];
    p.n_heads = n_heads;
    p.slope = at<typename DsrLossParams<Element>::Real>(slope);
    return p;
}

template <typename Element>
using DsrLossFunction = void (*)(const DsrLossParams<Element>&, uintptr_t threads_or_stream);

// `class_offset` is on the host, int32 (n_heads + 1).
template <typename Element, DsrLossFunction<Element> kForward, DsrLossFunction<Element> kBackward>
void define_dsr_loss(Functions& functions, const std::string& dtype) {
    using Real = typename DsrLossParams<Element>::Real;
    define(functions, "dsr_loss_forward_" + dtype,
        [](uintptr_t class_offset, int32_t n_heads, int64_t n_patterns, uintptr_t slope, double temperature,
           uintptr_t previous_ranked, int64_t previous_stride, uintptr_t logits, int64_t logits_stride,
           uintptr_t ranked, uintptr_t loss, uintptr_t where) {
            DsrLossParams<Element> p = dsr_loss_params<Element>(class_offset, n_heads, n_patterns, slope);
            p.temperature = static_cast<Real>(temperature);
            p.previous_ranked = at<const Element>(previous_ranked);
            p.previous_stride = previous_stride;
            p.logits = at<const Element>(logits);
            p.logits_stride = logits_stride;
            p.ranked = at<Element>(ranked);
            p.loss = at<Real>(loss);
            kForward(p, where);
        });
    define(functions, "dsr_loss_backward_" + dtype,
        [](uintptr_t class_offset, int32_t n_heads, int64_t n_patterns, uintptr_t slope, uintptr_t grad_loss,
           int64_t grad_pattern_stride, int64_t grad_head_stride, uintptr_t grad_logits, uintptr_t where) {
            DsrLossParams<Element> p = dsr_loss_params<Element>(class_offset, n_heads, n_patterns, slope);
            p.grad_loss = at<const Real>(grad_loss);
            p.grad_pattern_stride = grad_pattern_stride;
            p.grad_head_stride = grad_head_stride;
            p.grad_logits = at<Element>(grad_logits);
            kBackward(p, where);
        });
}

}  // namespace xrdfast
