// retrieval.cpp: CPU scoring of candidate structures against measured patterns.
//
// One scan at a time. Its amplitudes are blurred to three widths. The cell of each candidate is strained isotropically
// over a grid at the widest, then along all strains that keep its symmetry, the zero shift with them, by mean shift
// from wide to narrow: every line is drawn to what was measured near it, and a ridge regression over all lines moves
// the parameters. The score is the cosine between the narrowest and what the fitted cell predicts.
#include "retrieval.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "reflection_math.h"
#include "thread_own.h"

namespace xrdfast {
namespace {

constexpr int kLevels = 3;
constexpr double kBlur[kLevels] = {0.006, 0.003, 0.0015};  // standard deviations in ln q
constexpr int kSteps[] = {0, 0, 1, 1, 2, 2, 2};            // level of each step of the fit
constexpr double kTruncation = 3.0;                        // standard deviations that a blur reaches
constexpr int kStrains = 25;                               // of the isotropic search, on either side of none
constexpr double kStrainStep = 0.002;
constexpr double kIsotropicSlope = -0.57735026918962576451;  // of ln q with the first strain
// What is expected of a fit, as standard deviations, and how many lines' worth of evidence stand against it.
constexpr double kIsotropicStrain = 0.02, kOtherStrain = 0.006, kZeroShift = 0.05;
constexpr double kEvidence = 8.0;
constexpr double kLineWidth = 0.06;           // degrees 2theta, standard deviation of a line's amplitude
constexpr double kHalfDegree = 0.5 / kDegrees;  // radians of theta in a degree of 2theta
constexpr double kMinSin2 = 1e-4, kMaxSin2 = 0.999;  // of theta, so that widths stay finite
constexpr float kReach = 4.0f;                       // standard deviations that a line reaches

struct Workspace {
    std::vector<float> level[kLevels];  // (n_points + 1), a zero after the last point
    std::vector<float> kernel, padded, model;
    // Lines of the candidate: power of intensity, place on the axis in points, width in ln q, slope of ln q with
    // each parameter.
    int n_strains = 0;
    std::vector<float> amplitude, position, width, slope[kFitParameters];
    std::vector<float> weight, stiffness, pull;  // of a step of the fit
};

XRDFAST_CLONES void blur(const float* from, int64_t n, double sigma, Workspace& w, std::vector<float>& to) {
    const int64_t reach = static_cast<int64_t>(std::ceil(kTruncation * sigma));
    w.kernel.resize(2 * reach + 1);
    double sum = 0.0;
    for (int64_t i = -reach; i <= reach; ++i) sum += std::exp(-0.5 * (i / sigma) * (i / sigma));
    for (int64_t i = -reach; i <= reach; ++i)
        w.kernel[i + reach] = static_cast<float>(std::exp(-0.5 * (i / sigma) * (i / sigma)) / sum);
    w.padded.assign(n + 2 * reach, 0.0f);
    std::copy(from, from + n, w.padded.begin() + reach);
    to.assign(n + 1, 0.0f);
    float* __restrict out = to.data();
    for (int64_t k = 0; k <= 2 * reach; ++k) {
        const float share = w.kernel[k];
        const float* __restrict in = w.padded.data() + k;
        for (int64_t i = 0; i < n; ++i) out[i] += share * in[i];
    }
}

XRDFAST_CLONES void set_up(const MatchStructuresParams& p, int64_t structure, Workspace& w) {
    const int64_t begin = p.line_offset[structure], n = p.line_offset[structure + 1] - begin;
    const double* m = p.metric + 6 * structure;
    const double* change = p.metric_change + 36 * structure;
    const auto is_zero = [](double x) { return x == 0.0; };
    w.n_strains = 0;
    while (w.n_strains < 6 && !std::all_of(change + 6 * w.n_strains, change + 6 * w.n_strains + 6, is_zero))
        ++w.n_strains;
    w.amplitude.assign(p.line_amplitude + begin, p.line_amplitude + begin + n);
    for (auto* v : {&w.position, &w.width, &w.weight, &w.stiffness, &w.pull}) v->resize(n);
    for (int k = 0; k <= w.n_strains; ++k) w.slope[k].resize(n);
    const double quarter_wavelength2 = 0.25 * p.wavelength * p.wavelength;
    for (int64_t i = 0; i < n; ++i) {
        const int16_t* hkl = p.hkl + 3 * (begin + i);
        const double h = hkl[0], k = hkl[1], l = hkl[2];
        const double products[6] = {h * h, k * k, l * l, 2 * k * l, 2 * h * l, 2 * h * k};
        double q2 = 0.0;
        for (int j = 0; j < 6; ++j) q2 += products[j] * m[j];
        const bool there = q2 > 0.0 && std::isfinite(q2);
        if (!there) w.amplitude[i] = 0.0f;
        q2 = there ? q2 : 1.0;
        for (int s = 0; s < w.n_strains; ++s) {
            double moved = 0.0;
            for (int j = 0; j < 6; ++j) moved += products[j] * change[6 * s + j];
            w.slope[s][i] = static_cast<float>(0.5 * moved / q2);
        }
        const double sin2 = std::min(std::max(quarter_wavelength2 * q2, kMinSin2), kMaxSin2);
        const double shifted = kHalfDegree * std::sqrt(1.0 / sin2 - 1.0);
        w.slope[w.n_strains][i] = static_cast<float>(shifted);
        w.width[i] = static_cast<float>(kLineWidth * shifted);
        w.position[i] = static_cast<float>((0.5 * std::log(q2) - p.log_q_min) / p.log_q_step);
    }
}

// The isotropic strain of ln q, of those on the grid, at which most of the measured lies on lines.
XRDFAST_CLONES double search(const Workspace& w, double step) {
    const int64_t n = static_cast<int64_t>(w.position.size());
    const std::vector<float>& level = w.level[0];
    const float last = static_cast<float>(level.size() - 1);
    const float *amplitude = w.amplitude.data(), *position = w.position.data(), *y = level.data();
    float best = -1.0f;
    double strain = 0.0;
    for (int s = -kStrains; s <= kStrains; ++s) {
        const float shift = static_cast<float>(s * kStrainStep / step) + 0.5f;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < n; ++i) {
            const float at = position[i] + shift;
            const bool inside = at >= 0.0f && at < last;
            const float there = y[static_cast<int32_t>(inside ? at : last)];  // zero beyond the ends
            sum += amplitude[i] * there;
        }
        if (sum > best) best = sum, strain = s * kStrainStep;
    }
    return strain;
}

// Solves a x = b, a symmetric and positive definite, by Cholesky; x replaces b.
void solve(int n, double (*a)[kFitParameters], double* b) {
    for (int i = 0; i < n; ++i)
        for (int j = 0; j <= i; ++j) {
            double sum = a[i][j];
            for (int k = 0; k < j; ++k) sum -= a[i][k] * a[j][k];
            a[i][j] = i == j ? std::sqrt(sum) : sum / a[j][j];
        }
    for (int i = 0; i < n; ++i) {
        for (int k = 0; k < i; ++k) b[i] -= a[i][k] * b[k];
        b[i] /= a[i][i];
    }
    for (int i = n - 1; i >= 0; --i) {
        for (int k = i + 1; k < n; ++k) b[i] -= a[k][i] * b[k];
        b[i] /= a[i][i];
    }
}

// Displacement of line i in ln q.
XRDFAST_INLINE float displacement(const Workspace& w, const float* fit, int64_t i) {
    float moved = 0.0f;
    for (int k = 0; k <= w.n_strains; ++k) moved += fit[k] * w.slope[k][i];
    return moved;
}

// One step of mean shift.
//   minimise over x   kEvidence / sum(W) sum W ((v Y'/Y + j.fit - j.x)^2 / v)  +  sum (x / expected)^2
// with Y the level at a line, W = amplitude Y, v = sigma^2 + width^2, j the line's slopes.
XRDFAST_CLONES void refine(Workspace& w, const std::vector<float>& level, double sigma, double step, float* fit) {
    const int n = w.n_strains + 1;
    const int64_t n_lines = static_cast<int64_t>(w.position.size());
    const float last = static_cast<float>(level.size() - 2);
    const float variance = static_cast<float>(sigma * sigma), per_point = static_cast<float>(1.0 / step);
    const float* y = level.data();
    float *weight = w.weight.data(), *stiffness = w.stiffness.data(), *pull = w.pull.data();
    float total = 0.0f;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n_lines; ++i) {
        const float moved = displacement(w, fit, i), at = w.position[i] + moved * per_point;
        const bool inside = at >= 0.0f && at < last;
        const int32_t left = static_cast<int32_t>(inside ? at : 0.0f);
        const float rise = y[left + 1] - y[left], here = y[left] + (at - static_cast<float>(left)) * rise;
        const float present = inside ? w.amplitude[i] : 0.0f;
        weight[i] = inside ? present * here : 0.0f;
        stiffness[i] = weight[i] / (variance + w.width[i] * w.width[i]);
        pull[i] = present * rise * per_point + stiffness[i] * moved;
        total += weight[i];
    }
    if (!(total > 0.0f)) return;
    double a[kFitParameters][kFitParameters], b[kFitParameters];
    const double scale = kEvidence / total;
    for (int k = 0; k < n; ++k) {
        const float* own = w.slope[k].data();
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < n_lines; ++i) sum += pull[i] * own[i];
        b[k] = scale * sum;
        for (int m = 0; m <= k; ++m) {
            const float* other = w.slope[m].data();
            float product = 0.0f;
#pragma omp simd reduction(+ : product)
            for (int64_t i = 0; i < n_lines; ++i) product += stiffness[i] * own[i] * other[i];
            a[k][m] = scale * product;
        }
        const double expected = k == w.n_strains ? kZeroShift : k == 0 ? kIsotropicStrain : kOtherStrain;
        a[k][k] += 1.0 / (expected * expected);
    }
    solve(n, a, b);
    for (int k = 0; k < n; ++k) fit[k] = static_cast<float>(b[k]);
}

