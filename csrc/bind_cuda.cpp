// bind_cuda.cpp: the functions of the module _cuda and of _emu, the same kernels compiled by a C++ compiler against the
// emulator for the tests: raw device addresses and sizes in, nothing else. Checks and allocation live in Python
// (xrdfast/ops); no CUDA headers, so the C++ compiler alone makes it.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "bind.h"
#include "bind_dsr_loss.h"
#include "bind_params.h"
#include "peak_attention.h"
#include "peak_conv.h"
#include "peak_norm.h"
#include "peak_plan.h"
#include "preprocess.h"
#include "render.h"
#include "render_patterns.h"
#include "simulate.h"

using namespace xrdfast;

namespace {

void check(const char* op, int error) {
    if (error == 0) return;
    throw std::runtime_error(std::string(op) + ": the launch failed with CUDA error " + std::to_string(error));
}

// What counting and listing read.
StructureBatch lattices(uintptr_t lattice, int64_t n_structures, double g_min, double g_max) {
    StructureBatch batch{};
    batch.lattice = at<const double>(lattice);
    batch.n_structures = n_structures;
    batch.g_min = g_min;
    batch.g_max = g_max;
    return batch;
}

// `dtype` ends the names: peak_attention_float32.
template <typename T, typename S>
void bind_peak_attention(Functions& functions, const std::string& dtype) {
    define(functions, "peak_attention_" + dtype,
        [](uintptr_t query, uintptr_t key, uintptr_t value, uintptr_t active, uintptr_t output, uintptr_t logsumexp,
           int64_t n_patterns, int64_t n_patches, int64_t width, uintptr_t stream) {
            const PeakAttentionParams<T, S> params{at<const S>(query), at<const S>(key), at<const S>(value),
                                                   at<const bool>(active), at<S>(output), at<T>(logsumexp),
                                                   n_patterns, n_patches, width};
            check("peak_attention", peak_attention_forward_cuda(params, at<void>(stream)));
        });
    define(functions, "peak_attention_backward_" + dtype,
        [](uintptr_t grad_output, uintptr_t query, uintptr_t key, uintptr_t value, uintptr_t active,
           uintptr_t output, uintptr_t logsumexp, uintptr_t grad_query, uintptr_t grad_key, uintptr_t grad_value,
           int64_t n_patterns, int64_t n_patches, int64_t width, uintptr_t delta, uintptr_t stream) {
            const PeakAttentionBackwardParams<T, S> params{
                at<const S>(grad_output), at<const S>(query), at<const S>(key), at<const S>(value),
                at<const bool>(active), at<const S>(output), at<const T>(logsumexp), at<S>(grad_query),
                at<S>(grad_key), at<S>(grad_value), n_patterns, n_patches, width};
            check("peak_attention_backward", peak_attention_backward_cuda(params, at<T>(delta), at<void>(stream)));
        });
}

// `padding` and `room` are on the host.
template <typename T>
PeakCountParams<T> plan_of(uintptr_t intensity, uintptr_t padding, int64_t n_patterns, int64_t length,
                           int64_t n_stages, int64_t reach, int64_t max_gap, uintptr_t felt, uintptr_t computed,
                           uintptr_t first_row, uintptr_t n_rows, uintptr_t blank) {
    if (n_stages < 1 || n_stages > kMaxPackedStages) throw std::invalid_argument("peak_plan: too many packed stages");
    PeakCountParams<T> params{at<const T>(intensity), n_patterns, length, n_stages, {}, reach, max_gap,
                              at<uint8_t>(felt), at<uint8_t>(computed), at<int64_t>(first_row), at<int64_t>(n_rows),
                              at<int64_t>(blank)};
    std::copy_n(at<const int64_t>(padding), n_stages, params.padding);
    return params;
}

template <typename T>
void bind_peak_plan(Functions& functions, const std::string& type) {
    define(functions, "peak_count_" + type,
        [](uintptr_t intensity, uintptr_t padding, int64_t n_patterns, int64_t length, int64_t n_stages, int64_t reach,
           int64_t max_gap, uintptr_t felt, uintptr_t computed, uintptr_t first_row, uintptr_t n_rows, uintptr_t blank,
           uintptr_t stream) {
            const PeakCountParams<T> params = plan_of<T>(intensity, padding, n_patterns, length, n_stages, reach,
                                                         max_gap, felt, computed, first_row, n_rows, blank);
            check("peak_count", peak_count_cuda(params, at<void>(stream)));
        });
    define(functions, "peak_list_" + type,
        [](uintptr_t intensity, uintptr_t padding, int64_t n_patterns, int64_t length, int64_t n_stages, int64_t reach,
           int64_t max_gap, uintptr_t felt, uintptr_t computed, uintptr_t first_row, uintptr_t n_rows, uintptr_t blank,
           uintptr_t room, uintptr_t overflow, uintptr_t point, uintptr_t position, uintptr_t count, uintptr_t halo,
           uintptr_t pairs, uintptr_t row_at, uintptr_t stream) {
            const PeakCountParams<T> params = plan_of<T>(intensity, padding, n_patterns, length, n_stages, reach,
                                                         max_gap, felt, computed, first_row, n_rows, blank);
            PeakListParams lists{{},
                                 at<bool>(overflow),
                                 at<int64_t>(point),
                                 at<int64_t>(position),
                                 at<float>(count),
                                 at<int32_t>(halo),
                                 at<int32_t>(pairs),
                                 at<int32_t>(row_at)};
            std::copy_n(at<const int64_t>(room), n_stages + 1, lists.room);
            check("peak_list", peak_list_cuda(params, lists, at<void>(stream)));
        });
}

// The operators of one floating-point type, under names that end in it.
template <typename T>
void bind_peak_conv(Functions& functions, const std::string& type) {
    define(functions, "peak_conv_" + type,
        [](uintptr_t x, uintptr_t weight, uintptr_t out, int64_t n_rows, int64_t n_in, int64_t n_out, int64_t shift,
           uintptr_t stream) {
            const PeakConvParams<T> params{at<const T>(x), at<const T>(weight), at<T>(out), n_rows, n_in, n_out, shift};
            check("peak_conv", peak_conv_cuda(params, at<void>(stream)));
        });
    define(functions, "peak_conv_weight_" + type,
        [](uintptr_t x, uintptr_t grad_out, uintptr_t grad_weight, int64_t n_rows, int64_t n_in, int64_t n_out,
           int64_t shift, uintptr_t parts, int64_t n_parts, uintptr_t stream) {
            const PeakConvWeightParams<T> params{at<const T>(x), at<const T>(grad_out), at<T>(grad_weight), n_rows,
                                                 n_in,           n_out,                 shift};
            check("peak_conv_weight", peak_conv_weight_cuda(params, at<T>(parts), n_parts, at<void>(stream)));
        });
    define(functions, "peak_stage_" + type,
        [](uintptr_t x, uintptr_t first, uintptr_t second, uintptr_t widen, uintptr_t offset1, uintptr_t offset2,
           uintptr_t halo, uintptr_t pairs, uintptr_t y, uintptr_t out, int64_t n_rows, int64_t n_rows_out,
           int64_t n_in, int64_t n_channels, int64_t n_touched, int64_t shift, bool maximum, uintptr_t inner,
           uintptr_t stream) {
            const PeakStageParams<T> params{at<const T>(x),       at<const T>(first),       at<const T>(second),
                                            at<const T>(widen),   at<const T>(offset1),     at<const T>(offset2),
                                            at<const int32_t>(halo), at<const int32_t>(pairs), at<T>(y),
                                            at<T>(out),           n_rows,                   n_rows_out,
                                            n_in,                 n_channels,               n_touched,
                                            shift,                maximum};
            check("peak_stage", peak_stage_cuda(params, at<T>(inner), at<void>(stream)));
        });
    define(functions, "peak_norm_" + type,
        [](uintptr_t h, uintptr_t residual, uintptr_t gamma, uintptr_t beta, uintptr_t count, uintptr_t take,
           uintptr_t mean, uintptr_t var, int64_t n_rows, int64_t n_rows_out, int64_t n_channels, int64_t n_touched,
           int n_take, bool maximum, bool batch, double eps, double total, uintptr_t sums, uintptr_t weights,
           uintptr_t out, uintptr_t stream) {
            const PeakNormParams<T> params =
                peak_norm_params<T>(h, residual, gamma, beta, count, take, mean, var, n_rows, n_rows_out, n_channels,
                                    n_touched, n_take, maximum, batch, eps, total);
            const PeakNormScratch<T> scratch{at<T>(sums), at<T>(weights), nullptr, nullptr};
            check("peak_norm", peak_norm_cuda(params, scratch, at<T>(out), at<void>(stream)));
        });
    define(functions, "peak_norm_backward_" + type,
        [](uintptr_t h, uintptr_t residual, uintptr_t gamma, uintptr_t beta, uintptr_t count, uintptr_t take,
           uintptr_t mean, uintptr_t var, int64_t n_rows, int64_t n_rows_out, int64_t n_channels, int64_t n_touched,
           int n_take, bool maximum, bool batch, double eps, double total, uintptr_t sums, uintptr_t taker,
           uintptr_t taken, uintptr_t grad_out, uintptr_t grad_h, uintptr_t grad_residual, uintptr_t grad_gamma,
           uintptr_t grad_beta, uintptr_t stream) {
            const PeakNormParams<T> params =
                peak_norm_params<T>(h, residual, gamma, beta, count, take, mean, var, n_rows, n_rows_out, n_channels,
                                    n_touched, n_take, maximum, batch, eps, total);
            const PeakNormScratch<T> scratch{at<T>(sums), nullptr, at<const int32_t>(taker), at<const int32_t>(taken)};
            const PeakNormGrads<T> grads{at<const T>(grad_out), at<T>(grad_h), at<T>(grad_residual), at<T>(grad_gamma),
                                         at<T>(grad_beta)};
            check("peak_norm_backward", peak_norm_backward_cuda(params, scratch, grads, at<void>(stream)));
        });
}

template <typename Element>
void forward_dsr_loss(const DsrLossParams<Element>& p, uintptr_t stream) {
    check("dsr_loss", dsr_loss_forward_cuda(p, at<void>(stream)));
}

template <typename Element>
void backward_dsr_loss(const DsrLossParams<Element>& p, uintptr_t stream) {
    check("dsr_loss_backward", dsr_loss_backward_cuda(p, at<void>(stream)));
}

template <typename Element>
void bind_dsr_loss(Functions& functions, const std::string& dtype) {
    define_dsr_loss<Element, forward_dsr_loss<Element>, backward_dsr_loss<Element>>(functions, dtype);
}

}  // namespace

