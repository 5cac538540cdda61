// bind_dsr_loss.h: dsr_loss for both pybind11 modules, which differ in their last argument: threads or a stream.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "dsr_loss.h"

namespace xrdfast {

template <typename Element>
DsrLossParams<Element> dsr_loss_params(const std::vector<int32_t>& class_offset, int64_t n_patterns,
                                       double temperature, uintptr_t previous_ranked, int64_t previous_stride,
                                       uintptr_t ranked, uintptr_t order) {
    DsrLossParams<Element> p{};
    if (class_offset.size() < 2 || class_offset.size() > kMaxHeads + 1)
        throw std::length_error("dsr_loss: class_offset does not fit its array");
    std::copy(class_offset.begin(), class_offset.end(), p.class_offset);
    p.n_patterns = n_patterns;
    p.n_classes = class_offset.back();
    p.n_heads = static_cast<int32_t>(class_offset.size() - 1);
    p.temperature = static_cast<typename DsrLossParams<Element>::Real>(temperature);
    p.previous_ranked = reinterpret_cast<const Element*>(previous_ranked);
    p.previous_stride = previous_stride;
    p.ranked = reinterpret_cast<Element*>(ranked);
    p.order = reinterpret_cast<int16_t*>(order);
    return p;
}

// forward and backward take the parameters, and the threads or the stream.
template <typename Element, typename Forward, typename Backward>
void define_dsr_loss(pybind11::module_& m, const std::string& dtype, Forward forward, Backward backward) {
    using Real = typename DsrLossParams<Element>::Real;
    const pybind11::call_guard<pybind11::gil_scoped_release> unlocked;
    m.def(
        ("dsr_loss_forward_" + dtype).c_str(),
        [forward](const std::vector<int32_t>& class_offset, int64_t n_patterns, double temperature,
                  uintptr_t previous_ranked, int64_t previous_stride, uintptr_t ranked, uintptr_t order,
                  uintptr_t logits, int64_t logits_stride, uintptr_t loss, uintptr_t where) {
            DsrLossParams<Element> p = dsr_loss_params<Element>(class_offset, n_patterns, temperature,
                                                                previous_ranked, previous_stride, ranked, order);
            p.logits = reinterpret_cast<const Element*>(logits);
            p.logits_stride = logits_stride;
            p.loss = reinterpret_cast<Real*>(loss);
            forward(p, where);
        },
        unlocked);
    m.def(
        ("dsr_loss_backward_" + dtype).c_str(),
        [backward](const std::vector<int32_t>& class_offset, int64_t n_patterns, double temperature,
                   uintptr_t previous_ranked, int64_t previous_stride, uintptr_t ranked, uintptr_t order,
                   uintptr_t grad_loss, int64_t grad_pattern_stride, int64_t grad_head_stride, uintptr_t grad_logits,
                   uintptr_t where) {
            DsrLossParams<Element> p = dsr_loss_params<Element>(class_offset, n_patterns, temperature,
                                                                previous_ranked, previous_stride, ranked, order);
            p.grad_loss = reinterpret_cast<const Real*>(grad_loss);
            p.grad_pattern_stride = grad_pattern_stride;
            p.grad_head_stride = grad_head_stride;
            p.grad_logits = reinterpret_cast<Element*>(grad_logits);
            backward(p, where);
        },
        unlocked);
}

}  // namespace xrdfast
