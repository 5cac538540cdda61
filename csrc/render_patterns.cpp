// render_patterns.cpp: CPU rendering of reflection families as measured and preprocessed patterns.
//
// One pattern at a time, in a workspace that stays in cache: families (SIMD over families), lines (SIMD over points, in
// whole blocks of kLineBlock), counts (SIMD over points), clip and patches. Everything a count depends on is the same
// to the last bit as on a GPU (portable_math.h). Floors and what is reached: benchmarks/NOTES.md.
#include "render_patterns.h"

#include <algorithm>

#include "reflection_math.h"
#include "significance.h"
#include "thread_own.h"

// Tuned for a CPU with AVX-512, gcc still prefers vectors of half the width; these loops gain from the whole.
#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__) && !defined(XRDFAST_AOT)
#define XRDFAST_WIDE __attribute__((target("prefer-vector-width=512")))
#else
#define XRDFAST_WIDE XRDFAST_CLONES
#endif

namespace xrdfast {
namespace {

struct Workspace {
    std::vector<double> h, k, l, g2, weight;    // (n_families)
    std::vector<double> sin2, two_theta, area;  // (n_wavelengths, n_families)
    std::vector<Line> lines;
    std::vector<float> peaks, signal;  // (n_points), padded to whole noise blocks
    std::vector<float> noise;          // (blocks of significance)

    void resize(int64_t n_families, int64_t n_points) {
        for (auto* v : {&h, &k, &l, &g2, &weight}) v->resize(n_families);
        for (auto* v : {&sin2, &two_theta, &area}) v->resize(2 * n_families);
        lines.clear();
        const int64_t padded = (n_points + kNoiseBlock - 1) / kNoiseBlock * kNoiseBlock;
        peaks.assign(padded, 0.0f);
        signal.resize(padded);
    }
};

// 1 / d^2, and |F|^2 with multiplicity times the overall displacement factor.
XRDFAST_CLONES void damp_families(int64_t n, const double* __restrict metric, double half_b, Workspace& ws) {
    const double *h = ws.h.data(), *k = ws.k.data(), *l = ws.l.data();
    double *__restrict g2_out = ws.g2.data(), *__restrict weight = ws.weight.data();
    const double m0 = metric[0], m1 = metric[1], m2 = metric[2];
    const double m3 = 2 * metric[3], m4 = 2 * metric[4], m5 = 2 * metric[5];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const double g2 =
            h[i] * (h[i] * m0 + k[i] * m5 + l[i] * m4) + k[i] * (k[i] * m1 + l[i] * m3) + l[i] * l[i] * m2;
        g2_out[i] = g2;
        weight[i] *= exp_nonpositive(-half_b * g2);
    }
}

// March-Dollase mean over the images of the axis under the rotations, equal ones up to sign taken together.
struct AxisImages {
    double vector[kMaxRotations][3];  // G* times the image over its length
    double share[kMaxRotations];
    int n;
};

AxisImages axis_images(const double* axis, const int8_t* rotations, int64_t n_rotations, const double* m) {
    AxisImages images;
    images.n = 0;
    double seen[kMaxRotations][3];
    const double total = static_cast<double>(std::max<int64_t>(n_rotations, 1));
    for (int64_t r = 0; r < std::max<int64_t>(n_rotations, 1); ++r) {
        double v[3];
        for (int i = 0; i < 3; ++i)
            v[i] = n_rotations == 0 ? axis[i]
                                    : axis[0] * rotations[9 * r + i] + axis[1] * rotations[9 * r + 3 + i] +
                                          axis[2] * rotations[9 * r + 6 + i];
        int at = 0;
        for (; at < images.n; ++at) {
            const double* s = seen[at];
            if (v[0] == s[0] && v[1] == s[1] && v[2] == s[2]) break;
            if (v[0] == -s[0] && v[1] == -s[1] && v[2] == -s[2]) break;
        }
        if (at < images.n) {
            images.share[at] += 1.0 / total;
            continue;
        }
        const double g[3] = {m[0] * v[0] + m[5] * v[1] + m[4] * v[2], m[5] * v[0] + m[1] * v[1] + m[3] * v[2],
                             m[4] * v[0] + m[3] * v[1] + m[2] * v[2]};
        const double scale = 1.0 / std::sqrt(g[0] * v[0] + g[1] * v[1] + g[2] * v[2]);
        for (int i = 0; i < 3; ++i) {
            seen[at][i] = v[i];
            images.vector[at][i] = g[i] * scale;
        }
        images.share[images.n++] = 1.0 / total;
    }
    return images;
}

XRDFAST_CLONES void orient_families(int64_t n, const AxisImages& images, double r, Workspace& ws) {
    const double *h = ws.h.data(), *k = ws.k.data(), *l = ws.l.data(), *g2 = ws.g2.data();
    double* __restrict weight = ws.weight.data();
    const double across = 1.0 / r, along = r * r - across;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        double mean = 0.0;
        for (int j = 0; j < images.n; ++j) {
            const double* v = images.vector[j];
            const double dot = h[i] * v[0] + k[i] * v[1] + l[i] * v[2];
            const double cos2 = std::min(dot * dot / g2[i], 1.0);
            const double base = along * cos2 + across;
            mean += images.share[j] / (base * std::sqrt(base));
        }
        weight[i] *= mean;
    }
}

