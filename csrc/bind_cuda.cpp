// bind_cuda.cpp: the pybind11 module _cuda and, compiled with the kernels by a C++ compiler against the emulator, _emu
// for the tests: raw device addresses and sizes in, nothing else. Checks and allocation live in Python (xrdfast/ops);
// neither torch nor CUDA headers, so the C++ compiler alone makes it.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "preprocess.h"
#include "render.h"
#include "simulate.h"

#ifndef XRDFAST_MODULE
#define XRDFAST_MODULE _cuda
#endif

namespace py = pybind11;
using namespace xrdfast;

namespace {

template <typename T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

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

}  // namespace

PYBIND11_MODULE(XRDFAST_MODULE, m) {
    m.doc() = "xrdfast native kernels for CUDA devices; call them through xrdfast.ops";
    const py::call_guard<py::gil_scoped_release> unlocked;
    m.def(
        "count_reflections",
        [](uintptr_t lattice, int64_t n_structures, double g_min, double g_max, uintptr_t count, uintptr_t status,
           uintptr_t stream) {
            const StructureBatch batch = lattices(lattice, n_structures, g_min, g_max);
            check("count_reflections",
                  count_reflections_cuda(batch, at<int64_t>(count), at<int32_t>(status), at<void>(stream)));
        },
        unlocked);
    m.def(
        "list_reflections",
        [](uintptr_t lattice, int64_t n_structures, double g_min, double g_max, uintptr_t offset,
           int64_t n_reflections, uintptr_t hkl, uintptr_t g2, uintptr_t stream) {
            const ReflectionList list{at<const int64_t>(offset), n_reflections, at<int16_t>(hkl), at<double>(g2),
                                      nullptr};
            check("list_reflections",
                  list_reflections_cuda(lattices(lattice, n_structures, g_min, g_max), list, at<void>(stream)));
        },
        unlocked);
    m.def(
        "structure_factors",
        [](uintptr_t atom_offset, uintptr_t lattice, uintptr_t atomic_number, uintptr_t fractional,
           uintptr_t occupancy, uintptr_t b_iso, uintptr_t form_factor, uintptr_t dispersion, int64_t n_structures,
           int64_t n_elements, bool mott_bethe, double wavelength, double g_min, double g_max, uintptr_t offset,
           int64_t n_reflections, uintptr_t hkl, uintptr_t g2, uintptr_t f_squared, uintptr_t stream) {
            const StructureBatch batch{at<const int64_t>(atom_offset),
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
            const ReflectionList list{at<const int64_t>(offset), n_reflections, at<int16_t>(hkl), at<double>(g2),
                                      at<double>(f_squared)};
            check("structure_factors", structure_factors_cuda(batch, list, at<void>(stream)));
        },
        unlocked);
    m.def(
        "name_families",
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
        },
        unlocked);
    m.def(
        "render_sticks",
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
        },
        unlocked);
    m.def(
        "preprocess_scans",
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
        },
        unlocked);
}