namespace xrdfast {

Functions module_functions() {
    Functions functions;
    define(functions, "count_reflections",
        [](uintptr_t lattice, int64_t n_structures, double g_min, double g_max, uintptr_t count, uintptr_t status,
           uintptr_t stream) {
            const StructureBatch batch = lattices(lattice, n_structures, g_min, g_max);
            check("count_reflections",
                  count_reflections_cuda(batch, at<int64_t>(count), at<int32_t>(status), at<void>(stream)));
        });
    define(functions, "list_reflections",
        [](uintptr_t lattice, int64_t n_structures, double g_min, double g_max, uintptr_t offset,
           int64_t n_reflections, uintptr_t hkl, uintptr_t g2, uintptr_t stream) {
            const ReflectionList list{at<const int64_t>(offset), n_reflections, at<int16_t>(hkl), at<double>(g2),
                                      nullptr};
            check("list_reflections",
                  list_reflections_cuda(lattices(lattice, n_structures, g_min, g_max), list, at<void>(stream)));
        });
    define(functions, "structure_factors",
        [](uintptr_t atom_offset, uintptr_t lattice, uintptr_t atomic_number, uintptr_t fractional,
           uintptr_t occupancy, uintptr_t b_iso, uintptr_t form_factor, uintptr_t dispersion, int64_t n_structures,
           int64_t n_elements, bool mott_bethe, double wavelength, double g_min, double g_max, uintptr_t offset,
           int64_t n_reflections, uintptr_t hkl, uintptr_t g2, uintptr_t f_squared, uintptr_t stream) {
            const StructureBatch batch =
                structures(atom_offset, lattice, atomic_number, fractional, occupancy, b_iso, form_factor, dispersion,
                           n_structures, n_elements, mott_bethe, wavelength, g_min, g_max);
            const ReflectionList list{at<const int64_t>(offset), n_reflections, at<int16_t>(hkl), at<double>(g2),
                                      at<double>(f_squared)};
            check("structure_factors", structure_factors_cuda(batch, list, at<void>(stream)));
        });
    define(functions, "name_families",
        [](int64_t n_reflections, uintptr_t structure, uintptr_t hkl, uintptr_t rotation_offset, uintptr_t rotations,
           uintptr_t code, uintptr_t multiplicity, uintptr_t stream) {
            const FamilyNames names{n_reflections,
                                    at<const int64_t>(structure),
                                    at<const int16_t>(hkl),
                                    at<const int64_t>(rotation_offset),
                                    at<const int8_t>(rotations),
                                    at<int32_t>(code),
                                    at<int16_t>(multiplicity)};
            check("name_families", name_families_cuda(names, at<void>(stream)));
        });
    define(functions, "render_sticks",
        [](uintptr_t offset, uintptr_t hkl, uintptr_t multiplicity, uintptr_t f_squared, uintptr_t reciprocal_metric,
           uintptr_t b_overall, uintptr_t intensity, int64_t hkl_stride, int64_t multiplicity_stride,
           int64_t n_patterns, int64_t n_points, double wavelength, double two_theta_min, double two_theta_step,
           uintptr_t two_theta, uintptr_t strength, uintptr_t order, uintptr_t stream) {
            const RenderSticksParams params{at<const int64_t>(offset),
                                            at<const int16_t>(hkl),
                                            at<const int16_t>(multiplicity),
                                            at<const float>(f_squared),
                                            at<const double>(reciprocal_metric),
                                            at<const double>(b_overall),
                                            at<float>(intensity),
                                            hkl_stride,
                                            multiplicity_stride,
                                            n_patterns,
                                            n_points,
                                            wavelength,
                                            two_theta_min,
                                            two_theta_step};
            const RenderSticksScratch scratch{at<double>(two_theta), at<double>(strength), at<int32_t>(order)};
            check("render_sticks", render_sticks_cuda(params, scratch, at<void>(stream)));
        });
    define(functions, "preprocess_scans",
        [](uintptr_t offset, uintptr_t two_theta, uintptr_t intensity, uintptr_t wavelength,
           uintptr_t second_wavelength, uintptr_t pattern, uintptr_t measured, uintptr_t active_count,
           uintptr_t active_patch, int64_t n_scans, int64_t n_points, int64_t smooth_points, double background_width,
           double clip_sigma, bool conserve_area, double model_wavelength, double two_theta_min,
           double two_theta_step, uintptr_t signal, uintptr_t spare, uintptr_t axis, uintptr_t noise, uintptr_t level,
           int64_t n_total, int64_t longest, uintptr_t stream) {
            const PreprocessScansParams params{at<const int64_t>(offset),
                                               at<const double>(two_theta),
                                               at<const float>(intensity),
                                               at<const double>(wavelength),
                                               at<const double>(second_wavelength),
                                               at<float>(pattern),
                                               at<int32_t>(measured),
                                               at<int32_t>(active_count),
                                               at<int16_t>(active_patch),
                                               n_scans,
                                               n_points,
                                               smooth_points,
                                               background_width,
                                               clip_sigma,
                                               conserve_area,
                                               model_wavelength,
                                               two_theta_min,
                                               two_theta_step};
            const PreprocessScansScratch scratch{at<float>(signal), at<float>(spare), at<double>(axis),
                                                 at<float>(noise),  at<float>(level), n_total,
                                                 longest};
            check("preprocess_scans", preprocess_scans_cuda(params, scratch, at<void>(stream)));
        });
    bind_peak_attention<float, float>(functions, "float32");
    bind_peak_attention<double, double>(functions, "float64");
    bind_peak_attention<float, BFloat16>(functions, "bfloat16");
    bind_peak_plan<float>(functions, "float32");
    bind_peak_plan<double>(functions, "float64");
    bind_peak_conv<float>(functions, "float32");
    bind_peak_conv<double>(functions, "float64");
    bind_dsr_loss<float>(functions, "float32");
    bind_dsr_loss<double>(functions, "float64");
    bind_dsr_loss<BFloat16>(functions, "bfloat16");
    define(functions, "render_patterns",
        [](uintptr_t offset, uintptr_t hkl, uintptr_t multiplicity, uintptr_t f_squared, uintptr_t reciprocal_metric,
           uintptr_t b_overall, uintptr_t rotation_offset, uintptr_t rotations, uintptr_t profile,
           uintptr_t pattern_id, uintptr_t intensity, uintptr_t active_count, uintptr_t active_patch,
           int64_t hkl_stride, int64_t multiplicity_stride, int64_t n_patterns, int64_t n_points, int64_t seed,
           double clip_sigma, double wavelength, double two_theta_min, double two_theta_step, uintptr_t g2,
           uintptr_t weight, uintptr_t line, uintptr_t peaks, uintptr_t stream) {
            const RenderPatternsParams params{at<const int64_t>(offset),
                                              at<const int16_t>(hkl),
                                              at<const int16_t>(multiplicity),
                                              at<const float>(f_squared),
                                              at<const double>(reciprocal_metric),
                                              at<const double>(b_overall),
                                              at<const int64_t>(rotation_offset),
                                              at<const int8_t>(rotations),
                                              at<const ProfileRow>(profile),
                                              at<const int64_t>(pattern_id),
                                              at<float>(intensity),
                                              at<int32_t>(active_count),
                                              at<int16_t>(active_patch),
                                              hkl_stride,
                                              multiplicity_stride,
                                              n_patterns,
                                              n_points,
                                              seed,
                                              clip_sigma,
                                              wavelength,
                                              two_theta_min,
                                              two_theta_step};
            const RenderPatternsScratch scratch{at<double>(g2), at<double>(weight), at<Line>(line), at<float>(peaks)};
            check("render_patterns", render_patterns_cuda(params, scratch, at<void>(stream)));
        });
    return functions;
}

}  // namespace xrdfast
