// preprocess.cpp: CPU preprocessing of measured scans.
//
// One scan at a time, every step a SIMD loop over points in a workspace that stays in cache; only the resampling walks,
// and it passes over what the clip has blanked. Floors and what is reached: benchmarks/NOTES.md.
#include "preprocess.h"

#include <algorithm>
#include <limits>

#include "active_patches.h"
#include "block_math.h"
#include "preprocess_math.h"
#include "reflection_math.h"
#include "significance.h"
#include "thread_own.h"

namespace xrdfast {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kChunk = 16;  // points handled at once where a loop isn't simply over all of them

struct Workspace {
    std::vector<float> signal, spare, level, noise;
    std::vector<double> axis;  // sines for stripping, then positions on the grid

    void resize(int64_t n) {
        for (auto* v : {&signal, &spare}) v->resize(n);
        axis.resize(n);
        noise.resize(significance_blocks(n));
    }
};

struct Range {
    float lowest, highest;
    bool usable;
};

XRDFAST_CLONES Range range_of(const float* __restrict value, int64_t n) {
    float lowest = kInfinity, highest = -kInfinity;
    int bad = 0;
#pragma omp simd reduction(min : lowest) reduction(max : highest) reduction(| : bad)
    for (int64_t i = 0; i < n; ++i) {
        lowest = value[i] < lowest ? value[i] : lowest;
        highest = value[i] > highest ? value[i] : highest;
        bad |= !(std::fabs(value[i]) <= kLargestIntensity);
    }
    return {lowest, highest, !bad};
}

// sin(theta) from 2 theta in degrees, 0..180. Kernels of sine and cosine on [0, pi/4]: fdlibm (Sun Microsystems, 1993).
XRDFAST_INLINE double sine_of(double two_theta) {
    const double theta = two_theta * (0.5 / kDegrees), other = 0.5 * kPi - theta;
    const bool low = theta <= other;
    const double x = low ? theta : other, z = x * x;
    const double sine =
        x + x * z * (-1.66666666666666324348e-01 +
                     z * (8.33333333332248946124e-03 +
                          z * (-1.98412698298579493134e-04 +
                               z * (2.75573137070700676789e-06 +
                                    z * (-2.50507602534068634195e-08 + z * 1.58969099521155010221e-10)))));
    const double cosine =
        1.0 - 0.5 * z +
        z * z * (4.16666666666666019037e-02 +
                 z * (-1.38888888888741095749e-03 +
                      z * (2.48015872894767294178e-05 +
                           z * (-2.75573143513906633035e-07 +
                                z * (2.08757232129817482790e-09 + z * -1.13596475577881948265e-11)))));
    return low ? sine : cosine;
}

XRDFAST_CLONES void sines(const double* __restrict two_theta, int64_t n, double* __restrict sine) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) sine[i] = sine_of(two_theta[i]);
}

XRDFAST_CLONES void estimate_scan_noise(const float* intensity, int64_t n, float* rough, float* noise) {
    estimate_noise(intensity, n, rough, noise);
}

// Parabolas over 2 half + 1 points; beyond its ends a scan goes on as it ends. `padded` is (n + 2 half).
XRDFAST_CLONES void smooth(const float* __restrict value, int64_t n, int half, float* __restrict padded,
                           float* __restrict out) {
    std::fill(padded, padded + half, value[0]);
    std::copy(value, value + n, padded + half);
    std::fill(padded + half + n, padded + 2 * half + n, value[n - 1]);
    std::fill(out, out + n, 0.0f);
    for (int at = -half; at <= half; ++at) {
        const float weight = smoothing_weight(half, at);
        const float* shifted = padded + half + at;
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) out[i] += weight * shifted[i];
    }
}

// out(x) = in(x) + factor in(the angle whose sine is `shrink` times as large), linear in the sine between points.
void add_shifted(const double* sine, int64_t n, double shrink, float factor, const float* in, float* out) {
    int64_t after = 1;  // the first point beyond, or the last one
    for (int64_t i = 0; i < n; ++i) {
        const double wanted = shrink * sine[i];
        while (after < n - 1 && sine[after] <= wanted) ++after;
        const double share = (wanted - sine[after - 1]) / (sine[after] - sine[after - 1]);
        const float low = in[after - 1], high = in[after];
        out[i] = in[i] + factor * (share > 0.0 ? low + static_cast<float>(share) * (high - low) : low);
    }
}

// 1 / (1 + r S) = (1 - r S) (1 + r^2 S^2) (1 + r^4 S^4) ..., S the shift by K-alpha 2.
void strip_second(double ratio, Workspace& ws) {
    double shrink = ratio, factor = -kSecondRatio;
    for (int i = 0; i < kStripFactors; ++i) {
        add_shifted(ws.axis.data(), static_cast<int64_t>(ws.signal.size()), shrink, static_cast<float>(factor),
                    ws.signal.data(), ws.spare.data());
        ws.signal.swap(ws.spare);
        shrink *= shrink;
        factor *= factor;
    }
}

