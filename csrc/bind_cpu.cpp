// bind_cpu.cpp: the functions of the module _cpu: raw addresses and sizes in, nothing else. Checks and allocation live in
// Python (xrdfast/ops).
#include <string>
#include <utility>

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
#include "retrieval.h"
#include "simulate.h"
#include "winograd.h"

using namespace xrdfast;

namespace {

// `dtype` ends the names: peak_attention_float32.
template <typename T>
void bind_peak_attention(Functions& functions, const std::string& dtype) {
    define(functions, "peak_attention_" + dtype,
        [](uintptr_t query, uintptr_t key, uintptr_t value, uintptr_t active, uintptr_t output,
           uintptr_t logsumexp, int64_t n_patterns, int64_t n_patches, int64_t width, int n_threads) {
            peak_attention_forward_cpu<T>({at<const T>(query), at<const T>(key), at<const T>(value),
                                           at<const bool>(active), at<T>(output), at<T>(logsumexp), n_patterns,
                                           n_patches, width},
                                          n_threads);
        });
    define(functions, "peak_attention_backward_" + dtype,
        [](uintptr_t grad_output, uintptr_t query, uintptr_t key, uintptr_t value, uintptr_t active,
           uintptr_t output, uintptr_t logsumexp, uintptr_t grad_query, uintptr_t grad_key, uintptr_t grad_value,
           int64_t n_patterns, int64_t n_patches, int64_t width, int n_threads) {
            peak_attention_backward_cpu<T>(
                {at<const T>(grad_output), at<const T>(query), at<const T>(key), at<const T>(value),
                 at<const bool>(active), at<const T>(output), at<const T>(logsumexp), at<T>(grad_query),
                 at<T>(grad_key), at<T>(grad_value), n_patterns, n_patches, width},
                n_threads);
        });
    define(functions, "encode_patches_" + dtype,
        [](uintptr_t intensity, uintptr_t patch_weight, uintptr_t position, uintptr_t layers, uintptr_t features,
           int64_t n_patterns, int64_t n_patches, int64_t patch_points, int64_t n_embedded, int64_t width,
           int64_t hidden, int64_t n_layers, double blank, double norm_eps, double leaky_slope, int n_threads) {
            encode_patches_cpu<T>({at<const T>(intensity), at<const T>(patch_weight), at<const T>(position),
                                   at<const T>(layers), at<T>(features), n_patterns, n_patches, patch_points,
                                   n_embedded, width, hidden, n_layers, static_cast<T>(blank),
                                   static_cast<T>(norm_eps), static_cast<T>(leaky_slope)},
                                  n_threads);
        });
}

template <typename T, void (*kMap)(const WinogradParams<T>&, int)>
void bind_winograd(Functions& functions, const std::string& name) {
    define(functions, name,
        [](uintptr_t rows, uintptr_t planes, int64_t n_positions, int64_t size, int64_t tile_begin, int64_t tile_end,
           int n_threads) {
            kMap({at<T>(rows), at<T>(planes), n_positions, size, tile_begin, tile_end}, n_threads);
        });
}

// The operators of one floating-point type, under names that end in it.
template <typename T>
void bind_peak_conv(Functions& functions, const std::string& type) {
    define(functions, "peak_plan_" + type,
        [](uintptr_t intensity, uintptr_t paddings, int64_t n_patterns, int64_t length, int64_t n_stages,
           int64_t packed_stages, int64_t reach, int64_t max_gap, double packed_share, uintptr_t n_rows,
           uintptr_t point, uintptr_t position, uintptr_t count, uintptr_t halo, uintptr_t pairs) {
            peak_plan_cpu<T>({at<const T>(intensity), at<const int64_t>(paddings), n_patterns, length, n_stages,
                              packed_stages, reach, max_gap, packed_share, at<int64_t>(n_rows), at<int64_t>(point),
                              at<int64_t>(position), at<float>(count), at<int32_t>(halo), at<int32_t>(pairs)});
        });
    define(functions, "peak_conv_" + type,
        [](uintptr_t x, uintptr_t weight, uintptr_t out, int64_t n_rows, int64_t n_in, int64_t n_out, int64_t shift,
           int n_threads) {
            peak_conv_cpu<T>({at<const T>(x), at<const T>(weight), at<T>(out), n_rows, n_in, n_out, shift}, n_threads);
        });
    define(functions, "peak_stage_" + type,
        [](uintptr_t x, uintptr_t first, uintptr_t second, uintptr_t widen, uintptr_t offset1, uintptr_t offset2,
           uintptr_t halo, uintptr_t pairs, uintptr_t y, uintptr_t out, int64_t n_rows, int64_t n_rows_out,
           int64_t n_in, int64_t n_channels, int64_t n_touched, int64_t shift, bool maximum, int n_threads) {
            peak_stage_cpu<T>({at<const T>(x), at<const T>(first), at<const T>(second), at<const T>(widen),
                               at<const T>(offset1), at<const T>(offset2), at<const int32_t>(halo),
                               at<const int32_t>(pairs), at<T>(y), at<T>(out), n_rows, n_rows_out, n_in, n_channels,
                               n_touched, shift, maximum},
                              n_threads);
        });
    define(functions, "peak_conv_weight_" + type,
        [](uintptr_t x, uintptr_t grad_out, uintptr_t grad_weight, int64_t n_rows, int64_t n_in, int64_t n_out,
           int64_t shift, int n_threads) {
            peak_conv_weight_cpu<T>(
                {at<const T>(x), at<const T>(grad_out), at<T>(grad_weight), n_rows, n_in, n_out, shift}, n_threads);
        });
    bind_winograd<T, winograd_input_cpu<T>>(functions, "winograd_input_" + type);
    bind_winograd<T, winograd_output_cpu<T>>(functions, "winograd_output_" + type);
    bind_winograd<T, winograd_output_backward_cpu<T>>(functions, "winograd_output_backward_" + type);
    define(functions, "winograd_weight_" + type,
        [](uintptr_t weight, uintptr_t planes, int64_t size, bool reversed, int n_threads) {
            winograd_weight_cpu(at<const T>(weight), at<T>(planes), size, reversed, n_threads);
        });
    define(functions, "winograd_weight_backward_" + type,
        [](uintptr_t planes, uintptr_t grad_weight, int64_t size, int n_threads) {
            winograd_weight_backward_cpu(at<const T>(planes), at<T>(grad_weight), size, n_threads);
        });
    define(functions, "peak_norm_" + type,
        [](uintptr_t h, uintptr_t residual, uintptr_t gamma, uintptr_t beta, uintptr_t count, uintptr_t take,
           uintptr_t mean, uintptr_t var, int64_t n_rows, int64_t n_rows_out, int64_t n_channels, int64_t n_touched,
           int n_take, bool maximum, bool batch, double eps, double total, uintptr_t out, int n_threads) {
            peak_norm_cpu(peak_norm_params<T>(h, residual, gamma, beta, count, take, mean, var, n_rows, n_rows_out,
                                              n_channels, n_touched, n_take, maximum, batch, eps, total),
                          at<T>(out), n_threads);
        });
    define(functions, "peak_norm_backward_" + type,
        [](uintptr_t h, uintptr_t residual, uintptr_t gamma, uintptr_t beta, uintptr_t count, uintptr_t take,
           uintptr_t mean, uintptr_t var, int64_t n_rows, int64_t n_rows_out, int64_t n_channels, int64_t n_touched,
           int n_take, bool maximum, bool batch, double eps, double total, uintptr_t grad_out, uintptr_t grad_h,
           uintptr_t grad_residual, uintptr_t grad_gamma, uintptr_t grad_beta, int n_threads) {
            peak_norm_backward_cpu(
                peak_norm_params<T>(h, residual, gamma, beta, count, take, mean, var, n_rows, n_rows_out, n_channels,
                                    n_touched, n_take, maximum, batch, eps, total),
                PeakNormGrads<T>{at<const T>(grad_out), at<T>(grad_h), at<T>(grad_residual), at<T>(grad_gamma),
                                 at<T>(grad_beta)},
                n_threads);
        });
}

template <typename Element>
void forward_dsr_loss(const DsrLossParams<Element>& p, uintptr_t n_threads) {
    dsr_loss_forward_cpu(p, static_cast<int>(n_threads));
}

template <typename Element>
void backward_dsr_loss(const DsrLossParams<Element>& p, uintptr_t n_threads) {
    dsr_loss_backward_cpu(p, static_cast<int>(n_threads));
}

template <typename Element>
void bind_dsr_loss(Functions& functions, const std::string& dtype) {
    define_dsr_loss<Element, forward_dsr_loss<Element>, backward_dsr_loss<Element>>(functions, dtype);
}

}  // namespace

