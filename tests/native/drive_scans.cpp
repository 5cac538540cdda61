// drive_scans.cpp: measured scans of any length and content onto grids of any size.
#include <algorithm>
#include <cmath>

#include "active_patches.h"
#include "hostile.h"
#include "preprocess.h"

using namespace xrdfast;

void drive_scans(Random& random) {
    const int64_t n_scans = random.integer(0, 4), n_points = random.integer(1, 500);
    const int64_t n_patches = (n_points + kPatchPoints - 1) / kPatchPoints;
    const Block<int64_t> offset(n_scans + 1);
    for (int64_t s = 0; s < n_scans; ++s)
        offset[s + 1] = offset[s] + (random.one_in(3) ? random.integer(0, 3) : random.integer(4, 700));
    const int64_t n_total = offset[n_scans];
    const Block<double> two_theta(n_total), wavelength(n_scans), second(n_scans);
    const Block<float> intensity(n_total), pattern(n_scans * n_points);
    const Block<int32_t> measured(2 * n_scans), active(n_scans);
    const Block<int16_t> patch(n_scans * n_patches);
    const bool hostile = random.one_in(2);
    for (int64_t s = 0; s < n_scans; ++s) {
        wavelength[s] = random.real(0.3, 2.5);
        second[s] = random.one_in(2) ? 0.0 : wavelength[s] * random.real(1.0001, 1.01);
        double angle = random.real(1e-3, 60);
        const double step = random.real(1e-4, (179.0 - angle) / static_cast<double>(offset[s + 1] - offset[s] + 1));
        for (int64_t i = offset[s]; i < offset[s + 1]; ++i) {
            two_theta[i] = angle;
            angle += step * (random.one_in(5) ? random.real(0.01, 1.0) : 1.0);
            intensity[i] = static_cast<float>(hostile ? random.number(0, 1e4) : random.real(0, 1e4));
        }
    }
    expect(angles_rise_cpu(offset.get(), two_theta.get(), n_scans), "angles rise");
    const double begin = random.real(0, 60);
    preprocess_scans_cpu({offset.get(), two_theta.get(), intensity.get(), wavelength.get(), second.get(),
                          pattern.get(), measured.get(), active.get(), patch.get(), n_scans, n_points,
                          2 * random.integer(0, 50) + 1, random.one_in(3) ? 0.0 : random.real(0, 30),
                          random.real(0, 5), random.one_in(2), random.real(0.3, 2.5), begin,
                          random.real(1e-3, (180 - begin) / static_cast<double>(n_points))},
                         1);
    for (int64_t i = 0; i < pattern.size(); ++i)
        expect(pattern[i] >= 0.0f && pattern[i] <= 100.0f, "prepared points lie in [0, 100]");
    for (int64_t s = 0; s < n_scans; ++s) {
        const int32_t first = measured[2 * s], last = measured[2 * s + 1];
        expect(0 <= first && first <= last && last <= n_points, "the measured range lies on the grid");
        expect(0 <= active[s] && active[s] <= n_patches, "no more patches than there are");
        for (int64_t j = 0; j < n_patches; ++j)
            expect(j < active[s] ? patch[s * n_patches + j] >= 0 : patch[s * n_patches + j] == -1,
                   "active patches first, then -1");
    }
}