// Cosine between the narrowest level and the lines where the fit puts them, each blurred as much; where lines overlap
// their squares add up.
XRDFAST_CLONES float cosine(const MatchStructuresParams& p, const float* fit, int64_t first, int64_t end, float norm2,
                            Workspace& w) {
    w.model.assign(p.n_points, 0.0f);
    float* __restrict model = w.model.data();
    const float sigma2 = static_cast<float>(kBlur[kLevels - 1] * kBlur[kLevels - 1]);
    const float per_point = static_cast<float>(1.0 / p.log_q_step);
    for (int64_t i = 0; i < static_cast<int64_t>(w.position.size()); ++i) {
        const float at = w.position[i] + displacement(w, fit, i) * per_point;
        const float width = std::sqrt(sigma2 + w.width[i] * w.width[i]), reach = kReach * width * per_point;
        if (!(at + reach > static_cast<float>(first) && at - reach < static_cast<float>(end))) continue;
        const int64_t from = std::max(first, static_cast<int64_t>(std::ceil(at - reach)));
        const int64_t to = std::min(end, static_cast<int64_t>(std::floor(at + reach)) + 1);
        const float height = w.amplitude[i] * w.width[i] / width, intensity = height * height, scale = 1.0f / reach;
        for (int64_t x = from; x < to; ++x) {
            const float t = (static_cast<float>(x) - at) * scale;
            const float k = std::max(1.0f - t * t, 0.0f), k2 = k * k, k4 = k2 * k2, k8 = k4 * k4;
            model[x] += intensity * k8 * k8;  // (1 - t^2)^16, near exp(-16 t^2): a Gaussian's square
        }
    }
    float dot = 0.0f, own2 = 0.0f;
    const float *y = w.level[kLevels - 1].data(), *weight = p.weight;
#pragma omp simd reduction(+ : dot, own2)
    for (int64_t i = first; i < end; ++i) {
        dot += weight[i] * y[i] * std::sqrt(model[i]);
        own2 += weight[i] * model[i];
    }
    const float product = norm2 * own2;
    return product > 0.0f ? dot / std::sqrt(product) : 0.0f;
}

