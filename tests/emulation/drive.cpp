// drive.cpp: runs every kernel natively, so that sanitizers see all of it, and compares with sums written out in
// double. Buffers are heap blocks of the exact size. Usage: drive N_STRUCTURES N_ATOMS; exit 1 on a mismatch.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <tuple>
#include <vector>

#include "drive.h"
#include "dsr_loss.h"
#include "peak_attention.h"
#include "render.h"
#include "render_patterns.h"
#include "simulate.h"

using namespace xrdfast;

namespace {

using Index = std::tuple<int, int, int>;

struct Structures {
    std::vector<int64_t> atom_offset{0}, rotation_offset{0};
    std::vector<double> lattice, fractional, occupancy, b_iso, form_factor, dispersion;
    std::vector<uint8_t> number;
    std::vector<int8_t> rotations;
    int64_t n;

    Structures(int64_t n_structures, int n_atoms) : n(n_structures) {
        std::mt19937 random(5);
        std::uniform_real_distribution<double> unit(0.0, 1.0);
        constexpr int kElements = 3;
        for (int e = 0; e < kElements; ++e) {
            for (int i = 0; i < kFormFactorColumns; ++i) form_factor.push_back(0.2 + 2.0 * unit(random));
            dispersion.push_back(-unit(random));
            dispersion.push_back(2.0 * unit(random));
        }
        const int8_t two_fold[9] = {-1, 0, 0, 0, -1, 0, 0, 0, 1}, identity[9] = {1, 0, 0, 0, 1, 0, 0, 0, 1};
        for (int64_t s = 0; s < n; ++s) {
            for (int i = 0; i < 9; ++i) {
                // The first is flat and large: more rows and reflections than one block has threads for.
                const double edge = s == 0 && i < 8 ? 15.0 : 3.5;
                const double x = i % 4 ? 0.6 * unit(random) : edge + unit(random);
                lattice.push_back(s == 1 ? 0.0 : x);
            }
            const int atoms = s % 3 == 2 ? 1 : n_atoms;
            for (int j = 0; j < atoms; ++j) {
                for (int i = 0; i < 3; ++i) fractional.push_back(4.0 * unit(random) - 2.0);
                occupancy.push_back(unit(random));
                b_iso.push_back(j % 2 ? unit(random) : 0.0);
                number.push_back(static_cast<uint8_t>(j * kElements / atoms));
            }
            atom_offset.push_back(atom_offset.back() + atoms);
            if (s == 0)
                for (const int8_t* w : {identity, two_fold}) rotations.insert(rotations.end(), w, w + 9);
            rotation_offset.push_back(static_cast<int64_t>(rotations.size()) / 9);
        }
    }

    StructureBatch batch(bool with_dispersion, bool mott_bethe) const {
        return {atom_offset.data(), lattice.data(), number.data(), fractional.data(), occupancy.data(), b_iso.data(),
                form_factor.data(), with_dispersion ? dispersion.data() : nullptr, n, 3, mott_bethe, 1.54056, 0.06,
                0.7};
    }

    double f_squared(const StructureBatch& b, int64_t s, const int16_t* hkl, double s2) const {
        double u[2] = {0, 0}, v[2] = {0, 0};
        for (int64_t j = atom_offset[s]; j < atom_offset[s + 1]; ++j) {
            const double* c = b.form_factor + kFormFactorColumns * number[j];
            double f = 0.0;
            for (int i = 0; i < kGaussians; ++i) f += c[i] * std::exp(-c[kGaussians + i] * s2);
            f = c[2 * kGaussians] + (b.mott_bethe ? -41.78214 * s2 : 1.0) * f;
            const double weight = occupancy[j] * std::exp(-b_iso[j] * s2), *r = fractional.data() + 3 * j;
            const double phase = 2 * kPi * (hkl[0] * r[0] + hkl[1] * r[1] + hkl[2] * r[2]);
            const double f1 = b.dispersion ? b.dispersion[2 * number[j]] : 0.0;
            const double f2 = b.dispersion ? b.dispersion[2 * number[j] + 1] : 0.0;
            u[0] += weight * (f + f1) * std::cos(phase);
            u[1] += weight * (f + f1) * std::sin(phase);
            v[0] += weight * f2 * std::cos(phase);
            v[1] += weight * f2 * std::sin(phase);
        }
        return u[0] * u[0] + u[1] * u[1] + v[0] * v[0] + v[1] * v[1];
    }