// Angle and area of the families at one wavelength; area 0 where there is no line.
XRDFAST_CLONES void diffract(int64_t n, double quarter_wavelength2, double ratio, double polarisation,
                             const double* __restrict g2, const double* __restrict weight, double* __restrict sin2_out,
                             double* __restrict two_theta, double* __restrict area_out) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const double x = quarter_wavelength2 * g2[i];
        const bool reachable = x > 0.0 && x < 1.0;
        const double sin2 = reachable ? x : 0.5, cos_two_theta = 1.0 - 2.0 * sin2;
        const double lp = (1.0 + polarisation * cos_two_theta * cos_two_theta) / (sin2 * std::sqrt(1.0 - sin2));
        const double area = ratio * weight[i] * lp;
        sin2_out[i] = sin2;
        two_theta[i] = two_theta_of(sin2);
        area_out[i] = reachable && area > 0.0 && area <= 1e300 ? area : 0.0;
    }
}

// Fills ws.lines; false where nothing lies inside what was measured.
bool make_lines(const RenderPatternsParams& p, int64_t pattern, MeasuredRange measured, const LineShape& shape,
                Workspace& ws) {
    const ProfileRow& row = p.profile[pattern];
    const int64_t begin = p.offset[pattern], n = p.offset[pattern + 1] - begin;
    const int16_t* hkl = p.hkl + begin * p.hkl_stride;
    const int16_t* multiplicity = p.multiplicity + begin * p.multiplicity_stride;
    for (int64_t i = 0; i < n; ++i) {
        ws.h[i] = hkl[i * p.hkl_stride];
        ws.k[i] = hkl[i * p.hkl_stride + 1];
        ws.l[i] = hkl[i * p.hkl_stride + 2];
        ws.weight[i] = static_cast<double>(p.f_squared[begin + i]) * multiplicity[i * p.multiplicity_stride];
    }
    const double* metric = p.reciprocal_metric + 6 * pattern;
    damp_families(n, metric, 0.5 * p.b_overall[pattern], ws);
    if (row.march_r != 1.0) {
        const int64_t first = p.rotation_offset[pattern], n_rotations = p.rotation_offset[pattern + 1] - first;
        orient_families(n, axis_images(row.march_axis, p.rotations + 9 * first, n_rotations, metric), row.march_r, ws);
    }
    const double wavelength[2] = {p.wavelength, row.second_wavelength}, ratio[2] = {1.0, row.second_ratio};
    const int n_wavelengths = row.second_ratio > 0.0 ? 2 : 1;
    double strongest = 0.0;
    for (int w = 0; w < n_wavelengths; ++w) {
        diffract(n, 0.25 * wavelength[w] * wavelength[w], ratio[w], row.polarisation, ws.g2.data(), ws.weight.data(),
                 ws.sin2.data() + w * n, ws.two_theta.data() + w * n, ws.area.data() + w * n);
        for (int64_t i = w * n; i < (w + 1) * n; ++i) {
            if (ws.area[i] == 0.0) continue;
            ws.two_theta[i] = observed_two_theta(row, ws.two_theta[i], std::sqrt(1.0 - ws.sin2[i]));
            const double center = (ws.two_theta[i] - shape.two_theta_min) * shape.points_a_degree;
            if (w == 0 && center >= static_cast<double>(measured.first) && center < static_cast<double>(measured.last))
                strongest = std::max(strongest, ws.area[i]);
        }
    }
    if (strongest == 0.0) return false;
    const auto add = [&](double length, double sin2, double two_theta, double area) {
        const Line line = make_line(row, shape, length, sin2, two_theta, area);
        if (line.begin < line.end) ws.lines.push_back(line);
    };
    for (int w = 0; w < n_wavelengths; ++w)
        for (int64_t i = w * n; i < (w + 1) * n; ++i)
            if (ws.area[i] > 0.0) add(wavelength[w], ws.sin2[i], ws.two_theta[i], ws.area[i] / strongest);
    const auto seed = static_cast<uint64_t>(p.seed), id = static_cast<uint64_t>(p.pattern_id[pattern]);
    for (int w = 0; w < n_wavelengths; ++w) {
        const double stretch = wavelength[w] / wavelength[0];
        for (int j = 0; j < static_cast<int>(row.impurity_count); ++j) {
            const Impurity foreign = impurity(row, measured, p.two_theta_min, p.two_theta_step, j, seed, id);
            const double sin2 = foreign.sin2 * stretch * stretch;
            if (!(sin2 > 0.0 && sin2 < 1.0)) continue;
            add(wavelength[w], sin2, observed_two_theta(row, two_theta_of(sin2), std::sqrt(1.0 - sin2)),
                ratio[w] * foreign.area);
        }
    }
    return true;
}

