// drive_retrieval.cpp: the part of drive_cpu that matches structures.
#include "retrieval.h"

#include "hostile.h"

using namespace xrdfast;

void drive_retrieval(Random& random) {
    const int64_t n_scans = random.integer(0, 3), n_points = random.integer(2, 400), n_candidates = random.integer(0, 5);
    const int64_t n_structures = random.integer(1, 4);
    Block<int64_t> offset(n_structures + 1), candidate(n_scans * n_candidates);
    for (int64_t i = 0; i < n_structures; ++i) offset[i + 1] = offset[i] + random.integer(0, 20);
    const int64_t n_lines = offset[n_structures];
    Block<float> amplitude(n_scans * n_points), weight(n_points), line_amplitude(n_lines);
    Block<int32_t> measured(2 * n_scans);
    Block<int16_t> hkl(3 * n_lines);
    Block<double> metric(6 * n_structures), change(36 * n_structures);
    Block<float> score(candidate.size()), fit(kFitParameters * candidate.size());
    const bool harmless = random.one_in(2);
    const auto number = [&](double low, double high) { return harmless ? random.real(low, high) : random.number(low, high); };
    for (int64_t i = 0; i < amplitude.size(); ++i) amplitude[i] = static_cast<float>(number(0, 10));
    for (int64_t i = 0; i < n_points; ++i) weight[i] = static_cast<float>(number(0, 2));
    for (int64_t i = 0; i < n_lines; ++i) line_amplitude[i] = static_cast<float>(number(0, 10));
    for (int64_t i = 0; i < hkl.size(); ++i) hkl[i] = static_cast<int16_t>(random.integer(-6, 6));
    for (int64_t i = 0; i < metric.size(); ++i) metric[i] = number(i % 6 < 3 ? 0.01 : -0.01, 0.05);
    for (int64_t i = 0; i < change.size(); ++i) change[i] = random.one_in(9) ? 0.0 : number(-0.05, 0.05);
    for (int64_t i = 0; i < candidate.size(); ++i) candidate[i] = random.integer(-1, n_structures - 1);
    for (int64_t i = 0; i < n_scans; ++i) {
        measured[2 * i] = static_cast<int32_t>(random.integer(0, n_points));
        measured[2 * i + 1] = static_cast<int32_t>(random.integer(measured[2 * i], n_points));
    }
    const double step = random.real(0.0004, 0.01);
    match_structures_cpu({amplitude.get(), measured.get(), weight.get(), candidate.get(), offset.get(), hkl.get(),
                          line_amplitude.get(), metric.get(), change.get(), score.get(), fit.get(), n_scans, n_points,
                          n_candidates, random.real(-3, -1), step, random.real(0.3, 2.3)},
                         1);
    for (int64_t i = 0; i < candidate.size(); ++i) {
        if (candidate[i] < 0) expect(score[i] == -1.0f, "no candidate, no score");
        if (candidate[i] >= 0 && harmless)
            expect(score[i] >= 0.0f && score[i] <= 1.0001f, "a cosine of what is not negative lies in [0, 1]");
    }
}
