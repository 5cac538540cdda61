// simulate.cpp: CPU structure factors.
//
// One structure: list the reciprocal-lattice points of one Friedel half-space inside the shell, as rows of constant
// (h, k); find which share a line (key = 2 theta in steps of 1e-5 degrees) so that form factors are evaluated once a
// line; sum the structure factors row by row; then merge into lines, or into families under the Laue group.
//
// Structure factors need no sine in the inner loop: exp(2 pi i h.r) is a product of three per-axis powers, made by
// recurrence. With P_j = occ_j X_j^h Y_j^k (one a row and atom) and Z_j^l, the four real sums of P and Z parts give
// both F(h,k,l) and F(h,k,-l): 4 fused multiply-adds for two reflections, eight l at a time in registers.
// Floors and what is reached: benchmarks/NOTES.md.
#include "simulate.h"

#include <algorithm>
#include <atomic>
#include <utility>

#include "block_math.h"
#include "reciprocal_cell.h"
#include "reflection_math.h"
#include "thread_own.h"

namespace xrdfast {
namespace {

constexpr int kLanes = 8;  // l of a block: a vector of AVX-512, two of AVX2

struct Row {
    int32_t h, k;             // in the internal axis order
    int32_t l_begin, l_last;  // inclusive
    int64_t start;            // index of the first reflection
};

// A run of atoms of one element and one B: they share f(s) exp(-B s^2).
struct Species {
    int element;
    double b_iso;
    int64_t begin, end;  // in the sorted atom order
};

// Everything one structure needs; kept by the thread, so that small structures allocate nothing.
struct Workspace {
    std::vector<Row> rows;
    std::vector<int16_t> hkl[3];               // (n) given axis order
    std::vector<double> g2, two_theta, sin2;   // (n)
    std::vector<uint32_t> key, line_of;        // (n)
    std::vector<double> line_g2, line_f, line_f2;  // (n_lines)
    std::vector<int64_t> line_start;           // (n_lines + 1), in sorted order
    std::vector<double> re, im, re2, im2;      // (n) F without and with f'' as its factor
    std::vector<double> f_squared;             // (n)
    std::vector<int64_t> atoms;
    std::vector<Species> species;
    std::vector<double> x_re, x_im, y_re, y_im, z, p;
    std::vector<double> sums;                  // four sums a |l|
    std::vector<uint32_t> code;
    std::vector<int16_t> orbit;
    KeySorter sorter, code_sorter;
    const uint32_t* order = nullptr;
    int64_t n = 0, n_inside = 0, n_lines = 0;
};

// exp(2 pi i n t) for n = 0 .. n_max into re[n * stride], im[n * stride]; t is reduced first, so large n keeps 1e-15 n.
void power_table(double t, int n_max, double scale, double* re, double* im, int64_t stride) {
    t -= std::nearbyint(t);
    const double c = std::cos(2 * kPi * t), s = std::sin(2 * kPi * t);
    double u = scale, v = 0.0;
    for (int n = 0; n <= n_max; ++n) {
        re[n * stride] = u;
        im[n * stride] = v;
        const double next = u * c - v * s;
        v = u * s + v * c;
        u = next;
    }
}

XRDFAST_CLONES void reflection_angles(int64_t n, double quarter_wavelength2, double g2_min, double g2_max,
                                      const double* __restrict g2, double* __restrict sin2,
                                      double* __restrict two_theta, uint32_t* __restrict key) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        double x = g2[i] * quarter_wavelength2;
        x = x > 1.0 ? 1.0 : x;
        const double angle = two_theta_of(x);
        sin2[i] = x;
        two_theta[i] = angle;
        key[i] = g2[i] >= g2_min && g2[i] <= g2_max ? merge_key(angle) : kOutsideKey;
    }
}

// f(s) at s^2 = g^2 / 4.
XRDFAST_CLONES void form_factors(int64_t n, const double* __restrict g2, const double* coefficients, bool mott_bethe,
                                 double* __restrict f) {
    std::memset(f, 0, static_cast<size_t>(n) * sizeof(double));
    for (int k = 0; k < kGaussians; ++k) {
        const double a = coefficients[k], b = -0.25 * coefficients[kGaussians + k];
        if (a == 0.0) continue;
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) f[i] += a * exp_nonpositive(b * g2[i]);
    }
    const double c = coefficients[2 * kGaussians];
    if (mott_bethe) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) f[i] = c - 0.25 * 41.78214 * g2[i] * f[i];
    } else {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) f[i] += c;
    }
}