// Adds height / (1 + u^2) on one side of a line.
XRD_PORTABLE void add_side(float height, float slope, float start, int32_t middle, int32_t begin, int32_t end,
                           float* __restrict peaks) {
    for (int32_t k = begin; k < end; ++k)
        peaks[k] = fmaf(height, lorentzian(line_distance(slope, start, k, middle)), peaks[k]);
}

// Distance at a point that may lie on either side.
XRD_PORTABLE float either_distance(const Line& line, int32_t k) {
    const bool low = k <= line.middle;
    return line_distance(low ? line.low_slope : line.high_slope, low ? line.low_start : line.high_start, k,
                         line.middle);
}

XRDFAST_WIDE void add_lines(const Line* lines, int64_t n_lines, float* __restrict peaks) {
    for (int64_t i = 0; i < n_lines; ++i) {
        const Line line = lines[i];
        const int32_t middle_block = line.middle >> 4;  // rounds down, also below 0
        static_assert(kLineBlock == 1 << 4, "the shift divides by it");
        const int32_t low_end = kLineBlock * std::clamp(middle_block, line.begin, line.end);
        const int32_t high_begin = kLineBlock * std::clamp(middle_block + 1, line.begin, line.end);
        add_side(line.lorentzian, line.low_slope, line.low_start, line.middle, kLineBlock * line.begin, low_end, peaks);
        for (int32_t k = low_end; k < high_begin; ++k)
            peaks[k] = fmaf(line.lorentzian, lorentzian(either_distance(line, k)), peaks[k]);
        add_side(line.lorentzian, line.high_slope, line.high_start, line.middle, high_begin, kLineBlock * line.end,
                 peaks);
        for (int32_t k = kLineBlock * line.core_begin; k < kLineBlock * line.core_end; ++k)
            peaks[k] = fmaf(line.gaussian, gaussian(either_distance(line, k)), peaks[k]);
    }
}

XRDFAST_WIDE float largest(const float* value, int64_t n) {
    float most = 0.0f;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < n; ++i) most = value[i] > most ? value[i] : most;
    return most;
}

// Poisson counts of the points of a noise block whose mean is small; the others stay as they are.
XRD_PORTABLE void draw_small(const float* __restrict rate, const uint32_t* __restrict word, float* __restrict drawn) {
    SmallPoisson draw;
    float u[kNoiseBlock], mean[kNoiseBlock], probability[kNoiseBlock], below[kNoiseBlock], count[kNoiseBlock];
    for (int i = 0; i < kNoiseBlock; ++i) {
        draw = small_poisson(rate[i] < kCrossover ? rate[i] : 0.0f, word[i]);
        u[i] = draw.u, mean[i] = draw.mean, probability[i] = draw.probability, below[i] = draw.below, count[i] = 0.0f;
    }
    for (int k = 1, more = 1; k <= kMaxSmallCount && more; ++k) {
        const float inverse = 1.0f / static_cast<float>(k);
        more = 0;
#pragma omp simd reduction(| : more)
        for (int i = 0; i < kNoiseBlock; ++i) {
            SmallPoisson lane = {u[i], mean[i], probability[i], below[i], count[i]};
            more |= step(lane, inverse);
            probability[i] = lane.probability, below[i] = lane.below, count[i] = lane.count;
        }
    }
    for (int i = 0; i < kNoiseBlock; ++i) drawn[i] = rate[i] < kCrossover ? count[i] : drawn[i];
}