namespace xrdfast {

template <>
constexpr const char* kObjectName<SimulatedLines> = "SimulatedLines";
template <>
constexpr const char* kObjectName<SimulatedFamilies> = "SimulatedFamilies";

Functions module_functions() {
    Functions functions;
    define(functions, "offsets_rise",
        [](uintptr_t offset, int64_t n, int64_t end) {
        const int64_t* value = at<const int64_t>(offset);
        bool rising = value[0] == 0 && value[n - 1] == end;
        for (int64_t i = 1; i < n; ++i) rising &= value[i] >= value[i - 1];
        return rising;
    });
    define(functions, "simulate_lines",
        [](uintptr_t atom_offset, uintptr_t lattice, uintptr_t atomic_number, uintptr_t fractional,
           uintptr_t occupancy, uintptr_t b_iso, uintptr_t form_factor, uintptr_t dispersion, int64_t n_structures,
           int64_t n_elements, bool mott_bethe, double wavelength, double g_min, double g_max, int n_threads) {
            return object_of(
                simulate_lines_cpu(structures(atom_offset, lattice, atomic_number, fractional, occupancy, b_iso,
                                              form_factor, dispersion, n_structures, n_elements, mott_bethe,
                                              wavelength, g_min, g_max),
                                   n_threads));
        });
    define(functions, "count_lines", [](Held<SimulatedLines> found) { return found.object->n_rows; });
    define(functions, "write_lines",
        [](Held<SimulatedLines> found, uintptr_t offset, uintptr_t two_theta, uintptr_t intensity, uintptr_t d_spacing,
           uintptr_t hkl, uintptr_t status, int n_threads) {
            write_rows(*found.object,
                       {at<int64_t>(offset), at<double>(two_theta), at<double>(intensity), at<double>(d_spacing),
                        at<int16_t>(hkl), at<int32_t>(status)},
                       n_threads);
        });
    define(functions, "simulate_families",
        [](uintptr_t atom_offset, uintptr_t lattice, uintptr_t atomic_number, uintptr_t fractional,
           uintptr_t occupancy, uintptr_t b_iso, uintptr_t form_factor, uintptr_t dispersion, int64_t n_structures,
           int64_t n_elements, bool mott_bethe, double wavelength, double g_min, double g_max,
           uintptr_t rotation_offset, uintptr_t rotations, double relative_cutoff, int n_threads) {
            return object_of(simulate_families_cpu(
                structures(atom_offset, lattice, atomic_number, fractional, occupancy, b_iso, form_factor, dispersion,
                           n_structures, n_elements, mott_bethe, wavelength, g_min, g_max),
                {at<const int64_t>(rotation_offset), at<const int8_t>(rotations), relative_cutoff}, n_threads));
        });
    define(functions, "count_families", [](Held<SimulatedFamilies> found) { return found.object->n_rows; });
    define(functions, "write_families",
        [](Held<SimulatedFamilies> found, uintptr_t offset, uintptr_t hkl, uintptr_t multiplicity, uintptr_t f_squared,
           uintptr_t status, int n_threads) {
            write_rows(*found.object,
                       {at<int64_t>(offset), at<int16_t>(hkl), at<int16_t>(multiplicity), at<float>(f_squared),
                        at<int32_t>(status)},
                       n_threads);
        });
    define(functions, "render_sticks",
        [](uintptr_t offset, uintptr_t hkl, uintptr_t multiplicity, uintptr_t f_squared, uintptr_t reciprocal_metric,
           uintptr_t b_overall, uintptr_t intensity, int64_t hkl_stride, int64_t multiplicity_stride,
           int64_t n_patterns, int64_t n_points, double wavelength, double two_theta_min, double two_theta_step,
           int n_threads) {
            render_sticks_cpu({at<const int64_t>(offset), at<const int16_t>(hkl), at<const int16_t>(multiplicity),
                               at<const float>(f_squared), at<const double>(reciprocal_metric),
                               at<const double>(b_overall), at<float>(intensity), hkl_stride, multiplicity_stride,
                               n_patterns, n_points, wavelength, two_theta_min, two_theta_step},
                              n_threads);
        });
    define(functions, "angles_rise",
        [](uintptr_t offset, uintptr_t two_theta, int64_t n_scans) {
        return angles_rise_cpu(at<const int64_t>(offset), at<const double>(two_theta), n_scans);
    });
    define(functions, "preprocess_scans",
        [](uintptr_t offset, uintptr_t two_theta, uintptr_t intensity, uintptr_t wavelength,
           uintptr_t second_wavelength, uintptr_t pattern, uintptr_t measured, uintptr_t active_count,
           uintptr_t active_patch, int64_t n_scans, int64_t n_points, int64_t smooth_points, double background_width,
           double clip_sigma, bool conserve_area, double model_wavelength, double two_theta_min,
           double two_theta_step, int n_threads) {
            preprocess_scans_cpu({at<const int64_t>(offset), at<const double>(two_theta), at<const float>(intensity),
                                  at<const double>(wavelength), at<const double>(second_wavelength),
                                  at<float>(pattern), at<int32_t>(measured), at<int32_t>(active_count),
                                  at<int16_t>(active_patch), n_scans, n_points, smooth_points, background_width,
                                  clip_sigma, conserve_area, model_wavelength, two_theta_min, two_theta_step},
                                 n_threads);
        });
    bind_peak_attention<float>(functions, "float32");
    bind_peak_attention<double>(functions, "float64");
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
           double clip_sigma, double wavelength, double two_theta_min, double two_theta_step, int n_threads) {
            render_patterns_cpu({at<const int64_t>(offset), at<const int16_t>(hkl), at<const int16_t>(multiplicity),
                                 at<const float>(f_squared), at<const double>(reciprocal_metric),
                                 at<const double>(b_overall), at<const int64_t>(rotation_offset),
                                 at<const int8_t>(rotations), at<const ProfileRow>(profile),
                                 at<const int64_t>(pattern_id), at<float>(intensity), at<int32_t>(active_count),
                                 at<int16_t>(active_patch), hkl_stride, multiplicity_stride, n_patterns, n_points, seed,
                                 clip_sigma, wavelength, two_theta_min, two_theta_step},
                                n_threads);
        });
    define(functions, "match_structures",
        [](uintptr_t amplitude, uintptr_t measured, uintptr_t weight, uintptr_t candidate, uintptr_t line_offset,
           uintptr_t hkl, uintptr_t line_amplitude, uintptr_t metric, uintptr_t metric_change, uintptr_t score,
           uintptr_t fit, int64_t n_scans, int64_t n_points, int64_t n_candidates, double log_q_min, double log_q_step,
           double wavelength, int n_threads) {
            match_structures_cpu({at<const float>(amplitude), at<const int32_t>(measured), at<const float>(weight),
                                  at<const int64_t>(candidate), at<const int64_t>(line_offset), at<const int16_t>(hkl),
                                  at<const float>(line_amplitude), at<const double>(metric),
                                  at<const double>(metric_change), at<float>(score), at<float>(fit), n_scans, n_points,
                                  n_candidates, log_q_min, log_q_step, wavelength},
                                 n_threads);
        });
    return functions;
}

}  // namespace xrdfast
