// preprocess.h: measured scans -> model-ready grid of intensities. Plain C++; no torch, no CUDA headers. What is
// computed is told in xrdfast/ops/preprocess.py.
#pragma once
#include <cstdint>

namespace xrdfast {

constexpr int kMaxHalfWindow = 1000;         // points, of the background's windows
constexpr int64_t kSharedScanPoints = 9264;  // a scan of as many keeps its background in 44 kB of shared memory

struct PreprocessScansParams {
    const int64_t* offset;            // (n_scans + 1), first point of each scan
    const double* two_theta;          // (n_total), degrees, rising within a scan, > 0 and < 180
    const float* intensity;           // (n_total), any unit
    const double* wavelength;         // (n_scans), Angstrom
    const double* second_wavelength;  // (n_scans), K-alpha 2 to take off, > wavelength, or 0
    float* pattern;                   // (n_scans, n_points), maximum 100, or all zero
    int32_t* measured;                // (n_scans, 2), first measured point and the one after the last
    int32_t* active_count;            // (n_scans)
    int16_t* active_patch;            // (n_scans, n_patches), rising, then -1
    int64_t n_scans;
    int64_t n_points;
    int64_t smooth_points;            // odd; 1: no smoothing
    double background_width;          // degrees, the largest half window; 0: no background is taken off
    double clip_sigma;
    bool conserve_area;               // else height
    double model_wavelength;          // Angstrom
    double two_theta_min;             // degrees
    double two_theta_step;            // degrees
};

// Whether the angles of each scan rise and lie between 0 and 180 degrees.
bool angles_rise_cpu(const int64_t* offset, const double* two_theta, int64_t n_scans);

void preprocess_scans_cpu(const PreprocessScansParams& params, int n_threads);

// What the CUDA kernel works in.
struct PreprocessScansScratch {
    float* signal;  // (n_total)
    float* spare;   // (n_total)
    double* axis;   // (n_total)
    float* noise;   // (n_total / 64 + n_scans)
    float* level;   // (2, n_total + 2 kMaxHalfWindow n_scans); null where no scan exceeds kSharedScanPoints
    int64_t n_total;
    int64_t longest;  // points of the longest scan
};

// The same on a device. Returns a cudaError_t as int; `stream` is a cudaStream_t.
int preprocess_scans_cuda(const PreprocessScansParams& params, const PreprocessScansScratch& scratch, void* stream);

}  // namespace xrdfast