XRDFAST_CLONES void to_level(const float* __restrict value, int64_t n, float lowest, float* __restrict level) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) level[i] = log_log_sqrt(value[i] - lowest);
}

// Continues a scan beyond its end (stride 1) or beginning (stride -1) by the straight line through its last levels.
void extrapolate(float* end, int window, int64_t stride) {
    const double middle = 0.5 * (window - 1);
    double sum = 0.0, moment = 0.0;
    for (int i = 0; i < window; ++i) {
        const double value = end[-stride * i];
        sum += value;
        moment += (middle - i) * value;
    }
    for (int i = 1; i <= window; ++i) end[stride * i] = on_line(sum, moment, window, middle + i);
}

// Clips peaks in windows that shrink to a point, in place: every pass writes its result one half window beside what it
// reads, downwards and upwards in turn, over the points that it needs no more. So one array of a scan stays in L1.
// There are 2 half points of infinity on either side, as a window that reaches beyond clips nothing, and `n` is whole
// chunks. `level` ends as the beginning of the result.
struct ClipPeaks {
    float*& level;
    int64_t n;
    int half;

    template <int kBytes>
    XRDFAST_INLINE void run() const {
        using S = Simd<float, kBytes>;
        float* at = level;
        bool down = true;
        for (int window = half; window > 0; --window, down = !down) {
            if (down) {
                for (int64_t i = 0; i < n; i += kChunk) chunk<S>(at + i, window, at + i - window);
                std::fill(at + n - window, at + n, kInfinity);
                at -= window;
            } else {
                for (int64_t i = n - kChunk; i >= 0; i -= kChunk) chunk<S>(at + i, window, at + i + window);
                std::fill(at, at + window, kInfinity);
                at += window;
            }
        }
        level = at;
    }

    // kChunk points clipped in one window; all are read before any is written.
    template <class S>
    XRDFAST_INLINE static void chunk(const float* middle, int window, float* out) {
        using V = typename S::Vector;
        V clipped[kChunk / S::kLanes];
#pragma GCC unroll 4
        for (int k = 0; k < kChunk / S::kLanes; ++k) {
            const float* here = middle + k * S::kLanes;
            const V value = load<V>(here), mean = 0.5f * (load<V>(here - window) + load<V>(here + window));
            clipped[k] = mean < value ? mean : value;
        }
#pragma GCC unroll 4
        for (int k = 0; k < kChunk / S::kLanes; ++k) store(out + k * S::kLanes, clipped[k]);
    }
};

XRDFAST_CLONES void subtract_background(const float* __restrict level, const float* __restrict clipped, int64_t n,
                                        float lowest, float least, float* __restrict value) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) value[i] = above_background(value[i] - lowest, level[i], clipped[i], least);
}

void remove_background(int64_t n, int half, Workspace& ws) {
    const Range range = range_of(ws.signal.data(), n);
    const float lowest = std::min(range.lowest, 0.0f), least = kRounding * (range.highest - lowest);
    const int64_t n_padded = (n + 2 * half + kChunk - 1) / kChunk * kChunk;
    ws.level.assign(n_padded + 4 * half, kInfinity);
    float *padded = ws.level.data() + 2 * half, *level = padded + half;
    to_level(ws.signal.data(), n, lowest, level);
    std::copy(level, level + n, ws.spare.data());
    extrapolate(level, half, -1);
    extrapolate(level + n - 1, half, 1);
    run_best(ClipPeaks{padded, n_padded, half});
    subtract_background(ws.spare.data(), padded + half, n, lowest, least, ws.signal.data());
}

XRDFAST_CLONES void clip_signal(float* signal, int64_t n, float k, const float* noise, float raised) {
    clip_insignificant(signal, n, k, noise, raised);
}

XRDFAST_CLONES void place(const double* __restrict two_theta, int64_t n, double two_theta_min, double two_theta_step,
                          double* __restrict position) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) position[i] = grid_position(two_theta[i], two_theta_min, two_theta_step);
}

// The same on another wavelength's axis, and intensities as they are there. Infinite where nothing diffracts. A choice
// made within the loop would keep it from becoming SIMD code.
template <bool kConserveArea>
XRDFAST_CLONES void convert(const double* __restrict two_theta, int64_t n, double ratio, double two_theta_min,
                            double two_theta_step, double* __restrict position, float* __restrict signal) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const double sine = sine_of(two_theta[i]), wanted = ratio * sine;
        const bool reachable = wanted < 1.0;
        const double new_sine = reachable ? wanted : 0.5;
        const double angle = two_theta_of(new_sine * new_sine);
        const double there = grid_position(angle, two_theta_min, two_theta_step);
        const double factor = converted_intensity(sine, new_sine, ratio, kConserveArea);
        position[i] = reachable ? there : std::numeric_limits<double>::infinity();
        signal[i] = static_cast<float>(signal[i] * factor);
    }
}

