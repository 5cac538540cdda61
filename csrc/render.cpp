// render.cpp: CPU rendering of reflection families as sticks.
//
// One pattern at a time, in one pass: angle, Lorentz-polarisation and overall B of every family (SIMD over families),
// a radix sort by line key, and a walk over the lines that writes bins. Floors and what is reached:
// benchmarks/NOTES.md.
#include "render.h"

#include <algorithm>

#include "reflection_math.h"
#include "thread_own.h"

namespace xrdfast {
namespace {

struct Workspace {
    std::vector<double> h, k, l;  // (n) converted indices
    std::vector<double> weight;   // (n) multiplicity |F|^2
    std::vector<double> two_theta, strength;
    std::vector<uint32_t> key;
    KeySorter sorter;

    void resize(int64_t n) {
        for (auto* v : {&h, &k, &l, &weight, &two_theta, &strength}) v->resize(n);
        key.resize(n);
    }
};

XRDFAST_CLONES void family_lines(int64_t n, const double* __restrict metric, double quarter_wavelength2, double half_b,
                                 double two_theta_min, double two_theta_max, Workspace& ws) {
    const double *h = ws.h.data(), *k = ws.k.data(), *l = ws.l.data(), *weight = ws.weight.data();
    double *__restrict angle_out = ws.two_theta.data(), *__restrict strength = ws.strength.data();
    uint32_t* __restrict key = ws.key.data();
    const double m0 = metric[0], m1 = metric[1], m2 = metric[2];
    const double m3 = 2 * metric[3], m4 = 2 * metric[4], m5 = 2 * metric[5];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const double g2 = h[i] * (h[i] * m0 + k[i] * m5 + l[i] * m4) + k[i] * (k[i] * m1 + l[i] * m3) + l[i] * l[i] * m2;
        const double x = g2 * quarter_wavelength2;
        const bool reachable = x > 0.0 && x < 1.0;
        const double sin2 = reachable ? x : 0.5;
        const double angle = two_theta_of(sin2);
        const bool inside = reachable && angle >= two_theta_min && angle < two_theta_max;
        angle_out[i] = angle;
        strength[i] = weight[i] * lorentz_polarisation(sin2) * exp_nonpositive(-half_b * g2);
        key[i] = inside ? merge_key(angle) : kOutsideKey;
    }
}

void render_pattern(const RenderSticksParams& p, int64_t pattern, Workspace& ws) {
    float* out = p.intensity + pattern * p.n_points;
    std::memset(out, 0, static_cast<size_t>(p.n_points) * sizeof(float));
    const int64_t begin = p.offset[pattern], n = p.offset[pattern + 1] - begin;
    ws.resize(n);
    const int16_t* hkl = p.hkl + begin * p.hkl_stride;
    const int16_t* multiplicity = p.multiplicity + begin * p.multiplicity_stride;
    for (int64_t i = 0; i < n; ++i) {
        ws.h[i] = hkl[i * p.hkl_stride];
        ws.k[i] = hkl[i * p.hkl_stride + 1];
        ws.l[i] = hkl[i * p.hkl_stride + 2];
        ws.weight[i] = static_cast<double>(p.f_squared[begin + i]) * multiplicity[i * p.multiplicity_stride];
    }
    const double two_theta_max = p.two_theta_min + p.two_theta_step * static_cast<double>(p.n_points);
    family_lines(n, p.reciprocal_metric + 6 * pattern, 0.25 * p.wavelength * p.wavelength,
                 0.5 * p.b_overall[pattern], p.two_theta_min, two_theta_max, ws);
    const uint32_t* order = ws.sorter.sort(ws.key.data(), n);
    // h and k have served; the lines' angles and strengths take their room.
    int64_t n_lines = 0;
    double strongest = 0.0;
    uint32_t previous = kOutsideKey;
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t index = order[i], key = ws.key[index];
        if (key == kOutsideKey) break;
        if (key != previous) {
            ws.h[n_lines] = ws.two_theta[index];
            ws.k[n_lines++] = ws.strength[index];
            previous = key;
        } else {
            ws.h[n_lines - 1] = std::min(ws.h[n_lines - 1], ws.two_theta[index]);
            ws.k[n_lines - 1] += ws.strength[index];
        }
        const double sum = ws.k[n_lines - 1];
        strongest = strongest >= sum || strongest != strongest ? strongest : sum;  // NaN stays
    }
    if (!(strongest > 0.0) || !std::isfinite(strongest)) return;
    const double scale = 100.0 / strongest, points_a_degree = 1.0 / p.two_theta_step;
    for (int64_t line = 0; line < n_lines; ++line) {
        const double scaled = ws.k[line] * scale;
        if (!(scaled > kMinScaledIntensity)) continue;
        const int64_t bin = static_cast<int64_t>((ws.h[line] - p.two_theta_min) * points_a_degree);
        if (bin < p.n_points) out[bin] = std::max(out[bin], static_cast<float>(scaled));
    }
}

}  // namespace

void render_sticks_cpu(const RenderSticksParams& params, int n_threads) {
#pragma omp parallel for schedule(dynamic, 4) num_threads(n_threads) if (params.n_patterns > 4 && n_threads > 1)
    for (int64_t i = 0; i < params.n_patterns; ++i) {
        Workspace& ws = thread_own<Workspace>();
        render_pattern(params, i, ws);
    }
}

}  // namespace xrdfast
