// render.h: reflection families -> model-ready grid of intensities. Plain C++; no torch, no CUDA headers.
#pragma once
#include <cstdint>

namespace xrdfast {

struct RenderSticksParams {
    const int64_t* offset;            // (n_patterns + 1), first family of each pattern
    const int16_t* hkl;               // (n_families, 3), rows hkl_stride apart
    const int16_t* multiplicity;      // (n_families), multiplicity_stride apart
    const float* f_squared;           // (n_families), |F|^2 without LP
    const double* reciprocal_metric;  // (n_patterns, 6): a*.a*, b*.b*, c*.c*, b*.c*, a*.c*, a*.b*, 1 / Angstrom^2
    const double* b_overall;          // (n_patterns), Angstrom^2
    float* intensity;                 // (n_patterns, n_points), maximum 100, or all zero
    int64_t hkl_stride;               // elements
    int64_t multiplicity_stride;      // elements
    int64_t n_patterns;
    int64_t n_points;
    double wavelength;                // Angstrom
    double two_theta_min;             // degrees
    double two_theta_step;            // degrees
};

// Coincident lines add up, lines below kMinScaledIntensity go, then each bin keeps its strongest line.
void render_sticks_cpu(const RenderSticksParams& params, int n_threads);

// What the CUDA kernel works in; all are (n_families).
struct RenderSticksScratch {
    double* two_theta;
    double* strength;
    int32_t* order;
};

// The same on a device. Returns a cudaError_t as int; `stream` is a cudaStream_t.
int render_sticks_cuda(const RenderSticksParams& params, const RenderSticksScratch& scratch, void* stream);

}  // namespace xrdfast