// Cell of the grid that a position lies in, held to those that were measured and one more on either side.
XRDFAST_INLINE int32_t cell_of(double position, MeasuredPoints measured) {
    const double cell = std::floor(position + 0.5), least = static_cast<double>(measured.first - 1);
    const double most = static_cast<double>(measured.last);
    return static_cast<int32_t>(cell < least ? least : cell > most ? most : cell);
}

bool blank(const float* signal, int64_t n) {
    int any = 0;
    for (int64_t i = 0; i < n; ++i) any |= signal[i] != 0.0f;
    return !any;
}

// Adds the pieces between neighbouring points to the cells they lie in: almost always one cell, or two.
XRDFAST_CLONES void resample_area(const double* position, const float* signal, int64_t n, MeasuredPoints measured,
                                  float* out) {
    for (int64_t block = 0; block < n - 1; block += kChunk) {
        const int64_t size = std::min<int64_t>(kChunk, n - 1 - block);
        const double* u = position + block;
        const float* y = signal + block;
        if (blank(y, size + 1)) continue;
        int32_t cell[kChunk], next[kChunk];
        float here[kChunk], beyond[kChunk];
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
            cell[i] = cell_of(u[i], measured);
            next[i] = cell_of(u[i + 1], measured);
            const double slope = u[i] < u[i + 1] ? slope_of(u[i], u[i + 1], y[i], y[i + 1]) : 0.0;
            here[i] = static_cast<float>(piece_in_cell(u[i], u[i + 1], y[i], slope, cell[i]));
            const double rest = piece_in_cell(u[i], u[i + 1], y[i], slope, cell[i] + 1);
            beyond[i] = next[i] > cell[i] ? static_cast<float>(rest) : 0.0f;
        }
        for (int64_t i = 0; i < size; ++i) {
            if (cell[i] >= measured.first && next[i] < measured.last && next[i] <= cell[i] + 1) {
                out[cell[i]] += here[i];
                out[next[i]] += beyond[i];
                continue;
            }
            if (!(u[i] < u[i + 1])) continue;
            const double slope = slope_of(u[i], u[i + 1], y[i], y[i + 1]);
            const int64_t last = std::min<int64_t>(next[i], measured.last - 1);
            for (int64_t k = std::max<int64_t>(cell[i], measured.first); k <= last; ++k)
                out[k] += static_cast<float>(piece_in_cell(u[i], u[i + 1], y[i], slope, k));
        }
    }
    const auto fill_cell = [&](int64_t k) {
        const double covered = covered_part(position[0], position[n - 1], k);
        if (covered > 0.0 && covered < 1.0) out[k] = static_cast<float>(out[k] / covered);
    };
    fill_cell(measured.first);
    if (measured.last - 1 > measured.first) fill_cell(measured.last - 1);
}

// The first point of the grid at a position or beyond, held to those that were measured and the one after.
XRDFAST_INLINE int32_t point_from(double position, MeasuredPoints measured) {
    const double point = std::ceil(position), least = static_cast<double>(measured.first);
    const double most = static_cast<double>(measured.last);
    return static_cast<int32_t>(point < least ? least : point > most ? most : point);
}

XRDFAST_CLONES void resample_height(const double* position, const float* signal, int64_t n, MeasuredPoints measured,
                                    float* out) {
    for (int64_t block = 0; block < n - 1; block += kChunk) {
        const int64_t size = std::min<int64_t>(kChunk, n - 1 - block);
        const double* u = position + block;
        const float* y = signal + block;
        if (blank(y, size + 1)) continue;
        int32_t point[kChunk], next[kChunk];
        float value[kChunk];
        double slope[kChunk];
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
            point[i] = point_from(u[i], measured);
            next[i] = point_from(u[i + 1], measured);
            slope[i] = slope_of(u[i], u[i + 1], y[i], y[i + 1]);
            value[i] = static_cast<float>(y[i] + slope[i] * (point[i] - u[i]));
        }
        for (int64_t i = 0; i < size; ++i) {
            if (next[i] > point[i]) out[point[i]] = value[i];
            for (int64_t k = point[i] + 1; k < next[i]; ++k)
                out[k] = static_cast<float>(y[i] + slope[i] * (static_cast<double>(k) - u[i]));
        }
    }
    // The last position belongs to the last piece, where the grid has a point there.
    if (static_cast<double>(measured.last - 1) == position[n - 1]) out[measured.last - 1] = signal[n - 1];
}

