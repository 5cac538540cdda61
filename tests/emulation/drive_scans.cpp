// drive_scans.cpp: scans onto the model's grid; what must hold of patterns of known peaks on a known background.
#include <algorithm>
#include <cmath>
#include <vector>

#include "active_patches.h"
#include "drive.h"
#include "preprocess.h"
#include "random.h"

using namespace xrdfast;

namespace {

// Scans of 0, 2, n and 1.5 n points of 0.02 degrees from 15 on; peaks at 20 and 30 degrees, the last with NaN at a point.
void check_preprocessing(int64_t n, double background_width, int64_t smooth_points, bool strips, bool long_scans) {
    const int64_t n_scans = 4, n_points = 1001, n_patches = (n_points + kPatchPoints - 1) / kPatchPoints;
    const double begin = 10.0, step = 0.04, wavelength = 1.54056, second_wavelength = 1.54439;
    const std::vector<int64_t> offset{0, 0, 2, 2 + n, 2 + n + n * 3 / 2};
    const int64_t n_total = offset.back();
    std::vector<double> two_theta(n_total), first(n_scans, wavelength), second(n_scans, strips ? second_wavelength : 0.0);
    std::vector<float> intensity(n_total);
    for (int64_t s = 0; s < n_scans; ++s)
        for (int64_t i = offset[s]; i < offset[s + 1]; ++i) {
            const double x = 15.0 + 0.02 * static_cast<double>(i - offset[s]);
            two_theta[i] = x;
            double y = 50.0 + 0.1 * x;
            for (const double center : {20.0, 30.0}) {
                const double sine = std::sin(kPi / 360.0 * center) * second_wavelength / wavelength;
                const double satellite = 360.0 / kPi * std::asin(sine);
                y += 900.0 * std::exp(-0.5 * std::pow((x - center) / 0.06, 2));
                if (strips) y += 450.0 * std::exp(-0.5 * std::pow((x - satellite) / 0.06, 2));
            }
            intensity[i] = static_cast<float>(y);
        }
    intensity[offset[3] + 7] = std::nanf("");
    std::vector<float> pattern(n_scans * n_points, -1.0f);
    std::vector<int32_t> measured(2 * n_scans, -5), active(n_scans, -5);
    std::vector<int16_t> patch(n_scans * n_patches, -5);
    std::vector<float> signal(n_total), spare(n_total), noise(n_total / kNoiseBlock + n_scans);
    std::vector<float> level(long_scans ? 2 * (n_total + 2 * kMaxHalfWindow * n_scans) : 0);
    std::vector<double> axis(n_total);
    const PreprocessScansParams p{offset.data(), two_theta.data(), intensity.data(), first.data(), second.data(),
                                  pattern.data(), measured.data(), active.data(), patch.data(), n_scans, n_points,
                                  smooth_points, background_width, 3.0, false, wavelength, begin, step};
    const PreprocessScansScratch scratch{signal.data(), spare.data(), axis.data(), noise.data(),
                                         long_scans ? level.data() : nullptr, n_total,
                                         long_scans ? kSharedScanPoints + 1 : n * 3 / 2};
    expect(preprocess_scans_cuda(p, scratch, nullptr) == 0, "preprocess_scans", 1, 0);
    for (int64_t s = 0; s < n_scans; ++s) {
        const float* own = pattern.data() + s * n_points;
        const float strongest = *std::max_element(own, own + n_points);
        const bool shows = s == 2 && n >= 900;
        expect(strongest == (shows ? 100.0f : 0.0f), "strongest point of a scan", strongest, shows ? 100.0 : 0.0);
        expect(*std::min_element(own, own + n_points) >= 0.0f, "weakest point of a scan", -1.0, 0.0);
        int32_t n_active = 0;
        for (int64_t j = 0; j < n_patches; ++j) {
            const int64_t last = std::min((j + 1) * kPatchPoints, n_points);
            if (*std::max_element(own + j * kPatchPoints, own + last) < kActiveIntensity) continue;
            expect(patch[s * n_patches + n_active] == j, "active patch of a scan", patch[s * n_patches + n_active],
                   1.0 * j);
            ++n_active;
        }
        expect(active[s] == n_active, "active patches of a scan", active[s], n_active);
        for (int64_t j = n_active; j < n_patches; ++j)
            expect(patch[s * n_patches + j] == -1, "patch of a scan", patch[s * n_patches + j], -1);
    }
    if (n < 900) return;  // no peak within reach
    const float* own = pattern.data() + 2 * n_points;
    for (const double center : {20.0, 30.0}) {
        const auto at = static_cast<int64_t>(std::lround((center - begin) / step));
        expect(own[at] > 90.0f, "top of a peak", own[at], 100.0);
        expect(own[at + 40] < 0.5f, "foot of a peak", own[at + 40], 0.0);
    }
    expect(measured[4] == 125 && measured[5] == 575, "measured range", measured[4], 125);
}

}  // namespace

void check_scans() {
#if defined(__SANITIZE_THREAD__)  // every turn of the background is some barriers for 512 threads
    check_preprocessing(60, 0.06, 1, false, false);
#else
    check_preprocessing(900, 2.0, 1, false, false);
    check_preprocessing(900, 2.0, 5, true, false);
    check_preprocessing(900, 2.0, 1, false, true);
#endif
}