XRDFAST_CLONES void damp(int64_t n, const double* __restrict g2, double b_iso, double* __restrict f) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) f[i] *= exp_nonpositive(-0.25 * b_iso * g2[i]);
}

// Sums over atoms of P.re Z.re, P.im Z.im, P.re Z.im, P.im Z.re for |l| in blocks [first, last] of eight: two vectors
// side by side, of one block or of two.
struct RowSums {
    int64_t n_atoms;
    int first, last;
    const double* z;  // (n_blocks, n_atoms, 2, kLanes)
    const double* p;  // (n_atoms, 2)
    double* sums;     // (n_blocks, 4, kLanes)

    template <int kBytes>
    XRDFAST_INLINE void run() const {
        using S = Simd<double, kBytes>;
        static_assert(kLanes % S::kLanes == 0, "a vector lies in one block");
        int lane = first * kLanes;
        const int end = (last + 1) * kLanes;
        for (; lane + S::kBlock <= end; lane += S::kBlock) add<S, 2>(lane);
        if (lane < end) add<S, 1>(lane);
    }

    template <class S, int kVectors>
    XRDFAST_INLINE void add(int lane) const {
        using V = typename S::Vector;
        const double* from[kVectors];
        double* to[kVectors];
        V rr[kVectors] = {}, ii[kVectors] = {}, ri[kVectors] = {}, ir[kVectors] = {};
        for (int v = 0; v < kVectors; ++v, lane += S::kLanes) {
            from[v] = z + lane / kLanes * n_atoms * 2 * kLanes + lane % kLanes;
            to[v] = sums + lane / kLanes * 4 * kLanes + lane % kLanes;
        }
        for (int64_t j = 0; j < n_atoms; ++j) {
            const double pr = p[2 * j], pi = p[2 * j + 1];
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) {
                const V zr = load<V>(from[v] + j * 2 * kLanes), zi = load<V>(from[v] + j * 2 * kLanes + kLanes);
                rr[v] += zr * pr;
                ii[v] += zi * pi;
                ri[v] += zi * pr;
                ir[v] += zr * pi;
            }
        }
        for (int v = 0; v < kVectors; ++v) {
            store(to[v], rr[v]);
            store(to[v] + kLanes, ii[v]);
            store(to[v] + 2 * kLanes, ri[v]);
            store(to[v] + 3 * kLanes, ir[v]);
        }
    }
};

XRDFAST_CLONES void row_prefactors(int64_t n, const double* __restrict xr, const double* __restrict xi,
                                   const double* __restrict yr, const double* __restrict yi, double sign,
                                   double* __restrict p) {
    for (int64_t j = 0; j < n; ++j) {
        const double s = sign * yi[j];
        p[2 * j] = xr[j] * yr[j] - xi[j] * s;
        p[2 * j + 1] = xr[j] * s + xi[j] * yr[j];
    }
}

// F += f S over one row, from the four sums: S(l) = (rr - ii) + i (ri + ir), S(-l) = (rr + ii) + i (ir - ri).
XRDFAST_INLINE void accumulate_row(const Row& row, const double* sums, const uint32_t* line_of, const double* f,
                                   double* re, double* im) {
    for (int l = row.l_begin; l <= row.l_last; ++l) {
        const int m = l < 0 ? -l : l;
        const double sign = l < 0 ? 1.0 : -1.0;
        const double* s = sums + (m / kLanes) * 4 * kLanes + m % kLanes;
        const int64_t i = row.start + (l - row.l_begin);
        const double scale = f[line_of[i]];
        re[i] += scale * (s[0] + sign * s[kLanes]);
        im[i] += scale * (s[3 * kLanes] - sign * s[2 * kLanes]);
    }
}

class Simulator {
   public:
    explicit Simulator(const StructureBatch& batch) : batch_(batch) {}