XRDFAST_CLONES void scale_to_100(float* value, int64_t n, float strongest) {
    for (int64_t i = 0; i < n; ++i) value[i] = value[i] / strongest * 100.0f;
}

void preprocess_scan(const PreprocessScansParams& p, int64_t scan, Workspace& ws) {
    const int64_t begin = p.offset[scan], n = p.offset[scan + 1] - begin;
    const int64_t n_patches = (p.n_points + kPatchPoints - 1) / kPatchPoints;
    const double* two_theta = p.two_theta + begin;
    const float* intensity = p.intensity + begin;
    float* out = p.pattern + scan * p.n_points;
    std::fill(out, out + p.n_points, 0.0f);
    std::fill_n(p.measured + 2 * scan, 2, 0);
    std::fill_n(p.active_patch + scan * n_patches, n_patches, static_cast<int16_t>(-1));
    p.active_count[scan] = 0;
    if (n < 2 || !range_of(intensity, n).usable) return;

    ws.resize(n);
    estimate_scan_noise(intensity, n, ws.spare.data(), ws.noise.data());
    if (const int half = static_cast<int>(p.smooth_points / 2); half > 0) {
        ws.level.resize(n + 2 * half);
        smooth(intensity, n, half, ws.level.data(), ws.signal.data());
    } else {
        std::copy(intensity, intensity + n, ws.signal.data());
    }
    const bool strips = p.second_wavelength[scan] > 0.0;
    if (strips) {
        sines(two_theta, n, ws.axis.data());
        strip_second(p.wavelength[scan] / p.second_wavelength[scan], ws);
    }
    const int half = p.background_width > 0.0 ? half_window_of(two_theta, n, p.background_width) : 0;
    if (p.background_width > 0.0) remove_background(n, half, ws);
    if (p.clip_sigma > 0.0) {
        const float gain = noise_gain(p.smooth_points, strips);
        clip_signal(ws.signal.data(), n, static_cast<float>(p.clip_sigma) * gain, ws.noise.data(),
                    noise_above_background(half) * gain);
    } else {
        for (float& value : ws.signal) value = significant(value, 0.0f);
    }

    double* position = ws.axis.data();
    int64_t n_reached = n;
    if (p.wavelength[scan] == p.model_wavelength) {
        place(two_theta, n, p.two_theta_min, p.two_theta_step, position);
    } else {
        (p.conserve_area ? convert<true> : convert<false>)(two_theta, n, p.model_wavelength / p.wavelength[scan],
                                                           p.two_theta_min, p.two_theta_step, position,
                                                           ws.signal.data());
        n_reached = std::lower_bound(position, position + n, std::numeric_limits<double>::infinity()) - position;
    }
    if (n_reached < 2) return;
    const MeasuredPoints measured = measured_points(position[0], position[n_reached - 1], p.n_points);
    p.measured[2 * scan] = static_cast<int32_t>(measured.first);
    p.measured[2 * scan + 1] = static_cast<int32_t>(measured.last);
    if (measured.first == measured.last) return;
    (p.conserve_area ? resample_area : resample_height)(position, ws.signal.data(), n_reached, measured, out);
    const float strongest = range_of(out, p.n_points).highest;
    if (!(strongest > 0.0f)) return;
    scale_to_100(out, p.n_points, strongest);
    p.active_count[scan] = list_active_patches(out, p.n_points, p.active_patch + scan * n_patches);
}

XRDFAST_CLONES bool rises(const double* __restrict two_theta, int64_t n) {
    int bad = 0;
#pragma omp simd reduction(| : bad)
    for (int64_t i = 1; i < n; ++i) bad |= !(two_theta[i] > two_theta[i - 1]);
    return !bad;
}

}  // namespace

bool angles_rise_cpu(const int64_t* offset, const double* two_theta, int64_t n_scans) {
    for (int64_t i = 0; i < n_scans; ++i) {
        const int64_t begin = offset[i], end = offset[i + 1];
        if (begin == end) continue;
        if (!(two_theta[begin] > 0.0 && two_theta[end - 1] < 180.0 && rises(two_theta + begin, end - begin)))
            return false;
    }
    return true;
}

void preprocess_scans_cpu(const PreprocessScansParams& params, int n_threads) {
#pragma omp parallel for schedule(dynamic, 4) num_threads(n_threads) if (params.n_scans > 4 && n_threads > 1)
    for (int64_t i = 0; i < params.n_scans; ++i) {
        Workspace& ws = thread_own<Workspace>();
        preprocess_scan(params, i, ws);
    }
}

}  // namespace xrdfast