    // 1 / d^2 by Cramer's rule, and the members of the half-space by brute force.
    std::map<Index, double> shell(const StructureBatch& b, int64_t s) const {
        std::map<Index, double> found;
        const double* a = lattice.data() + 9 * s;
        const auto minor = [&](int i, int j) {
            const int i1 = (i + 1) % 3, i2 = (i + 2) % 3, j1 = (j + 1) % 3, j2 = (j + 2) % 3;
            return a[3 * i1 + j1] * a[3 * i2 + j2] - a[3 * i1 + j2] * a[3 * i2 + j1];
        };
        const double volume = a[0] * minor(0, 0) + a[1] * minor(0, 1) + a[2] * minor(0, 2);
        if (volume == 0.0) return found;
        for (int h = 0; h <= 12; ++h)
            for (int k = -12; k <= 12; ++k)
                for (int l = -12; l <= 12; ++l) {
                    if (!(h > 0 || k > 0 || (k == 0 && l > 0))) continue;
                    double g2 = 0.0;
                    for (int j = 0; j < 3; ++j) {
                        const double g = (h * minor(0, j) + k * minor(1, j) + l * minor(2, j)) / volume;
                        g2 += g * g;
                    }
                    if (g2 >= b.g_min * b.g_min && g2 <= b.g_max * b.g_max) found[{h, k, l}] = g2;
                }
        return found;
    }
};

struct Found {
    std::vector<int64_t> offset{0}, structure;
    std::vector<int16_t> hkl;
    std::vector<double> g2, f_squared;
};

Found simulate(const Structures& all, const StructureBatch& batch) {
    std::vector<int64_t> count(all.n);
    std::vector<int32_t> status(all.n);
    expect(count_reflections_cuda(batch, count.data(), status.data(), nullptr) == 0, "count_reflections", 1, 0);
    Found found;
    for (int64_t s = 0; s < all.n; ++s) {
        expect(status[s] == (s == 1 ? kBadLattice : kSimulated), "status", status[s], 0);
        found.offset.push_back(found.offset.back() + count[s]);
        found.structure.insert(found.structure.end(), count[s], s);
    }
    const int64_t n = found.offset.back();
    found.hkl.resize(3 * n);
    found.g2.resize(n);
    found.f_squared.resize(n);
    const ReflectionList list{found.offset.data(), n, found.hkl.data(), found.g2.data(), found.f_squared.data()};
    expect(list_reflections_cuda(batch, list, nullptr) == 0, "list_reflections", 1, 0);
    expect(structure_factors_cuda(batch, list, nullptr) == 0, "structure_factors", 1, 0);
    return found;
}

void check_simulation(const Structures& all, const StructureBatch& batch, const Found& found) {
    for (int64_t s = 0; s < all.n; ++s) {
        const std::map<Index, double> shell = all.shell(batch, s);
        expect(static_cast<int64_t>(shell.size()) == found.offset[s + 1] - found.offset[s], "count",
               static_cast<double>(found.offset[s + 1] - found.offset[s]), static_cast<double>(shell.size()));
        for (int64_t i = found.offset[s]; i < found.offset[s + 1]; ++i) {
            const int16_t* hkl = found.hkl.data() + 3 * i;
            const auto member = shell.find({hkl[0], hkl[1], hkl[2]});
            expect(member != shell.end(), "reflection outside the shell", hkl[0], hkl[1]);
            if (member == shell.end()) continue;
            expect_close(found.g2[i], member->second, 1.0, "g2");
            const double want = all.f_squared(batch, s, hkl, 0.25 * member->second);
            expect_close(found.f_squared[i], want, 1.0 + want, "f_squared");
        }
    }
}

void check_families(const Structures& all, const Found& found) {
    const int64_t n = found.offset.back();
    std::vector<int32_t> code(n);
    std::vector<int16_t> multiplicity(n);
    const FamilyNames names{n, found.structure.data(), found.hkl.data(), all.rotation_offset.data(),
                            all.rotations.data(), code.data(), multiplicity.data()};
    expect(name_families_cuda(names, nullptr) == 0, "name_families", 1, 0);
    for (int64_t i = 0; i < n; ++i) {
        const int h = found.hkl[3 * i], k = found.hkl[3 * i + 1], l = found.hkl[3 * i + 2];
        std::set<Index> images{{h, k, l}, {-h, -k, -l}};
        if (found.structure[i] == 0) images.insert({{-h, -k, l}, {h, k, -l}});  // the two-fold axis along c
        const auto [a, b, c] = *images.rbegin();
        const int packed = ((a + 512) << 20) + ((b + 512) << 10) + c + 512;
        expect(code[i] == packed, "family", code[i], packed);
        expect(multiplicity[i] == static_cast<int>(images.size()), "multiplicity", multiplicity[i],
               static_cast<double>(images.size()));
    }
}

// Cubic metric for the even patterns, so that many families coincide. hkl and multiplicity share rows of four.
void check_sticks(const Found& found, int64_t n_patterns) {
    const int64_t n = found.offset.back(), n_points = 850;
    std::vector<int16_t> table(4 * n);
    std::vector<float> f_squared(found.f_squared.begin(), found.f_squared.end()), out(n_patterns * n_points, -1.0f);
    std::vector<double> metric, b_overall(n_patterns, 0.7), angle(n), strength(n);
    std::vector<int32_t> order(n);
    for (int64_t i = 0; i < n; ++i) {
        std::copy_n(found.hkl.data() + 3 * i, 3, table.data() + 4 * i);
        table[4 * i + 3] = static_cast<int16_t>(1 + i % 5);
    }
    for (int64_t s = 0; s < n_patterns; ++s)
        for (const double m : {1.0, s % 2 ? 1.1 : 1.0, s % 2 ? 0.93 : 1.0, 0.0, s % 2 ? 0.05 : 0.0, 0.0})
            metric.push_back(m / 16.0);
    const RenderSticksParams p{found.offset.data(), table.data(), table.data() + 3, f_squared.data(), metric.data(),
                               b_overall.data(), out.data(), 4, 4, n_patterns, n_points, 1.54056, 5.0, 0.1};
    const RenderSticksScratch scratch{angle.data(), strength.data(), order.data()};
    expect(render_sticks_cuda(p, scratch, nullptr) == 0, "render_sticks", 1, 0);
    for (int64_t s = 0; s < n_patterns; ++s) {
        std::map<int, std::pair<double, double>> lines;  // key -> angle, strength
        const double* m = metric.data() + 6 * s;
        for (int64_t i = found.offset[s]; i < found.offset[s + 1]; ++i) {
            const double h = table[4 * i], k = table[4 * i + 1], l = table[4 * i + 2];
            const double g2 = h * h * m[0] + k * k * m[1] + l * l * m[2] +
                              2.0 * (k * l * m[3] + h * l * m[4] + h * k * m[5]);
            const double sin2 = 0.25 * 1.54056 * 1.54056 * g2, cos2 = 1.0 - 2.0 * sin2;
            const double two_theta = 360.0 / kPi * std::asin(std::sqrt(std::min(sin2, 1.0)));
            if (sin2 >= 1.0 || two_theta < 5.0 || two_theta >= 90.0) continue;
            auto& line = lines.try_emplace(static_cast<int>(two_theta * 1e5 + 0.5), two_theta, 0.0).first->second;
            line.first = std::min(line.first, two_theta);
            line.second += table[4 * i + 3] * static_cast<double>(f_squared[i]) * (1.0 + cos2 * cos2) /
                           (sin2 * std::sqrt(1.0 - sin2)) * std::exp(-0.35 * g2);
        }
        double strongest = 0.0;
        for (const auto& [key, line] : lines) strongest = std::max(strongest, line.second);
        std::vector<float> want(n_points, 0.0f);
        for (const auto& [key, line] : lines) {
            const double scaled = line.second / strongest * 100.0;
            const auto bin = static_cast<int64_t>((line.first - 5.0) * (1.0 / 0.1));
            float& point = want[std::min(bin, n_points - 1)];
            if (scaled > 1e-3) point = std::max(point, static_cast<float>(scaled));
        }
        for (int64_t i = 0; i < n_points; ++i)
            expect(std::fabs(out[s * n_points + i] - want[i]) <= 1e-4f, "stick", out[s * n_points + i], want[i]);
    }
}

// The first pattern has no active patch, the others one in three.
template <typename T, typename S>
void check_attention(int64_t n_patterns, int64_t n, int64_t width, double tolerance) {
    std::mt19937 random(7);
    std::normal_distribution<double> normal;
    const int64_t size = n_patterns * n * width;
    std::vector<S> query, key, value, grad, output(size), grad_query(size), grad_key(size), grad_value(size);
    for (auto* x : {&query, &key, &value, &grad})
        for (int64_t i = 0; i < size; ++i) x->push_back(S(normal(random)));
    std::vector<T> logsumexp(n_patterns * n), delta(n_patterns * n);
    std::vector<char> flag(n_patterns * n);
    for (int64_t i = n; i < n_patterns * n; ++i) flag[i] = i % 3 == 0;
    const bool* active = reinterpret_cast<const bool*>(flag.data());
    const PeakAttentionParams<T, S> forward{query.data(), key.data(), value.data(), active, output.data(),
                                            logsumexp.data(), n_patterns, n, width};
    expect(peak_attention_forward_cuda(forward, nullptr) == 0, "peak_attention", 1, 0);
    const PeakAttentionBackwardParams<T, S> backward{
        grad.data(), query.data(), key.data(), value.data(), active, output.data(), logsumexp.data(),
        grad_query.data(), grad_key.data(), grad_value.data(), n_patterns, n, width};
    expect(peak_attention_backward_cuda(backward, delta.data(), nullptr) == 0, "peak_attention_backward", 1, 0);
    for (int64_t s = 0; s < n_patterns; ++s) {
        const int64_t start = s * n * width;
        const auto dot = [&](const std::vector<S>& a, int64_t i, const std::vector<S>& b, int64_t j) {
            double sum = 0.0;
            for (int64_t f = 0; f < width; ++f)
                sum += static_cast<double>(a[start + i * width + f]) * static_cast<double>(b[start + j * width + f]);
            return sum;
        };
        std::vector<double> want[4];  // output and gradients to query, key, value
        for (auto& x : want) x.assign(n * width, 0.0);
        const double scale = s == 0 ? 0.0 : 1.0 / std::sqrt(static_cast<double>(width));
        for (int64_t i = 0; i < n; ++i) {
            std::vector<double> p(n, 0.0);
            double sum = 0.0, mean = 0.0;
            for (int64_t j = 0; j < n; ++j)
                if (s == 0 || active[s * n + j]) sum += p[j] = std::exp(scale * dot(query, i, key, j));
            expect(std::fabs(logsumexp[s * n + i] - std::log(sum)) <= tolerance, "logsumexp", logsumexp[s * n + i],
                   std::log(sum));
            for (int64_t j = 0; j < n; ++j) mean += (p[j] /= sum) * dot(grad, i, value, j);
            for (int64_t j = 0; j < n; ++j) {
                const double d = scale * p[j] * (dot(grad, i, value, j) - mean);
                for (int64_t f = 0; f < width; ++f) {
                    want[0][i * width + f] += p[j] * static_cast<double>(value[start + j * width + f]);
                    want[1][i * width + f] += d * static_cast<double>(key[start + j * width + f]);
                    want[2][j * width + f] += d * static_cast<double>(query[start + i * width + f]);
                    want[3][j * width + f] += p[j] * static_cast<double>(grad[start + i * width + f]);
                }
            }
        }
        const std::vector<S>* got[4] = {&output, &grad_query, &grad_key, &grad_value};
        const char* name[4] = {"attention", "gradient to query", "gradient to key", "gradient to value"};
        for (int x = 0; x < 4; ++x)
            for (int64_t i = 0; i < n * width; ++i) {
                const double found = static_cast<double>((*got[x])[start + i]);
                expect(std::fabs(found - want[x][i]) <= tolerance * (1.0 + std::fabs(want[x][i])), name[x], found,
                       want[x][i]);
            }
    }
}

// Two heads with ties, against softmaxes written out; gradients of the sum of the losses.
template <typename Element>
void check_dsr_loss(int64_t n_patterns, double tolerance) {
    using Real = typename DsrLossParams<Element>::Real;
    const int head_begin[] = {0, 40, 45}, n_classes = 45;
    std::mt19937 random(7);
    std::uniform_int_distribution<int> eighths(-40, 40);  // exact in every type
    std::vector<Element> logits, previous, ranked(n_patterns * n_classes), grad(n_patterns * n_classes);
    std::vector<Real> slope(n_patterns * n_classes), loss(2 * n_patterns), ones{1};
    for (int64_t i = 0; i < n_patterns * n_classes; ++i) {
        logits.emplace_back(static_cast<Element>(static_cast<Real>(eighths(random)) / 8));
        previous.emplace_back(static_cast<Element>(static_cast<Real>(eighths(random)) / 8));
    }
    DsrLossParams<Element> p{};
    p.n_patterns = n_patterns, p.n_classes = n_classes, p.n_heads = 2, p.temperature = 2;
    std::copy_n(head_begin, 3, p.class_offset);
    p.previous_ranked = previous.data(), p.ranked = ranked.data(), p.slope = slope.data();
    p.logits = logits.data(), p.loss = loss.data(), p.grad_loss = ones.data(), p.grad_logits = grad.data();
    p.previous_stride = p.logits_stride = n_classes;
    expect(dsr_loss_forward_cuda(p, nullptr) == 0, "dsr_loss_forward", 1, 0);
    expect(dsr_loss_backward_cuda(p, nullptr) == 0, "dsr_loss_backward", 1, 0);
    for (int64_t s = 0; s < n_patterns; ++s)
        for (int head = 0; head < 2; ++head) {
            const int64_t at = s * n_classes + head_begin[head];
            const int n = head_begin[head + 1] - head_begin[head];
            const auto z = [&](int j) { return static_cast<double>(logits[at + j]); };
            std::vector<int16_t> want(n);
            std::iota(want.begin(), want.end(), static_cast<int16_t>(0));
            std::stable_sort(want.begin(), want.end(), [&](int a, int b) { return z(a) < z(b); });
            double sum_p = 0.0, sum_q = 0.0, divergence = 0.0;
            for (int j = 0; j < n; ++j) {
                sum_p += std::exp(z(j) / 2);
                sum_q += std::exp(static_cast<double>(previous[at + j]) / 2);
            }
            for (int j = 0; j < n; ++j) {
                expect(static_cast<double>(ranked[at + j]) == z(want[j]), "dsr ranked", ranked[at + j], z(want[j]));
                const double p_j = std::exp(z(want[j]) / 2) / sum_p;
                const double q_j = std::exp(static_cast<double>(previous[at + j]) / 2) / sum_q;
                divergence += q_j * std::log(q_j / p_j);
                const double got = grad[at + want[j]];
                expect(std::fabs(got - 2 * (p_j - q_j)) <= tolerance, "dsr gradient", got, 2 * (p_j - q_j));
            }
            const double got = loss[2 * s + head];
            expect(std::fabs(got - 4 * divergence) <= (sizeof(Real) == 8 ? 1e-13 : 1e-5), "dsr loss", got,
                   4 * divergence);
        }
}

// One family a pattern, so that the sum is one profile; every second pattern with noise, of which only rules are checked.
void check_patterns() {
    constexpr int64_t kPatterns = 4, kPoints = 333, kPatches = 34;
    const double step = 0.1, begin = 20.0, wavelength = 1.54056;
    const std::vector<int64_t> offset{0, 1, 2, 3, 3}, turns{0, 2, 2, 4, 4}, id{5, 6, 7, 8};
    const std::vector<int16_t> hkl{1, 0, 0, 1, 1, 0, 2, 0, 0}, multiplicity{2, 4, 6};
    const std::vector<int8_t> rotations{1, 0, 0, 0, 1, 0, 0, 0, 1, -1, 0, 0, 0, -1, 0, 0, 0, 1,
                                        1, 0, 0, 0, 1, 0, 0, 0, 1, 0,  1, 0, 1, 0,  0, 0, 0, 1};
    const std::vector<float> f_squared{3.0f, 2.0f, 1.0f};
    const std::vector<double> b_overall(kPatterns, 0.5);
    std::vector<double> metric, g2{0.08, 0.16, 0.32};
    for (int64_t i = 0; i < kPatterns; ++i) metric.insert(metric.end(), {0.08, 0.08, 0.1, 0.0, 0.0, 0.0});
    ProfileRow row{};
    row.caglioti_w = 0.04, row.crystallite_size = 800.0, row.eta = 0.6, row.asymmetry = 0.1;
    row.second_wavelength = 1.54439, row.goniometer_radius = 200.0, row.zero_shift = 0.03, row.march_r = 0.7;
    row.march_axis[0] = 1.0, row.polarisation = 1.0, row.background[0] = 0.1, row.hump_fwhm = 5.0;
    row.hump_height = 0.1, row.hump_center = 30.0, row.two_theta_first = 21.0, row.two_theta_last = 180.0;
    std::vector<ProfileRow> profile(kPatterns, row);
    profile[1].counts = 500.0, profile[1].second_ratio = 0.5, profile[1].impurity_count = 2.0;
    profile[1].impurity_strength = 0.2, profile[1].two_theta_last = 50.0;
    std::vector<float> out(kPatterns * kPoints, -1.0f), peaks(kPatterns * kPoints);
    std::vector<int32_t> active(kPatterns, -5);
    std::vector<int16_t> patch(kPatterns * kPatches, -5);
    std::vector<double> g2_scratch(3), weight(3);
    std::vector<Line> line(2 * 3 + 2 * kMaxImpurities * kPatterns);
    const RenderPatternsParams p{offset.data(), hkl.data(), multiplicity.data(), f_squared.data(), metric.data(),
                                 b_overall.data(), turns.data(), rotations.data(), profile.data(), id.data(),
                                 out.data(), active.data(), patch.data(), 3, 1, kPatterns, kPoints, 11, 3.0, wavelength,
                                 begin, step};
    const RenderPatternsScratch scratch{g2_scratch.data(), weight.data(), line.data(), peaks.data()};
    expect(render_patterns_cuda(p, scratch, nullptr) == 0, "render_patterns", 1, 0);
    for (int64_t i = 0; i < kPatterns; ++i) {
        const float* own = out.data() + i * kPoints;
        const float strongest = *std::max_element(own, own + kPoints);
        expect(strongest == (i < 3 ? 100.0f : 0.0f), "strongest point", strongest, 100.0);
        for (int64_t k = 0; k < 10; ++k) expect(own[k] == 0.0f, "point that was not measured", own[k], 0.0);
        int32_t n_active = 0;
        for (int64_t j = 0; j < kPatches; ++j) {
            const int64_t last = std::min((j + 1) * kPatchPoints, kPoints);
            if (*std::max_element(own + j * kPatchPoints, own + last) < kActiveIntensity) continue;
            expect(patch[i * kPatches + n_active] == j, "active patch", patch[i * kPatches + n_active], 1.0 * j);
            ++n_active;
        }
        expect(active[i] == n_active, "active patches", active[i], n_active);
        for (int64_t j = n_active; j < kPatches; ++j) expect(patch[i * kPatches + j] == -1, "patch", 0, -1);
        if (i % 2) continue;
        const double theta = std::asin(0.5 * wavelength * std::sqrt(g2[i])), angle = 360.0 / kPi * theta + 0.03;
        const double size = 180.0 / kPi * 0.9 * wavelength / (800.0 * std::cos(theta));
        const double half = 0.5 * std::sqrt(0.04 + size * size), split = 0.1 / std::tan(2.0 * theta);
        std::vector<double> want(kPoints);
        for (int64_t k = 10; k < kPoints; ++k) {
            const double distance = begin + step * static_cast<double>(k) - angle;
            const double u = distance / (half * (distance <= 0 ? 1.0 + split : 1.0 - split));
            want[k] = 0.6 * 2.0 / kPi / (1.0 + u * u) + 0.4 * 0.93943727869965133 * std::exp2(-u * u);
        }
        const double most = *std::max_element(want.begin(), want.end());
        for (int64_t k = 10; k < kPoints; ++k)
            if (own[k] > 0.0f || want[k] > 2e-4 * most)
                expect(std::fabs(own[k] - want[k] / most * 100.0) <= 2e-3, "profile", own[k], want[k] / most * 100.0);
    }
}

}  // namespace

int main(int count, char** values) {
    if (count != 3) return 2;
    const Structures all(std::atoll(values[1]), std::atoi(values[2]));
    for (const bool dispersion : {false, true}) {
        const StructureBatch batch = all.batch(dispersion, dispersion);
        const Found found = simulate(all, batch);
        check_simulation(all, batch, found);
        if (dispersion) continue;
        check_families(all, found);
        check_sticks(found, all.n);
        std::printf("%lld reflections\n", static_cast<long long>(found.offset.back()));
    }
    for (const int64_t width : {8, 40, 64}) {  // one, two and four threads a row
        check_attention<float, float>(2, 37, width, 1e-5);
        check_attention<double, double>(2, 37, width, 1e-12);
    }
    check_attention<float, float>(2, 131, 32, 1e-5);  // two tiles of rows, five of shared memory
    check_attention<float, BFloat16>(2, 37, 32, 3e-2);
    check_rows();
    check_dsr_loss<float>(all.n, 1e-6);
    check_dsr_loss<double>(all.n, 1e-14);
    check_dsr_loss<BFloat16>(all.n, 2e-3);
    check_patterns();
    check_scans();
    return n_wrong ? 1 : 0;
}