    // Fills the workspace up to |F|^2 a reflection (Friedel mean). Order: rows; sorted order and lines.
    SimulateStatus reflections(int64_t structure, Workspace& ws) const {
        const ReciprocalCell cell = reciprocal_cell(batch_.lattice + 9 * structure);
        const SimulateStatus refused = cell_status(cell, batch_.g_max);
        if (refused != kSimulated) return refused;
        int reach[3] = {0, 0, 0};
        list_rows(cell, ws, reach);
        sort_lines(ws);
        if (ws.n_inside == 0) return kNoReflection;
        const int64_t begin = batch_.atom_offset[structure], end = batch_.atom_offset[structure + 1];
        if (!group_species(begin, end, ws)) return kUnknownElement;
        ws.re.assign(ws.n, 0.0);
        ws.im.assign(ws.n, 0.0);
        if (batch_.dispersion) {
            ws.re2.assign(ws.n, 0.0);
            ws.im2.assign(ws.n, 0.0);
        }
        for (const Species& species : ws.species) add_species(cell, species, reach, ws);
        ws.f_squared.resize(ws.n);
        for (int64_t i = 0; i < ws.n; ++i) ws.f_squared[i] = ws.re[i] * ws.re[i] + ws.im[i] * ws.im[i];
        if (batch_.dispersion)  // |F(h)|^2 and |F(-h)|^2 differ; their mean is |U|^2 + |V|^2, U with f' and V with f''
            for (int64_t i = 0; i < ws.n; ++i) ws.f_squared[i] += ws.re2[i] * ws.re2[i] + ws.im2[i] * ws.im2[i];
        return kSimulated;
    }

   private:
    const double* coefficients(int element) const { return batch_.form_factor + element * kFormFactorColumns; }

    void list_rows(const ReciprocalCell& cell, Workspace& ws, int* reach) const {
        ws.rows.clear();
        int64_t n = 0;
        for_each_row(cell, batch_.g_max + kShellTolerance, [&](int h, int k, int l_begin, int l_last) {
            ws.rows.push_back({h, k, l_begin, l_last, n});
            n += l_last - l_begin + 1;
            reach[0] = std::max(reach[0], h);
            reach[1] = std::max(reach[1], std::abs(k));
            reach[2] = std::max({reach[2], std::abs(l_begin), std::abs(l_last)});
        });
        ws.n = n;
        ws.g2.resize(n);
        for (auto& index : ws.hkl) index.resize(n);
        int16_t* out[3];
        for (int i = 0; i < 3; ++i) out[i] = ws.hkl[cell.axis[i]].data();
        int place[3];  // given axis -> internal axis
        for (int i = 0; i < 3; ++i) place[cell.axis[i]] = i;
        const double* m = cell.metric;
        for (const Row& row : ws.rows) {
            const double h = row.h, k = row.k;
            const double constant = h * h * m[0] + k * k * m[1] + 2.0 * h * k * m[5];
            const double linear = 2.0 * (k * m[3] + h * m[4]);
            double* g2 = ws.g2.data() + row.start;
            const int count = row.l_last - row.l_begin + 1;
            for (int i = 0; i < count; ++i) {
                const double l = row.l_begin + i;
                g2[i] = constant + l * (linear + l * m[2]);
                // The half-space of the internal axes need not be that of the given ones: name the mate there.
                const int index[3] = {row.h, row.k, row.l_begin + i};
                const int a = index[place[0]], b = index[place[1]], c = index[place[2]];
                const int sign = a != 0 ? (a > 0) - (a < 0) : b != 0 ? (b > 0) - (b < 0) : (c > 0) - (c < 0);
                for (int j = 0; j < 3; ++j) out[j][row.start + i] = static_cast<int16_t>(sign * index[j]);
            }
        }
    }