// Counts less `removed` times their background for the noise blocks [first, last).
XRDFAST_WIDE void count(const float* __restrict peaks, float scale, const Background& background, int64_t first,
                        int64_t last, uint64_t seed, uint64_t pattern, float removed, float* __restrict signal) {
    for (int64_t block = first; block < last; ++block) {
        uint32_t word[kNoiseBlock];
        float rate[kNoiseBlock], level[kNoiseBlock], drawn[kNoiseBlock] = {};
        const int32_t base = static_cast<int32_t>(kNoiseBlock * block);
#pragma omp simd
        for (int c = 0; c < kNoiseLanes; ++c) {
            const Philox random = philox(static_cast<uint32_t>(block * kNoiseLanes + c), kNoiseStream, seed, pattern);
            word[c] = random.word[0];
            word[c + kNoiseLanes] = random.word[1];
            word[c + 2 * kNoiseLanes] = random.word[2];
            word[c + 3 * kNoiseLanes] = random.word[3];
        }
        float least = kCrossover, most = 0.0f;
#pragma omp simd reduction(min : least) reduction(max : most)
        for (int i = 0; i < kNoiseBlock; ++i) {
            level[i] = background_counts(background, base + i);
            rate[i] = fmaf(peaks[base + i], scale, level[i]);
            least = rate[i] < least ? rate[i] : least;
            most = rate[i] > most ? rate[i] : most;
        }
        if (most >= kCrossover) {
#pragma omp simd
            for (int i = 0; i < kNoiseBlock; ++i)
                drawn[i] = large_poisson(rate[i] < kCrossover ? kCrossover : rate[i], word[i]);
        }
        if (least < kCrossover) draw_small(rate, word, drawn);
        for (int i = 0; i < kNoiseBlock; ++i) signal[base + i] = drawn[i] - removed * level[i];
    }
}

// Points below k times the noise become 0. `rough` is (n), overwritten.
XRDFAST_WIDE void clip(float* signal, int64_t n, float k, float* rough, std::vector<float>& noise) {
    noise.resize(significance_blocks(n));
    estimate_noise(signal, n, rough, noise.data());
    clip_insignificant(signal, n, k, noise.data());
}

XRDFAST_WIDE void scale(const float* __restrict value, int64_t n, float strongest, float highest,
                        float* __restrict out) {
    for (int64_t i = 0; i < n; ++i) out[i] = value[i] / strongest * highest;
}

void render_pattern(const RenderPatternsParams& p, int64_t pattern, Workspace& ws) {
    float* out = p.intensity + pattern * p.n_points;
    const ProfileRow& row = p.profile[pattern];
    const int64_t n_patches = (p.n_points + kPatchPoints - 1) / kPatchPoints;
    const LineShape shape = line_shape(row, p.two_theta_min, p.two_theta_step, p.n_points);
    const MeasuredRange measured = measured_range(row, shape, p.two_theta_step);
    const int64_t n_measured = measured.last - measured.first;
    std::fill(out, out + p.n_points, 0.0f);
    p.active_count[pattern] = 0;
    std::fill_n(p.active_patch + pattern * n_patches, n_patches, static_cast<int16_t>(-1));
    ws.resize(p.offset[pattern + 1] - p.offset[pattern], p.n_points);
    if (n_measured <= 0 || !make_lines(p, pattern, measured, shape, ws)) return;
    add_lines(ws.lines.data(), static_cast<int64_t>(ws.lines.size()), ws.peaks.data());
    const float* signal = ws.peaks.data() + measured.first;
    float strongest = largest(signal, n_measured), highest = 100.0f;
    if (!(strongest > 0.0f && std::isfinite(strongest))) return;
    if (row.counts > 0.0) {
        const Background background = background_of(row, p.two_theta_min, p.two_theta_step, p.n_points);
        count(ws.peaks.data(), static_cast<float>(row.counts) / strongest, background, measured.first / kNoiseBlock,
              (measured.last + kNoiseBlock - 1) / kNoiseBlock, static_cast<uint64_t>(p.seed),
              static_cast<uint64_t>(p.pattern_id[pattern]), p.clip_sigma < 0.0 ? 0.0f : 1.0f, ws.signal.data());
        float* counted = ws.signal.data() + measured.first;
        signal = counted;
        if (p.clip_sigma < 0.0) {
            strongest = highest = 1.0f;
        } else {
            clip(counted, n_measured, static_cast<float>(p.clip_sigma), ws.peaks.data(), ws.noise);
            strongest = largest(signal, n_measured);
        }
        if (!(strongest > 0.0f && std::isfinite(strongest))) return;
    }
    scale(signal, n_measured, strongest, highest, out + measured.first);
    p.active_count[pattern] = list_active_patches(out, p.n_points, p.active_patch + pattern * n_patches);
}

}  // namespace

void render_patterns_cpu(const RenderPatternsParams& params, int n_threads) {
#pragma omp parallel for schedule(dynamic, 4) num_threads(n_threads) if (params.n_patterns > 4 && n_threads > 1)
    for (int64_t i = 0; i < params.n_patterns; ++i) {
        Workspace& ws = thread_own<Workspace>();
        render_pattern(params, i, ws);
    }
}

}  // namespace xrdfast