void match_scan(const MatchStructuresParams& p, int64_t scan, Workspace& w) {
    for (int k = 0; k < kLevels; ++k)
        blur(p.amplitude + scan * p.n_points, p.n_points, kBlur[k] / p.log_q_step, w, w.level[k]);
    const int64_t first = p.measured[2 * scan], end = p.measured[2 * scan + 1];
    const std::vector<float>& narrow = w.level[kLevels - 1];
    float norm2 = 0.0f;
    for (int64_t i = first; i < end; ++i) norm2 += p.weight[i] * narrow[i] * narrow[i];
    for (int64_t row = scan * p.n_candidates; row < (scan + 1) * p.n_candidates; ++row) {
        float* fit_out = p.fit + kFitParameters * row;
        std::fill(fit_out, fit_out + kFitParameters, 0.0f);
        p.score[row] = -1.0f;
        if (p.candidate[row] < 0) continue;
        set_up(p, p.candidate[row], w);
        float fit[kFitParameters] = {static_cast<float>(search(w, p.log_q_step) / kIsotropicSlope)};
        for (const int level : kSteps) refine(w, w.level[level], kBlur[level], p.log_q_step, fit);
        p.score[row] = cosine(p, fit, first, end, norm2, w);
        std::copy(fit, fit + w.n_strains, fit_out);
        fit_out[kFitParameters - 1] = fit[w.n_strains];
    }
}

}  // namespace

void match_structures_cpu(const MatchStructuresParams& params, int n_threads) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(n_threads) if (params.n_scans > 1 && n_threads > 1)
    for (int64_t scan = 0; scan < params.n_scans; ++scan) {
        Workspace& workspace = thread_own<Workspace>();
        match_scan(params, scan, workspace);
    }
}

}  // namespace xrdfast