    void sort_lines(Workspace& ws) const {
        const int64_t n = ws.n;
        ws.sin2.resize(n);
        ws.two_theta.resize(n);
        ws.key.resize(n);
        ws.line_of.resize(n);
        const double low = std::max(batch_.g_min, 0.0), high = batch_.g_max + kShellTolerance;
        reflection_angles(n, 0.25 * batch_.wavelength * batch_.wavelength, low * low, high * high, ws.g2.data(),
                          ws.sin2.data(), ws.two_theta.data(), ws.key.data());
        ws.order = ws.sorter.sort(ws.key.data(), n);
        ws.line_start.clear();
        ws.line_g2.clear();
        uint32_t previous = kOutsideKey;
        ws.n_inside = n;
        for (int64_t i = 0; i < n; ++i) {
            const uint32_t index = ws.order[i], key = ws.key[index];
            if (key == kOutsideKey) {
                if (ws.n_inside == n) ws.n_inside = i;
                ws.line_of[index] = 0;  // never read; keeps the gather in bounds
                continue;
            }
            if (key != previous) {
                ws.line_start.push_back(i);
                ws.line_g2.push_back(ws.g2[index]);
                previous = key;
            }
            ws.line_of[index] = static_cast<uint32_t>(ws.line_start.size() - 1);
        }
        ws.n_lines = static_cast<int64_t>(ws.line_start.size());
        if (ws.n_lines == 0) ws.n_inside = 0;
        ws.line_start.push_back(ws.n_inside);
    }

    bool group_species(int64_t begin, int64_t end, Workspace& ws) const {
        ws.atoms.clear();
        for (int64_t j = begin; j < end; ++j) {
            const int element = batch_.atomic_number[j];
            if (element >= batch_.n_elements || std::isnan(coefficients(element)[2 * kGaussians])) return false;
            ws.atoms.push_back(j);
        }
        const auto before = [&](int64_t p, int64_t q) {
            const int zp = batch_.atomic_number[p], zq = batch_.atomic_number[q];
            return zp != zq ? zp < zq : batch_.b_iso[p] < batch_.b_iso[q];
        };
        if (!std::is_sorted(ws.atoms.begin(), ws.atoms.end(), before))
            std::stable_sort(ws.atoms.begin(), ws.atoms.end(), before);
        ws.species.clear();
        for (int64_t i = 0; i < static_cast<int64_t>(ws.atoms.size()); ++i) {
            const int64_t j = ws.atoms[i];
            const int element = batch_.atomic_number[j];
            if (ws.species.empty() || ws.species.back().element != element ||
                ws.species.back().b_iso != batch_.b_iso[j])
                ws.species.push_back({element, batch_.b_iso[j], i, i});
            ws.species.back().end = i + 1;
        }
        return true;
    }

    void add_species(const ReciprocalCell& cell, const Species& species, const int* reach, Workspace& ws) const {
        const int64_t n = species.end - species.begin;
        const int n_blocks = reach[2] / kLanes + 1;
        ws.x_re.resize((reach[0] + 1) * n);
        ws.x_im.resize((reach[0] + 1) * n);
        ws.y_re.resize((reach[1] + 1) * n);
        ws.y_im.resize((reach[1] + 1) * n);
        ws.z.resize(static_cast<int64_t>(n_blocks) * n * 2 * kLanes);
        ws.p.resize(2 * n);
        ws.sums.resize(static_cast<int64_t>(n_blocks) * 4 * kLanes);
        double table[2 * (kMaxMillerIndex + kLanes + 1)];
        for (int64_t i = 0; i < n; ++i) {
            const int64_t atom = ws.atoms[species.begin + i];
            const double* r = batch_.fractional + 3 * atom;
            power_table(r[cell.axis[0]], reach[0], batch_.occupancy[atom], ws.x_re.data() + i, ws.x_im.data() + i, n);
            power_table(r[cell.axis[1]], reach[1], 1.0, ws.y_re.data() + i, ws.y_im.data() + i, n);
            const int count = n_blocks * kLanes;
            power_table(r[cell.axis[2]], count - 1, 1.0, table, table + count, 1);
            for (int block = 0; block < n_blocks; ++block) {
                double* z = ws.z.data() + (static_cast<int64_t>(block) * n + i) * 2 * kLanes;
                std::copy(table + block * kLanes, table + (block + 1) * kLanes, z);
                std::copy(table + count + block * kLanes, table + count + (block + 1) * kLanes, z + kLanes);
            }
        }
        ws.line_f.resize(ws.n_lines);
        const int e = species.element;
        form_factors(ws.n_lines, ws.line_g2.data(), coefficients(e), batch_.mott_bethe, ws.line_f.data());
        if (batch_.dispersion) {
            ws.line_f2.assign(ws.n_lines, batch_.dispersion[2 * e + 1]);
            for (double& f : ws.line_f) f += batch_.dispersion[2 * e];
        }
        if (species.b_iso != 0.0) {
            damp(ws.n_lines, ws.line_g2.data(), species.b_iso, ws.line_f.data());
            if (batch_.dispersion) damp(ws.n_lines, ws.line_g2.data(), species.b_iso, ws.line_f2.data());
        }
        for (const Row& row : ws.rows) {
            const int k = std::abs(row.k);
            row_prefactors(n, ws.x_re.data() + row.h * n, ws.x_im.data() + row.h * n, ws.y_re.data() + k * n,
                           ws.y_im.data() + k * n, row.k < 0 ? -1.0 : 1.0, ws.p.data());
            const int low = std::abs(row.l_begin), high = std::abs(row.l_last);
            const bool crosses = row.l_begin <= 0 && row.l_last >= 0;
            run_best(RowSums{n, (crosses ? 0 : std::min(low, high)) / kLanes, std::max(low, high) / kLanes,
                             ws.z.data(), ws.p.data(), ws.sums.data()});
            accumulate_row(row, ws.sums.data(), ws.line_of.data(), ws.line_f.data(), ws.re.data(), ws.im.data());
            if (batch_.dispersion)
                accumulate_row(row, ws.sums.data(), ws.line_of.data(), ws.line_f2.data(), ws.re2.data(),
                               ws.im2.data());
        }
    }

