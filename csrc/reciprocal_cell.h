// reciprocal_cell.h: the reciprocal lattice of one structure and the rows of its points inside a shell. CPU only.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "reflection_math.h"
#include "simulate.h"

namespace xrdfast {

// Points are searched a hair beyond the limit and then tested one by one, so that rounding in the row limits can't
// lose one. The test itself has pymatgen's tolerance.
constexpr double kSearchSlack = 1e-9;
constexpr double kShellTolerance = 1e-8;

// Reciprocal metric with the axes reordered so that the longest direct axis comes last: long rows of l.
struct ReciprocalCell {
    int axis[3];        // internal axis -> given axis
    double metric[6];   // g0.g0, g1.g1, g2.g2, g1.g2, g0.g2, g0.g1
    double length[3];   // direct axis lengths, ascending
    double volume;
    bool valid;
};

inline ReciprocalCell reciprocal_cell(const double* lattice) {
    ReciprocalCell cell{};
    double length[3];
    for (int i = 0; i < 3; ++i) {
        const double* v = lattice + 3 * i;
        length[i] = std::sqrt(v[0] * v[0] + v[1] * v[1] + v[2] * v[2]);
        cell.axis[i] = i;
    }
    std::stable_sort(cell.axis, cell.axis + 3, [&](int p, int q) { return length[p] < length[q]; });
    const double* v[3];
    for (int i = 0; i < 3; ++i) {
        v[i] = lattice + 3 * cell.axis[i];
        cell.length[i] = length[cell.axis[i]];
    }
    double g[3][3];
    for (int i = 0; i < 3; ++i) {
        const double *p = v[(i + 1) % 3], *q = v[(i + 2) % 3];
        g[i][0] = p[1] * q[2] - p[2] * q[1];
        g[i][1] = p[2] * q[0] - p[0] * q[2];
        g[i][2] = p[0] * q[1] - p[1] * q[0];
    }
    const double volume = v[0][0] * g[0][0] + v[0][1] * g[0][1] + v[0][2] * g[0][2];
    const double cube = length[0] * length[1] * length[2];
    cell.valid = std::isfinite(volume) && std::isfinite(cube) && std::fabs(volume) > 1e-6 * cube && cube > 0;
    if (!cell.valid) return cell;
    cell.volume = std::fabs(volume);
    for (auto& row : g)
        for (double& x : row) x /= volume;
    const auto dot = [&](int i, int j) { return g[i][0] * g[j][0] + g[i][1] * g[j][1] + g[i][2] * g[j][2]; };
    const double metric[6] = {dot(0, 0), dot(1, 1), dot(2, 2), dot(1, 2), dot(0, 2), dot(0, 1)};
    std::copy(metric, metric + 6, cell.metric);
    return cell;
}

// Checked before anything is listed, so that an absurd cell costs neither time nor memory. |h_i| <= g_max |a_i|.
inline SimulateStatus cell_status(const ReciprocalCell& cell, double g_max) {
    if (!cell.valid) return kBadLattice;
    const double longest = cell.length[2], volume = cell.volume;
    const double g = g_max + 0.5 * std::sqrt(cell.metric[0] + cell.metric[1] + cell.metric[2]);
    if (longest * g_max >= kMaxMillerIndex) return kCellTooLarge;
    if (2.0 / 3.0 * kPi * g * g * g * volume > static_cast<double>(kMaxReflections)) return kCellTooLarge;
    return kSimulated;
}

// Calls visit(h, k, l_begin, l_last) for each row of the half-space h > 0, or h = 0 and k > 0, or h = k = 0 and l > 0.
template <typename Visit>
void for_each_row(const ReciprocalCell& cell, double g_max, Visit visit) {
    const double* m = cell.metric;
    const double limit2 = g_max * g_max * (1.0 + kSearchSlack) + kSearchSlack * m[0];
    const double inv22 = 1.0 / m[2];
    // Schur complement over l, then over k: the smallest g^2 a (h, k) row and an h plane can have.
    const double s00 = m[0] - m[4] * m[4] * inv22, s11 = m[1] - m[3] * m[3] * inv22, s01 = m[5] - m[3] * m[4] * inv22;
    const double plane = s00 - s01 * s01 / s11;
    const int h_max = static_cast<int>(std::sqrt(limit2 / plane));
    for (int h = 0; h <= h_max; ++h) {
        const double k_room = (limit2 - h * h * plane) / s11;
        if (k_room < 0) continue;
        const double k_middle = -h * s01 / s11, k_half = std::sqrt(k_room);
        int k_begin = static_cast<int>(std::ceil(k_middle - k_half));
        const int k_last = static_cast<int>(std::floor(k_middle + k_half));
        if (h == 0) k_begin = std::max(k_begin, 0);
        for (int k = k_begin; k <= k_last; ++k) {
            const double row = h * h * s00 + k * k * s11 + 2.0 * h * k * s01;
            const double l_room = (limit2 - row) * inv22;
            if (l_room < 0) continue;
            const double l_middle = -(h * m[4] + k * m[3]) * inv22, l_half = std::sqrt(l_room);
            int l_begin = static_cast<int>(std::ceil(l_middle - l_half));
            const int l_last = static_cast<int>(std::floor(l_middle + l_half));
            if (h == 0 && k == 0) l_begin = std::max(l_begin, 1);
            if (l_begin <= l_last) visit(h, k, l_begin, l_last);
        }
    }
}

}  // namespace xrdfast
