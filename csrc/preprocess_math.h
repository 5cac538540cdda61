// preprocess_math.h: what the CPU and the CUDA code of `preprocess` share, point by point: the log-log-sqrt scale of
// the background, windows, positions on the grid. Header of both .cpp and .cu files.
#pragma once
#include "portable_math.h"
#include "preprocess.h"

namespace xrdfast {

constexpr float kLargestIntensity = 1e30f;      // a scan that goes beyond, or to NaN, is blank
constexpr float kRounding = 1e-5f;              // of a scan's range: less than that above the background is rounding
constexpr double kSnap = 1e-3;                  // of a step: so near a point of the grid, an angle is on it
constexpr double kSecondRatio = 0.5;            // K-alpha 2 to K-alpha 1
constexpr int kStripFactors = 5;                // what is left out is of the order 0.5^32
constexpr float kStrippedNoise = 1.154700538f;  // (1 - 0.5^2)^(-1/2)

// e^x, |x| held to 80: x = n ln2 + r, Taylor series of degree 7 in r (remainder 5e-9), 2^n through the exponent bits.
XRD_PORTABLE float exponential(float x) {
    constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the integer in the last bits
    x = x < -80.0f ? -80.0f : x;
    x = x > 80.0f ? 80.0f : x;
    const float shifted = fmaf(x, 1.44269504f, kMagic), n = shifted - kMagic;
    const float r = fmaf(n, 2.12194440e-4f, fmaf(n, -0.693359375f, x));
    float p = 1.98412698e-4f;
    p = fmaf(p, r, 1.38888889e-3f);
    p = fmaf(p, r, 8.33333333e-3f);
    p = fmaf(p, r, 4.16666667e-2f);
    p = fmaf(p, r, 1.66666667e-1f);
    p = fmaf(p, r, 0.5f);
    p = fmaf(p, r, 1.0f);
    p = fmaf(p, r, 1.0f);
    return float_of(bits_of(p) + (bits_of(shifted) << 23));
}

// The scale on which peaks are clipped, and the way back.
XRD_PORTABLE float log_log_sqrt(float y) { return natural_log(natural_log(sqrtf(y + 1.0f) + 1.0f) + 1.0f); }
XRD_PORTABLE float from_log_log_sqrt(float level) {
    const float root = exponential(exponential(level) - 1.0f) - 1.0f;
    return fmaf(root, root, -1.0f);
}

// What rises above the background: nothing where no peak was clipped.
XRD_PORTABLE float above_background(float y, float level, float clipped, float least) {
    const float net = y - from_log_log_sqrt(clipped);
    return clipped < level && net > least ? net : 0.0f;
}

// Points of the largest half window of the background; 0 where there is nothing to clip.
XRD_PORTABLE int half_window_of(const double* two_theta, int64_t n, double width) {
    const double step = (two_theta[n - 1] - two_theta[0]) / static_cast<double>(n - 1);
    double points = floor(width / step + 0.5);
    points = points < 1.0 ? 1.0 : points;
    points = points > kMaxHalfWindow ? static_cast<double>(kMaxHalfWindow) : points;
    const int most = static_cast<int>((n - 1) / 2 < kMaxHalfWindow ? (n - 1) / 2 : kMaxHalfWindow);
    return points < most ? static_cast<int>(points) : most;
}

// How far the mean of white noise lies above what is left of it after clipping in windows of `half` points and fewer, in
// deviations. Fitted to 400,000 points for 17 windows of 1 to 1,000 points, error 0.04 at most.
XRD_PORTABLE float noise_above_background(int half) {
    if (half == 0) return 0.0f;
    const float width = logf(static_cast<float>(half));
    return 0.468f + 0.582f * width / (1.0f + 0.0257f * width);
}

// A straight line through the first or last `window` levels, from their sum and their sum times the distance from the
// middle; its value `from_middle` points from there.
XRD_PORTABLE float on_line(double sum, double moment, int window, double from_middle) {
    const double n = window;
    const double slope = window > 1 ? 12.0 * moment / (n * (n * n - 1.0)) : 0.0;
    return static_cast<float>(sum / n + slope * from_middle);
}

// Weight of a point in a parabola's value in the middle of 2 half + 1 points (Savitzky and Golay, 1964); the square
// root of the middle one is what is left of white noise.
XRD_PORTABLE float smoothing_weight(int half, int at) {
    const double h = half;
    return static_cast<float>(3.0 * (3.0 * h * h + 3.0 * h - 1.0 - 5.0 * at * at) /
                              ((2.0 * h - 1.0) * (2.0 * h + 1.0) * (2.0 * h + 3.0)));
}

// Noise of a signal relative to that of the scan it was smoothed and stripped from.
XRD_PORTABLE float noise_gain(int64_t smooth_points, bool stripped) {
    const int half = static_cast<int>(smooth_points / 2);
    return (half > 0 ? sqrtf(smoothing_weight(half, 0)) : 1.0f) * (stripped ? kStrippedNoise : 1.0f);
}

// Position on the grid in steps.
XRD_PORTABLE double grid_position(double two_theta, double two_theta_min, double two_theta_step) {
    const double position = (two_theta - two_theta_min) / two_theta_step, nearest = floor(position + 0.5);
    return fabs(position - nearest) < kSnap ? nearest : position;
}

// What an intensity is multiplied by when the sine of its theta becomes `ratio` times as large. Height: the ratio of
// Lorentz-polarisation factors. Area: that, over the stretch of the axis, d(new theta) / d(theta).
XRD_PORTABLE double converted_intensity(double sine, double new_sine, double ratio, bool conserve_area) {
    const double sin2 = sine * sine, new_sin2 = new_sine * new_sine;
    const double cos_two_theta = 1.0 - 2.0 * sin2, new_cos_two_theta = 1.0 - 2.0 * new_sin2;
    const double polarisation =
        (1.0 + new_cos_two_theta * new_cos_two_theta) / (1.0 + cos_two_theta * cos_two_theta);
    return conserve_area ? polarisation / (ratio * ratio * ratio)
                         : polarisation / (ratio * ratio) * sqrt((1.0 - sin2) / (1.0 - new_sin2));
}

// Points of the grid between the first and the last position of a scan.
struct MeasuredPoints {
    int64_t first, last;  // the one after the last
};
XRD_PORTABLE MeasuredPoints measured_points(double low, double high, int64_t n_points) {
    const double first = ceil(low), last = floor(high) + 1.0, end = static_cast<double>(n_points);
    const MeasuredPoints points = {static_cast<int64_t>(first > 0.0 ? (first < end ? first : end) : 0.0),
                                   static_cast<int64_t>(last > 0.0 ? (last < end ? last : end) : 0.0)};
    return points.first < points.last ? points : MeasuredPoints{0, 0};
}

// The part of a point's cell that lies inside a scan, in steps.
XRD_PORTABLE double covered_part(double low, double high, int64_t point) {
    const double begin = static_cast<double>(point) - 0.5, end = static_cast<double>(point) + 0.5;
    return (end < high ? end : high) - (begin > low ? begin : low);
}

// Integral over the cell of a point of a straight piece from `begin`, where it is `low`, to `end`.
XRD_PORTABLE double piece_in_cell(double begin, double end, double low, double slope, int64_t point) {
    const double cell_begin = static_cast<double>(point) - 0.5, cell_end = static_cast<double>(point) + 0.5;
    const double left = begin > cell_begin ? begin : cell_begin, right = end < cell_end ? end : cell_end;
    return (right - left) * (low + slope * (0.5 * (left + right) - begin));
}
XRD_PORTABLE double slope_of(double begin, double end, float low, float high) {
    return (static_cast<double>(high) - static_cast<double>(low)) / (end - begin);
}

}  // namespace xrdfast