    const StructureBatch& batch_;
};

XRDFAST_CLONES void line_strengths(int64_t n, const double* __restrict sin2, double* __restrict f_squared) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) f_squared[i] *= lorentz_polarisation(sin2[i]);
}

bool larger_hkl(const Workspace& ws, uint32_t p, uint32_t q) {
    for (const auto& index : ws.hkl)
        if (index[p] != index[q]) return index[p] > index[q];
    return false;
}

// Appends one structure's lines, none where there is no intensity. A line has the smallest angle of its members and is
// named by their largest (h, k, l).
void merge_lines(Workspace& ws, std::vector<MergedLine>& rows) {
    line_strengths(ws.n, ws.sin2.data(), ws.f_squared.data());
    std::vector<double>& strength = ws.line_f;
    strength.resize(ws.n_lines);  // a structure without atoms has left it as it was
    double strongest = 0.0;
    for (int64_t line = 0; line < ws.n_lines; ++line) {
        double sum = 0.0;
        for (int64_t i = ws.line_start[line]; i < ws.line_start[line + 1]; ++i) sum += ws.f_squared[ws.order[i]];
        strength[line] = sum;
        strongest = sum > strongest ? sum : strongest;
    }
    if (!(strongest > 0.0) || !std::isfinite(strongest)) return;
    for (int64_t line = 0; line < ws.n_lines; ++line) {
        const double scaled = strength[line] / strongest * 100.0;
        if (!(scaled > kMinScaledIntensity)) continue;
        uint32_t lowest = ws.order[ws.line_start[line]], name = lowest;
        for (int64_t i = ws.line_start[line] + 1; i < ws.line_start[line + 1]; ++i) {
            const uint32_t index = ws.order[i];
            if (ws.g2[index] < ws.g2[lowest]) lowest = index;
            if (larger_hkl(ws, index, name)) name = index;
        }
        rows.push_back({ws.two_theta[lowest],
                        scaled,
                        1.0 / std::sqrt(ws.g2[lowest]),
                        {ws.hkl[0][name], ws.hkl[1][name], ws.hkl[2][name]}});
    }
}

