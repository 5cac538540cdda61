// bind_cpu.cpp: the pybind11 module _cpu: raw addresses and sizes in, nothing else. Checks and allocation live in
// Python (xrdfast/ops); no torch header, so it compiles in seconds and one build serves every torch version.
#include <pybind11/pybind11.h>

#include "preprocess.h"
#include "render.h"
#include "simulate.h"

namespace py = pybind11;
using namespace xrdfast;

namespace {

template <typename T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

StructureBatch structures(uintptr_t atom_offset, uintptr_t lattice, uintptr_t atomic_number, uintptr_t fractional,
                          uintptr_t occupancy, uintptr_t b_iso, uintptr_t form_factor, uintptr_t dispersion,
                          int64_t n_structures, int64_t n_elements, bool mott_bethe, double wavelength, double g_min,
                          double g_max) {
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

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "xrdfast native kernels for CPUs; call them through xrdfast.ops";
    m.def("offsets_rise", [](uintptr_t offset, int64_t n, int64_t end) {
        const int64_t* value = at<const int64_t>(offset);
        bool rising = value[0] == 0 && value[n - 1] == end;
        for (int64_t i = 1; i < n; ++i) rising &= value[i] >= value[i - 1];
        return rising;
    });
    m.def(
        "reflection_capacity",
        [](uintptr_t lattice, int64_t n_structures, double g_max, uintptr_t capacity_offset) {
            return reflection_capacity_cpu(at<const double>(lattice), n_structures, g_max, at<int64_t>(capacity_offset));
        },
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "simulate_lines",
        [](uintptr_t atom_offset, uintptr_t lattice, uintptr_t atomic_number, uintptr_t fractional,
           uintptr_t occupancy, uintptr_t b_iso, uintptr_t form_factor, uintptr_t dispersion, int64_t n_structures,
           int64_t n_elements, bool mott_bethe, double wavelength, double g_min, double g_max,
           uintptr_t capacity_offset, uintptr_t offset, uintptr_t two_theta, uintptr_t intensity, uintptr_t d_spacing,
           uintptr_t hkl, uintptr_t status, int n_threads) {
            return simulate_lines_cpu(structures(atom_offset, lattice, atomic_number, fractional, occupancy, b_iso,
                                          form_factor, dispersion, n_structures, n_elements, mott_bethe, wavelength,
                                          g_min, g_max),
                               {at<const int64_t>(capacity_offset), at<int64_t>(offset), at<double>(two_theta),
                                at<double>(intensity), at<double>(d_spacing), at<int16_t>(hkl), at<int32_t>(status)},
                               n_threads);
        },
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "simulate_families",
        [](uintptr_t atom_offset, uintptr_t lattice, uintptr_t atomic_number, uintptr_t fractional,
           uintptr_t occupancy, uintptr_t b_iso, uintptr_t form_factor, uintptr_t dispersion, int64_t n_structures,
           int64_t n_elements, bool mott_bethe, double wavelength, double g_min, double g_max,
           uintptr_t capacity_offset, uintptr_t rotation_offset, uintptr_t rotations, double relative_cutoff,
           uintptr_t offset, uintptr_t hkl, uintptr_t multiplicity, uintptr_t f_squared, uintptr_t status,
           int n_threads) {
            return simulate_families_cpu(
                structures(atom_offset, lattice, atomic_number, fractional, occupancy, b_iso, form_factor, dispersion,
                           n_structures, n_elements, mott_bethe, wavelength, g_min, g_max),
                {at<const int64_t>(capacity_offset), at<const int64_t>(rotation_offset), at<const int8_t>(rotations),
                 relative_cutoff, at<int64_t>(offset), at<int16_t>(hkl), at<int16_t>(multiplicity),
                 at<float>(f_squared), at<int32_t>(status)},
                n_threads);
        },
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "render_sticks",
        [](uintptr_t offset, uintptr_t hkl, uintptr_t multiplicity, uintptr_t f_squared, uintptr_t reciprocal_metric,
           uintptr_t b_overall, uintptr_t intensity, int64_t hkl_stride, int64_t multiplicity_stride,
           int64_t n_patterns, int64_t n_points, double wavelength, double two_theta_min, double two_theta_step,
           int n_threads) {
            render_sticks_cpu({at<const int64_t>(offset), at<const int16_t>(hkl), at<const int16_t>(multiplicity),
                               at<const float>(f_squared), at<const double>(reciprocal_metric),
                               at<const double>(b_overall), at<float>(intensity), hkl_stride, multiplicity_stride,
                               n_patterns, n_points, wavelength, two_theta_min, two_theta_step},
                              n_threads);
        },
        py::call_guard<py::gil_scoped_release>());
    m.def("angles_rise", [](uintptr_t offset, uintptr_t two_theta, int64_t n_scans) {
        return angles_rise_cpu(at<const int64_t>(offset), at<const double>(two_theta), n_scans);
    });
    m.def(
        "preprocess_scans",
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
        },
        py::call_guard<py::gil_scoped_release>());
}
