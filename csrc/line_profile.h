// line_profile.h: how one reflection family looks in a pattern: angle, width and height from the parameters of the
// measurement, and the window of points it is evaluated on. What is computed once a line is double and then rounded to
// the few single-precision numbers that the loops over points use. Header of both .cpp and .cu files.
#pragma once
#include "random.h"

namespace xrdfast {

// One pattern's row of the profile table, in the order of ProfileParameters (xrdfast/ops/line_profile.py), where
// units and ranges are explained.
struct ProfileRow {
    double caglioti_u, caglioti_v, caglioti_w, crystallite_size, microstrain, eta, asymmetry;
    double second_wavelength, second_ratio;
    double zero_shift, sample_displacement, goniometer_radius;
    double march_r, march_axis[3];
    double polarisation, counts, background[4], hump_height, hump_center, hump_fwhm;
    double two_theta_first, two_theta_last, impurity_count, impurity_strength;
};
constexpr int kProfileColumns = 29;
static_assert(sizeof(ProfileRow) == kProfileColumns * sizeof(double), "a row of the table is read in place");

constexpr double kProfileCutoff = 1e-4;      // of its height: a profile is evaluated out to here
constexpr double kGaussianReach = 4.822131;  // half widths from which the Gaussian part, under 1e-7, is left out
constexpr int kLineBlock = 16;               // points: windows are widened to whole blocks, one AVX-512 vector
constexpr double kMaxAsymmetry = 0.5;
constexpr int kMaxImpurities = 16;

// One line on the grid. Point k lies u = start + (k - middle) * slope half widths from it, of the low-angle side up to
// `middle`, of the high-angle side beyond.
struct Line {
    float low_slope, low_start, high_slope, high_start;
    float lorentzian, gaussian;    // heights
    int32_t middle;                // last point of the low-angle side
    int32_t begin, end;            // blocks of the whole profile, none where equal
    int32_t core_begin, core_end;  // blocks of the Gaussian part
};

XRD_PORTABLE float line_distance(float slope, float start, int32_t point, int32_t middle) {
    return fmaf(static_cast<float>(point - middle), slope, start);
}
XRD_PORTABLE float lorentzian(float u) { return reciprocal(fmaf(u, u, 1.0f)); }
XRD_PORTABLE float gaussian(float u) { return exp2_nonpositive(-(u * u)); }

// What is the same for all lines of a pattern.
struct LineShape {
    double lorentzian, gaussian;  // heights of a profile of area 1 and FWHM 1
    double reach;                 // half widths
    double points_a_degree, two_theta_min, n_points;
};

// Half widths at which a pseudo-Voigt with this Lorentzian share of its height falls to kProfileCutoff of it.
XRD_PORTABLE double profile_reach(double share) {
    double low = 1.0, high = 100.0;
    for (int i = 0; i < 40; ++i) {
        const double u = 0.5 * (low + high);
        const bool above = share / (1.0 + u * u) + (1.0 - share) * exp2(-u * u) > kProfileCutoff;
        low = above ? u : low;
        high = above ? high : u;
    }
    return high;
}

XRD_PORTABLE LineShape line_shape(const ProfileRow& p, double two_theta_min, double two_theta_step, int64_t n_points) {
    const double lorentzian = p.eta * 0.63661977236758134, gaussian = (1.0 - p.eta) * 0.93943727869965133;
    return {lorentzian, gaussian, profile_reach(lorentzian / (lorentzian + gaussian)), 1.0 / two_theta_step,
            two_theta_min, static_cast<double>(n_points)};
}

// The block of a point, the point first brought to where it can be an index. NaN becomes the first.
XRD_PORTABLE int32_t line_block(double point, double last) {
    point = point < last ? point : last;
    return static_cast<int32_t>(point > 0.0 ? point : 0.0) / kLineBlock;
}

// Observed angle in degrees.
XRD_PORTABLE double observed_two_theta(const ProfileRow& p, double two_theta, double cosine) {
    return two_theta + p.zero_shift -
           2.0 * kDegreesARadian * p.sample_displacement * cosine / p.goniometer_radius;
}

// Lorentz-polarisation factor from sin^2 theta.
XRD_PORTABLE double lorentz_polarisation_of(const ProfileRow& p, double sin2) {
    const double cos_two_theta = 1.0 - 2.0 * sin2;
    return (1.0 + p.polarisation * cos_two_theta * cos_two_theta) / (sin2 * sqrt(1.0 - sin2));
}

XRD_PORTABLE Line no_line() { return {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0, 0, 0, 0, 0}; }

// The line at an observed angle; `area` is relative to the strongest line of the pattern.
XRD_PORTABLE Line make_line(const ProfileRow& p, const LineShape& shape, double wavelength, double sin2,
                            double two_theta, double area) {
    const double sine = sqrt(sin2), cosine = sqrt(1.0 - sin2), tangent = sine / cosine;
    const double size = kDegreesARadian * 0.9 * wavelength / (p.crystallite_size * cosine);
    const double strain = kDegreesARadian * 4.0 * p.microstrain * tangent;
    const double caglioti = p.caglioti_w + tangent * (p.caglioti_v + tangent * p.caglioti_u);
    const double fwhm2 = caglioti + size * size + strain * strain;
    const double center = (two_theta - shape.two_theta_min) * shape.points_a_degree;
    if (!(fwhm2 > 0.0 && fwhm2 < 1e12 && center > -1e8 && center < 1e8)) return no_line();
    const double width = sqrt(fwhm2) * shape.points_a_degree, fwhm = width > 1.0 ? width : 1.0;
    double split = p.asymmetry * (1.0 - 2.0 * sin2) / (2.0 * sine * cosine);
    split = split < kMaxAsymmetry ? split : kMaxAsymmetry;
    split = split > -kMaxAsymmetry ? split : -kMaxAsymmetry;
    const double low = 0.5 * fwhm * (1.0 + split), high = 0.5 * fwhm * (1.0 - split);
    const double begin = ceil(center - shape.reach * low), end = floor(center + shape.reach * high);
    const double last = shape.n_points - 1.0;
    if (!(begin <= last && end >= 0.0 && begin <= end)) return no_line();
    const double middle = floor(center), after = center - middle;
    Line line;
    line.low_slope = static_cast<float>(1.0 / low);
    line.high_slope = static_cast<float>(1.0 / high);
    line.low_start = static_cast<float>(-after / low);
    line.high_start = static_cast<float>(-after / high);
    line.lorentzian = static_cast<float>(area / fwhm * shape.lorentzian);
    line.gaussian = static_cast<float>(area / fwhm * shape.gaussian);
    line.middle = static_cast<int32_t>(middle);
    line.begin = line_block(begin, last);
    line.end = line_block(end, last) + 1;
    line.core_begin = line_block(ceil(center - kGaussianReach * low), last);
    line.core_end = line_block(floor(center + kGaussianReach * high), last) + 1;
    line.core_begin = line.core_begin > line.begin ? line.core_begin : line.begin;
    line.core_end = line.core_end < line.end ? line.core_end : line.end;
    if (!(line.gaussian > 0.0f)) line.core_end = line.core_begin;
    return line;
}

// Points [first, last) were measured; an angle a hair off a point means that point.
struct MeasuredRange {
    int64_t first, last;
};
XRD_PORTABLE int64_t measured_point(double two_theta, const LineShape& shape, double two_theta_step) {
    const double point = ceil((two_theta - shape.two_theta_min) / two_theta_step - 1e-6);
    return static_cast<int64_t>(point > 0.0 ? (point < shape.n_points ? point : shape.n_points) : 0.0);
}
XRD_PORTABLE MeasuredRange measured_range(const ProfileRow& p, const LineShape& shape, double two_theta_step) {
    return {measured_point(p.two_theta_first, shape, two_theta_step),
            measured_point(p.two_theta_last, shape, two_theta_step)};
}

// Smooth background in counts: a cubic in x = 2 k / (n - 1) - 1 and a Gaussian hump, never negative.
struct Background {
    float x_slope, coefficient[4], hump, hump_slope, hump_start;
};
XRD_PORTABLE Background background_of(const ProfileRow& p, double two_theta_min, double two_theta_step,
                                      int64_t n_points) {
    const double* c = p.background;
    const double half = 0.5 * p.hump_fwhm;
    Background b;
    b.x_slope = static_cast<float>(2.0 / (n_points > 1 ? static_cast<double>(n_points - 1) : 1.0));
    b.coefficient[0] = static_cast<float>(p.counts * (c[0] - c[2]));
    b.coefficient[1] = static_cast<float>(p.counts * (c[1] - 3.0 * c[3]));
    b.coefficient[2] = static_cast<float>(p.counts * 2.0 * c[2]);
    b.coefficient[3] = static_cast<float>(p.counts * 4.0 * c[3]);
    b.hump = static_cast<float>(p.counts * p.hump_height);
    b.hump_slope = static_cast<float>(two_theta_step / half);
    b.hump_start = static_cast<float>((two_theta_min - p.hump_center) / half);
    return b;
}
XRD_PORTABLE float background_counts(const Background& b, int32_t point) {
    const float k = static_cast<float>(point);
    const float x = fmaf(k, b.x_slope, -1.0f), u = fmaf(k, b.hump_slope, b.hump_start);
    float level = fmaf(x, b.coefficient[3], b.coefficient[2]);
    level = fmaf(x, level, b.coefficient[1]);
    level = fmaf(x, level, b.coefficient[0]);
    level = fmaf(b.hump, gaussian(u), level);
    return level > 0.0f ? level : 0.0f;
}

// sin on [0, pi / 2] by its Taylor series, remainder 2e-17; CUDA's own takes local memory for arguments it never gets.
XRD_PORTABLE double sine_of(double x) {
    double sum = 1.0;
    for (int k = 10; k > 0; --k) sum = 1.0 - x * x / (2 * k * (2 * k + 1)) * sum;
    return x * sum;
}

// A foreign line, at a random angle of what was measured; its area is relative to the strongest line.
struct Impurity {
    double sin2, area;
};
XRD_PORTABLE Impurity impurity(const ProfileRow& p, MeasuredRange measured, double two_theta_min, double two_theta_step,
                               int index, uint64_t seed, uint64_t pattern) {
    const Philox random = philox(static_cast<uint32_t>(index), kImpurityStream, seed, pattern);
    const double width = static_cast<double>(measured.last - measured.first);
    const double two_theta =
        two_theta_min + two_theta_step * (static_cast<double>(measured.first) + width * unit(random.word[0]));
    const double sine = sine_of(0.5 / kDegreesARadian * two_theta);
    return {sine * sine, p.impurity_strength * unit(random.word[1])};
}

}  // namespace xrdfast