// code = largest image of hkl under the group and inversion; orbit = number of distinct images.
XRDFAST_CLONES void canonical_codes(int64_t n, const int16_t* h, const int16_t* k, const int16_t* l,
                                    const int8_t* rotations, int64_t n_rotations, uint32_t* __restrict code,
                                    int16_t* __restrict hits) {
    constexpr int kShift = kMaxMillerIndex + 1;
    for (int64_t i = 0; i < n; ++i) code[i] = 0, hits[i] = 0;
    for (int64_t r = 0; r < n_rotations; ++r) {
        const int8_t* w = rotations + 9 * r;
        for (int64_t i = 0; i < n; ++i) {
            const int a = h[i] * w[0] + k[i] * w[3] + l[i] * w[6];
            const int b = h[i] * w[1] + k[i] * w[4] + l[i] * w[7];
            const int c = h[i] * w[2] + k[i] * w[5] + l[i] * w[8];
            // Unsigned: rotations that are not the cell's own may lead anywhere, and then wrap.
            const uint32_t plus = (static_cast<uint32_t>(kShift + a) << 20) +
                                  (static_cast<uint32_t>(kShift + b) << 10) + static_cast<uint32_t>(kShift + c);
            const uint32_t minus = (static_cast<uint32_t>(kShift - a) << 20) +
                                   (static_cast<uint32_t>(kShift - b) << 10) + static_cast<uint32_t>(kShift - c);
            const uint32_t image = plus > minus ? plus : minus;
            hits[i] = static_cast<int16_t>(image > code[i] ? 1 : hits[i] + (image == code[i]));
            code[i] = image > code[i] ? image : code[i];
        }
    }
}

// Appends one structure's families in order of angle.
void group_families(Workspace& ws, const int8_t* rotations, int64_t n_rotations, double relative_cutoff,
                    std::vector<ReflectionFamily>& rows) {
    static const int8_t kIdentity[9] = {1, 0, 0, 0, 1, 0, 0, 0, 1};
    if (n_rotations == 0) rotations = kIdentity, n_rotations = 1;
    const int64_t n = ws.n;
    ws.code.resize(n);
    ws.orbit.resize(n);
    canonical_codes(n, ws.hkl[0].data(), ws.hkl[1].data(), ws.hkl[2].data(), rotations, n_rotations, ws.code.data(),
                    ws.orbit.data());
    for (int64_t i = 0; i < n; ++i)
        if (ws.key[i] == kOutsideKey) ws.code[i] = kOutsideKey;
    const uint32_t* order = ws.code_sorter.sort(ws.code.data(), n);
    // re, im and line_of have served; the families take their room.
    std::vector<double>& mean = ws.re;
    std::vector<double>& strength = ws.im;
    std::vector<uint32_t>& member = ws.line_of;
    int64_t n_families = 0;
    double strongest = 0.0;
    for (int64_t i = 0; i < n && ws.code[order[i]] != kOutsideKey;) {
        const uint32_t first = order[i];
        double sum = 0.0;
        int64_t j = i;
        for (; j < n && ws.code[order[j]] == ws.code[first]; ++j) sum += ws.f_squared[order[j]];
        const int multiplicity = static_cast<int>(2 * n_rotations / ws.orbit[first]);
        mean[n_families] = sum / static_cast<double>(j - i);
        strength[n_families] = mean[n_families] * multiplicity * lorentz_polarisation(ws.sin2[first]);
        strongest = std::max(strongest, strength[n_families]);
        member[n_families++] = first;
        i = j;
    }
    if (!(strongest > 0.0) || !std::isfinite(strongest)) return;
    std::vector<uint32_t>& family_key = ws.code;  // read to the end above
    std::vector<uint32_t> codes(n_families);
    for (int64_t f = 0; f < n_families; ++f) codes[f] = ws.code[member[f]];
    for (int64_t f = 0; f < n_families; ++f)
        family_key[f] = strength[f] > relative_cutoff * strongest ? ws.key[member[f]] : kOutsideKey;
    const uint32_t* by_angle = ws.sorter.sort(family_key.data(), n_families);
    const auto index = [](uint32_t bits) {
        return static_cast<int16_t>(static_cast<int>(bits & 1023) - (kMaxMillerIndex + 1));
    };
    for (int64_t i = 0; i < n_families && family_key[by_angle[i]] != kOutsideKey; ++i) {
        const uint32_t f = by_angle[i], c = codes[f];
        rows.push_back({{index(c >> 20), index(c >> 10), index(c)},
                        static_cast<int16_t>(2 * n_rotations / ws.orbit[member[f]]),
                        static_cast<float>(mean[f])});
    }
}

