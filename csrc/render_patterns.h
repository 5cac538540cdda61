// render_patterns.h: reflection families -> patterns as measured and preprocessed, with noise. Plain C++; no torch, no
// CUDA headers. What is computed is told in xrdfast/ops/render_patterns.py.
#pragma once
#include <cstdint>

#include "active_patches.h"
#include "line_profile.h"

namespace xrdfast {

constexpr int kMaxRotations = 192;  // of a pattern: 48 and, should a store hold centrings, four of each

struct RenderPatternsParams {
    const int64_t* offset;            // (n_patterns + 1), first family of each pattern
    const int16_t* hkl;               // (n_families, 3), rows hkl_stride apart
    const int16_t* multiplicity;      // (n_families), multiplicity_stride apart
    const float* f_squared;           // (n_families), |F|^2 without LP
    const double* reciprocal_metric;  // (n_patterns, 6): a*.a*, b*.b*, c*.c*, b*.c*, a*.c*, a*.b*, 1 / Angstrom^2
    const double* b_overall;          // (n_patterns), Angstrom^2
    const int64_t* rotation_offset;   // (n_patterns + 1), at most kMaxRotations apart
    const int8_t* rotations;          // (n_rotations, 3, 3)
    const ProfileRow* profile;        // (n_patterns)
    const int64_t* pattern_id;        // (n_patterns)
    float* intensity;                 // (n_patterns, n_points), maximum 100, counts where they stay, or all zero
    int32_t* active_count;            // (n_patterns)
    int16_t* active_patch;            // (n_patterns, n_patches), rising, then -1
    int64_t hkl_stride;               // elements
    int64_t multiplicity_stride;      // elements
    int64_t n_patterns;
    int64_t n_points;
    int64_t seed;
    double clip_sigma;                // < 0: counts as a detector gives them, background and all
    double wavelength;                // Angstrom
    double two_theta_min;             // degrees
    double two_theta_step;            // degrees
};

void render_patterns_cpu(const RenderPatternsParams& params, int n_threads);

// What the CUDA kernel works in.
struct RenderPatternsScratch {
    double* g2;      // (n_families)
    double* weight;  // (n_families)
    Line* line;      // (2 n_families + 2 kMaxImpurities n_patterns)
    float* peaks;    // (n_patterns, n_points)
};

// The same on a device. Returns a cudaError_t as int; `stream` is a cudaStream_t.
int render_patterns_cuda(const RenderPatternsParams& params, const RenderPatternsScratch& scratch, void* stream);

}  // namespace xrdfast
