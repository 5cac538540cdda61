// bind_params.h: structs that both pybind11 modules make from the same addresses and numbers.
#pragma once
#include "bind.h"
#include "peak_norm.h"
#include "simulate.h"

namespace xrdfast {

inline StructureBatch structures(uintptr_t atom_offset, uintptr_t lattice, uintptr_t atomic_number,
                                 uintptr_t fractional, uintptr_t occupancy, uintptr_t b_iso, uintptr_t form_factor,
                                 uintptr_t dispersion, int64_t n_structures, int64_t n_elements, bool mott_bethe,
                                 double wavelength, double g_min, double g_max) {
    return {at<const int64_t>(atom_offset),
            at<const double>(lattice),
            at<const uint8_t>(atomic_number),
            at<const double>(fractional),
            at<const double>(occupancy),
            at<const double>(b_iso),
            at<const double>(form_factor),
            at<const double>(dispersion),
            n_structures,
            n_elements,
            mott_bethe,
            wavelength,
            g_min,
            g_max};
}

template <typename T>
PeakNormParams<T> peak_norm_params(uintptr_t h, uintptr_t residual, uintptr_t gamma, uintptr_t beta, uintptr_t count,
                                   uintptr_t take, uintptr_t mean, uintptr_t var, int64_t n_rows, int64_t n_rows_out,
                                   int64_t n_channels, int64_t n_touched, int n_take, bool maximum, bool batch,
                                   double eps, double total) {
    return {at<const T>(h),       at<const T>(residual), at<const T>(gamma), at<const T>(beta), at<const float>(count),
            at<const int32_t>(take), at<T>(mean),        at<T>(var),         n_rows,            n_rows_out,
            n_channels,           n_touched,             n_take,             maximum,           batch,
            eps,                  total};
}

}  // namespace xrdfast