// Runs `finish(ws, structure, rows)`, which appends the structure's rows, for every structure in parallel.
template <typename Row, typename Finish>
Simulated<Row> simulate_all(const StructureBatch& batch, int n_threads, Finish finish) {
    const Simulator simulator(batch);
    const int64_t n = batch.n_structures;
    const int n_used = static_cast<int>(std::clamp<int64_t>(n, 1, std::max(n_threads, 1)));
    constexpr size_t kRowsAPiece = 1 << 14;  // larger vectors would come as fresh pages again and again
    Simulated<Row> found;
    found.pieces.resize(n_used);
    found.place.resize(n);
    found.status.resize(n);
    std::atomic<int> n_begun{0};
#pragma omp parallel num_threads(n_used) if (n_used > 1)
    {
        Workspace& ws = thread_own<Workspace>();
        const int thread = n_begun++;
        std::vector<std::vector<Row>> pieces(1);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < n; ++i) {
            if (pieces.back().size() >= kRowsAPiece) pieces.emplace_back();
            std::vector<Row>& rows = pieces.back();
            const auto begin = static_cast<int64_t>(rows.size());
            SimulateStatus code = simulator.reflections(i, ws);
            if (code == kSimulated) finish(ws, i, rows);
            const auto n_rows = static_cast<int64_t>(rows.size()) - begin;
            if (code == kSimulated && n_rows == 0) code = kNoIntensity;
            found.place[i] = {thread, static_cast<int64_t>(pieces.size()) - 1, begin, n_rows};
            found.status[i] = code;
        }
        found.pieces[thread] = std::move(pieces);
    }
    for (const auto& place : found.place) found.n_rows += place.rows;
    return found;
}

// Writes offset and status, and gives `put(row, at)` every row with its place.
template <typename Row, typename Put>
void write_all(const Simulated<Row>& found, int64_t* offset, int32_t* status, int n_threads, Put put) {
    const auto n = static_cast<int64_t>(found.place.size());
    offset[0] = 0;
    for (int64_t i = 0; i < n; ++i) offset[i + 1] = offset[i] + found.place[i].rows;
    std::copy(found.status.begin(), found.status.end(), status);
#pragma omp parallel for num_threads(n_threads) if (n > 1 && n_threads > 1)
    for (int64_t i = 0; i < n; ++i) {
        const auto& place = found.place[i];
        const Row* row = found.pieces[place.thread][place.piece].data() + place.begin;
        for (int64_t j = 0; j < place.rows; ++j) put(row[j], offset[i] + j);
    }
}

}  // namespace

SimulatedLines simulate_lines_cpu(const StructureBatch& batch, int n_threads) {
    return simulate_all<MergedLine>(batch, n_threads,
                              [](Workspace& ws, int64_t, std::vector<MergedLine>& rows) { merge_lines(ws, rows); });
}

SimulatedFamilies simulate_families_cpu(const StructureBatch& batch, const FamilyRules& rules, int n_threads) {
    return simulate_all<ReflectionFamily>(batch, n_threads, [&](Workspace& ws, int64_t i, std::vector<ReflectionFamily>& rows) {
        const int64_t begin = rules.rotation_offset[i], n_rotations = rules.rotation_offset[i + 1] - begin;
        group_families(ws, rules.rotations + 9 * begin, n_rotations, rules.relative_cutoff, rows);
    });
}

void write_rows(const SimulatedLines& found, const LinesOutput& out, int n_threads) {
    write_all(found, out.offset, out.status, n_threads, [&](const MergedLine& line, int64_t at) {
        out.two_theta[at] = line.two_theta;
        out.intensity[at] = line.intensity;
        out.d_spacing[at] = line.d_spacing;
        std::copy_n(line.hkl, 3, out.hkl + 3 * at);
    });
}

void write_rows(const SimulatedFamilies& found, const FamiliesOutput& out, int n_threads) {
    write_all(found, out.offset, out.status, n_threads, [&](const ReflectionFamily& family, int64_t at) {
        std::copy_n(family.hkl, 3, out.hkl + 3 * at);
        out.multiplicity[at] = family.multiplicity;
        out.f_squared[at] = family.f_squared;
    });
}

}  // namespace xrdfast
