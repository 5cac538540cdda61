// reflection_math.h: vectorisable elementary functions and the merging of coincident lines, shared by the CPU code
// of `simulate` and `render`. Everything is double, branch-free and inlined, so that a plain loop over it
// becomes SIMD code without -ffast-math. Not for device code.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "compiler.h"

namespace xrdfast {

constexpr double kPi = 3.14159265358979323846;
constexpr double kDegrees = 180.0 / kPi;

// Two lines closer than this share one (pymatgen's TWO_THETA_TOL, degrees); weaker ones are dropped
// (its SCALED_INTENSITY_TOL, on the scale where the strongest line is 100).
constexpr double kMergeStep = 1e-5;
constexpr double kMinScaledIntensity = 1e-3;
constexpr uint32_t kOutsideKey = 0xffffffffu;  // sorts behind every real line
static_assert(180.0 / kMergeStep < static_cast<double>(kOutsideKey), "a line's key must fit in 32 bits");

// asin on [0, 1]. Coefficients of the rational approximation: fdlibm e_asin.c (Sun Microsystems, 1993); error < 1 ulp.
XRDFAST_INLINE double asin_unit(double x) {
    const bool upper = x >= 0.5;
    const double t = upper ? (1.0 - x) * 0.5 : x * x;
    const double root = std::sqrt(t);
    const double s = upper ? root : x;
    const double p =
        t * (1.66666666666666657415e-01 +
             t * (-3.25565818622400915405e-01 +
                  t * (2.01212532134862925881e-01 +
                       t * (-4.00555345006794114027e-02 +
                            t * (7.91534994289814532176e-04 + t * 3.47933107596021167570e-05)))));
    const double q = 1.0 + t * (-2.40339491173441421878e+00 +
                                t * (2.02094576023350569471e+00 +
                                     t * (-6.88283971605453293030e-01 + t * 7.70381505559019352791e-02)));
    const double r = s + s * (p / q);
    return upper ? 0.5 * kPi - 2.0 * r : r;
}

// exp on (-inf, 0]: x = n ln2 + r, Taylor series of degree 12 in |r| <= ln2 / 2 (remainder 2e-16), 2^n put into the
// exponent bits through the integer that adding 1.5 * 2^52 leaves in the mantissa. Below -700 it returns exp(-700).
XRDFAST_INLINE double exp_nonpositive(double x) {
    constexpr double kMagic = 6755399441055744.0;
    x = x < -700.0 ? -700.0 : x;
    const double shifted = x * 1.44269504088896338700e+00 + kMagic;
    const double n = shifted - kMagic;
    const double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
    double p = 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    uint64_t bits, power;
    std::memcpy(&bits, &shifted, sizeof bits);
    power = (bits + 1023u) << 52;
    double scale;
    std::memcpy(&scale, &power, sizeof scale);
    return p * scale;
}

// 2 theta in degrees from sin^2(theta) in [0, 1].
XRDFAST_INLINE double two_theta_of(double sin2) { return 2.0 * kDegrees * asin_unit(std::sqrt(sin2)); }

// Lorentz-polarisation factor without monochromator, (1 + cos^2 2theta) / (sin^2 theta cos theta), from sin^2(theta).
XRDFAST_INLINE double lorentz_polarisation(double sin2) {
    const double cos_two_theta = 1.0 - 2.0 * sin2;
    return (1.0 + cos_two_theta * cos_two_theta) / (sin2 * std::sqrt(1.0 - sin2));
}

// Key under which coincident lines meet: round(2 theta / 1e-5 degrees), as pymatgen 2026 does.
XRDFAST_INLINE uint32_t merge_key(double two_theta) {
    return static_cast<uint32_t>(static_cast<int32_t>(two_theta * (1.0 / kMergeStep) + 0.5));
}

// Sorts the indices 0..n-1 by key, stable: least-significant-digit radix sort, only over the digits in use.
// std::sort took 25 us for 600 keys, this takes 4.
class KeySorter {
   public:
    const uint32_t* sort(const uint32_t* keys, int64_t n) {
        entries_.resize(n);
        spare_.resize(n);
        order_.resize(n);
        uint32_t used = 0;
        for (int64_t i = 0; i < n; ++i) {
            entries_[i] = static_cast<uint64_t>(keys[i]) << 32 | static_cast<uint32_t>(i);
            used |= keys[i];
        }
        for (int shift = 0; shift < 32; shift += kDigitBits) {
            if (((used >> shift) & (kBuckets - 1)) == 0) continue;
            uint32_t count[kBuckets] = {0};
            for (int64_t i = 0; i < n; ++i) ++count[(entries_[i] >> (32 + shift)) & (kBuckets - 1)];
            uint32_t total = 0;
            for (uint32_t& c : count) total += std::exchange(c, total);
            for (int64_t i = 0; i < n; ++i)
                spare_[count[(entries_[i] >> (32 + shift)) & (kBuckets - 1)]++] = entries_[i];
            entries_.swap(spare_);
        }
        for (int64_t i = 0; i < n; ++i) order_[i] = static_cast<uint32_t>(entries_[i]);
        return order_.data();
    }

   private:
    static constexpr int kDigitBits = 8;
    static constexpr uint32_t kBuckets = 1u << kDigitBits;
    std::vector<uint64_t> entries_, spare_;
    std::vector<uint32_t> order_;
};

}  // namespace xrdfast
