// retrieval.h: measured patterns against known structures whose cells may strain. Plain C++; no torch. CPU only: a scan's
// work is a few hundred candidates of some hundred lines each, small, branching and ragged.
#pragma once
#include <cstdint>

namespace xrdfast {

constexpr int kFitParameters = 7;  // six strains, the first isotropic, and the zero shift

struct MatchStructuresParams {
    const float* amplitude;       // (n_scans, n_points), a power of intensity on an even axis of ln q
    const int32_t* measured;      // (n_scans, 2), first measured point and the one after the last
    const float* weight;          // (n_points), of each point in the score
    const int64_t* candidate;     // (n_scans, n_candidates), structures to try; < 0 for none
    const int64_t* line_offset;   // (n_structures + 1), first line of each structure
    const int16_t* hkl;           // (n_lines, 3)
    const float* line_amplitude;  // (n_lines), the same power of intensity, any scale
    const double* metric;         // (n_structures, 6): a*.a*, b*.b*, c*.c*, b*.c*, a*.c*, a*.b*, 1 / Angstrom^2
    const double* metric_change;  // (n_structures, 6, 6): of the metric with each free strain, rows, then zeros; the
                                  // first strain is isotropic, 1 / sqrt(3) along every axis
    float* score;                 // (n_scans, n_candidates), 0..1; -1 for none
    float* fit;                   // (n_scans, n_candidates, kFitParameters): strains, then degrees of zero shift
    int64_t n_scans;
    int64_t n_points;
    int64_t n_candidates;
    double log_q_min;   // of the first point, q = 1 / d in 1 / Angstrom
    double log_q_step;
    double wavelength;  // Angstrom, of the axis on which a shift of zero is a shift of 2theta
};

// Blurs every scan, fits every candidate's cell and zero shift to it, and scores the result.
void match_structures_cpu(const MatchStructuresParams& params, int n_threads);

}  // namespace xrdfast
