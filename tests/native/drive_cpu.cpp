// drive_cpu.cpp: calls the CPU kernels with random sizes and hostile values, so that sanitizers see all of them, and
// checks what must hold of any answer. Buffers are heap blocks of the exact size. That the numbers are right is tested
// from Python, against the references. Usage: drive_cpu FIRST_SEED N_SEEDS; exit 1 where a rule is broken.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "dsr_loss.h"
#include "hostile.h"
#include "peak_attention.h"
#include "peak_conv.h"
#include "peak_norm.h"
#include "peak_plan.h"
#include "render.h"
#include "render_patterns.h"
#include "simulate.h"
#include "winograd.h"

using namespace xrdfast;

namespace {

void fill_lattice(Random& random, double g_max, double* lattice) {
    std::fill(lattice, lattice + 9, 0.0);
    const auto diagonal = [&](double a, double b, double c) { lattice[0] = a, lattice[4] = b, lattice[8] = c; };
    switch (random.integer(0, 11)) {
        case 0: return;                                                               // no cell at all
        case 1: lattice[random.integer(0, 8)] = random.hostile(); return;
        case 2: diagonal(1e8, 1e8, 1e8); return;                                      // too large
        case 3: diagonal(1e-8, 1e-8, 1e-8); return;                                   // nothing within reach
        case 4: diagonal(3, 3, (kMaxMillerIndex - random.real(-0.5, 0.5)) / g_max); break;  // round the largest index
        case 5: diagonal(6, 6, 6), lattice[1] = 30, lattice[5] = -30; break;          // skewed
        case 6: diagonal(5, 5, 5), lattice[3] = 5, lattice[4] = random.real(0, 1e-5); break;  // nearly flat
        case 7: diagonal(4, 4, 4); break;                                             // many coincident lines
        default:
            for (int i = 0; i < 9; ++i) lattice[i] = random.real(-2, 2);
            for (int i = 0; i < 3; ++i) lattice[4 * i] += random.real(3, 12);
    }
    if (random.one_in(3)) std::swap_ranges(lattice, lattice + 3, lattice + 6);
    if (random.one_in(30)) lattice[random.integer(0, 8)] = random.hostile();
}

struct Structures {
    Block<int64_t> atom_offset;
    Block<double> lattice;
    Block<uint8_t> atomic_number;
    Block<double> fractional, occupancy, b_iso, form_factor, dispersion;
    Block<int64_t> rotation_offset;
    Block<int8_t> rotations;
    StructureBatch batch{};
};

Block<int64_t> random_offsets(Random& random, int64_t n, int64_t most) {
    Block<int64_t> offset(n + 1);
    for (int64_t i = 0; i < n; ++i) offset[i + 1] = offset[i] + random.integer(0, most);
    return offset;
}

Structures random_structures(Random& random) {
    const int64_t n = random.integer(0, 6), n_elements = random.integer(1, 12);
    Block<int64_t> atom_offset = random_offsets(random, n, 30), rotation_offset = random_offsets(random, n, 48);
    const int64_t n_atoms = atom_offset[n], n_rotations = rotation_offset[n];
    Structures s{std::move(atom_offset),    Block<double>(9 * n),       Block<uint8_t>(n_atoms),
                 Block<double>(3 * n_atoms), Block<double>(n_atoms),     Block<double>(n_atoms),
                 Block<double>(n_elements * kFormFactorColumns),         Block<double>(2 * n_elements),
                 std::move(rotation_offset), Block<int8_t>(9 * n_rotations)};
    StructureBatch& batch = s.batch;
    batch.wavelength = random.one_in(10) ? random.real(0.3, 1.0) : 1.54;
    batch.g_max = 2.0 / batch.wavelength * (random.one_in(10) ? 1.0 : random.real(0.1, 0.9));
    batch.g_min = random.one_in(10) ? 0.0 : batch.g_max * random.real(0.0, 1.0);
    for (int64_t i = 0; i < n; ++i) fill_lattice(random, batch.g_max, s.lattice.get() + 9 * i);
    const bool odd = random.one_in(4);  // elements beyond the table
    for (int64_t j = 0; j < n_atoms; ++j) {
        s.atomic_number[j] = static_cast<uint8_t>(random.integer(0, odd ? 255 : n_elements - 1));
        s.occupancy[j] = random.number(0, 1);
        s.b_iso[j] = random.one_in(2) ? 0.5 : random.number(-1, 5);
        for (int i = 0; i < 3; ++i) s.fractional[3 * j + i] = random.number(-2, 2);
    }
    for (int64_t i = 0; i < s.form_factor.size(); ++i) s.form_factor[i] = random.number(0, 20);
    for (int64_t i = 0; i < s.dispersion.size(); ++i) s.dispersion[i] = random.number(-5, 5);
    // Rotations of a crystal most of the time, nonsense otherwise: Python can't know which.
    const int reach = random.one_in(4) ? 127 : 1;
    for (int64_t r = 0; r < n_rotations; ++r) {
        int8_t* w = s.rotations.get() + 9 * r;
        const int64_t shift = random.integer(0, 2);
        for (int i = 0; i < 3; ++i) w[3 * i + (i + shift) % 3] = random.one_in(2) ? 1 : -1;
        if (random.one_in(4))
            for (int i = 0; i < 9; ++i) w[i] = static_cast<int8_t>(random.integer(-reach - 1, reach));
    }
    batch.atom_offset = s.atom_offset.get();
    batch.lattice = s.lattice.get();
    batch.atomic_number = s.atomic_number.get();
    batch.fractional = s.fractional.get();
    batch.occupancy = s.occupancy.get();
    batch.b_iso = s.b_iso.get();
    batch.form_factor = s.form_factor.get();
    batch.dispersion = random.one_in(2) ? s.dispersion.get() : nullptr;
    batch.n_structures = n;
    batch.n_elements = n_elements;
    batch.mott_bethe = random.one_in(2);
    return s;
}

// The same batch from structure `begin` on.
StructureBatch window(const StructureBatch& whole, int64_t begin) {
    StructureBatch part = whole;
    part.atom_offset += begin;
    part.lattice += 9 * begin;
    part.n_structures -= begin;
    return part;
}

void check_offsets(const Block<int64_t>& offset, const Block<int32_t>& status, int64_t found) {
    const int64_t n = offset.size() - 1;
    expect(offset[0] == 0 && offset[n] == found, "offsets run from 0 to the number of rows");
    for (int64_t i = 0; i < n; ++i) {
        const int64_t rows = offset[i + 1] - offset[i];
        expect(rows >= 0, "offsets rise");
        expect(status[i] >= kSimulated && status[i] <= kNoIntensity, "the status is one of the list");
        expect((status[i] == kSimulated) == (rows > 0), "rows where simulated, none elsewhere");
    }
}

bool named_by_largest(const int16_t* hkl) {
    for (int i = 0; i < 3; ++i)
        if (hkl[i] != 0) return hkl[i] > 0;
    return false;
}

struct Lines {
    Block<int64_t> offset;
    Block<double> two_theta, intensity, d_spacing;
    Block<int16_t> hkl;
    Block<int32_t> status;
    int64_t found;

    explicit Lines(const Simulated<MergedLine>& simulated)
        : offset(simulated.place.size() + 1),
          two_theta(simulated.n_rows),
          intensity(simulated.n_rows),
          d_spacing(simulated.n_rows),
          hkl(3 * simulated.n_rows),
          status(simulated.place.size()),
          found(simulated.n_rows) {
        write_rows(simulated, {offset.get(), two_theta.get(), intensity.get(), d_spacing.get(), hkl.get(),
                               status.get()}, 1);
    }
};

struct FamilyRows {
    Block<int64_t> offset;
    Block<int16_t> hkl, multiplicity;
    Block<float> f_squared;
    Block<int32_t> status;
    int64_t found;

    explicit FamilyRows(const Simulated<ReflectionFamily>& simulated)
        : offset(simulated.place.size() + 1),
          hkl(3 * simulated.n_rows),
          multiplicity(simulated.n_rows),
          f_squared(simulated.n_rows),
          status(simulated.place.size()),
          found(simulated.n_rows) {
        write_rows(simulated, {offset.get(), hkl.get(), multiplicity.get(), f_squared.get(), status.get()}, 1);
    }
};

void drive_simulation(Random& random) {
    const Structures s = random_structures(random);
    const StructureBatch& batch = s.batch;
    const int64_t n = batch.n_structures;

    const Lines lines(simulate_lines_cpu(batch, 1));
    check_offsets(lines.offset, lines.status, lines.found);
    for (int64_t i = 0; i < n; ++i) {
        double strongest = 0.0;
        for (int64_t row = lines.offset[i]; row < lines.offset[i + 1]; ++row) {
            strongest = std::max(strongest, lines.intensity[row]);
            expect(lines.intensity[row] > 0.0 && lines.intensity[row] <= 100.0, "intensities lie in (0, 100]");
            expect(lines.two_theta[row] >= 0.0 && lines.two_theta[row] <= 180.0, "angles lie in [0, 180]");
            expect(std::isfinite(lines.d_spacing[row]) && lines.d_spacing[row] > 0.0, "spacings are positive");
            expect(row == lines.offset[i] || lines.two_theta[row - 1] <= lines.two_theta[row], "angles rise");
            expect(named_by_largest(lines.hkl.get() + 3 * row), "a line is named by the mate that is larger");
        }
        expect(lines.status[i] != kSimulated || strongest == 100.0, "the strongest line is 100");
    }
    if (n > 1) {
        const int64_t begin = random.integer(1, n - 1);
        const Lines tail(simulate_lines_cpu(window(batch, begin), 1));
        const int64_t first = lines.offset[begin];
        expect(tail.found == lines.found - first, "a window has the rows of its structures");
        expect(std::equal(tail.intensity.get(), tail.intensity.get() + tail.found, lines.intensity.get() + first),
               "a window gives the same lines");
    }

    const double cutoff = random.one_in(2) ? 0.0 : 1e-6;
    const FamilyRows families(
        simulate_families_cpu(batch, {s.rotation_offset.get(), s.rotations.get(), cutoff}, 1));
    check_offsets(families.offset, families.status, families.found);
    for (int64_t row = 0; row < families.found; ++row)
        expect(families.multiplicity[row] >= 0 && !(families.f_squared[row] < 0.0f), "families are not negative");
}

void drive_rendering(Random& random) {
    const int64_t n_patterns = random.integer(0, 5), n_points = random.integer(1, 400);
    const Block<int64_t> offset = random_offsets(random, n_patterns, 200);
    const int64_t n = offset[n_patterns], stride = random.one_in(2) ? 4 : 3;
    const Block<int16_t> table(stride * n), apart(stride == 4 ? 0 : n);
    const Block<float> f_squared(n), intensity(n_patterns * n_points);
    const Block<double> metric(6 * n_patterns), b_overall(n_patterns);
    const int reach = random.one_in(10) ? 32767 : 6;
    for (int64_t i = 0; i < table.size(); ++i) table[i] = static_cast<int16_t>(random.integer(-reach - 1, reach));
    for (int64_t i = 0; i < apart.size(); ++i) apart[i] = static_cast<int16_t>(random.integer(-1, 48));
    for (int64_t i = 0; i < n; ++i) f_squared[i] = static_cast<float>(random.number(0, 1000));
    for (int64_t i = 0; i < metric.size(); ++i) metric[i] = random.number(i % 6 < 3 ? 0.01 : -0.01, 0.05);
    for (int64_t i = 0; i < n_patterns; ++i) b_overall[i] = random.number(0, 2);
    // The multiplicity is the fourth column of one table, or an array of its own.
    const int16_t* multiplicity = stride == 4 ? table.get() + (n ? 3 : 0) : apart.get();
    render_sticks_cpu({offset.get(), table.get(), multiplicity, f_squared.get(), metric.get(), b_overall.get(),
                       intensity.get(), stride, stride == 4 ? 4 : 1, n_patterns, n_points,
                       random.one_in(10) ? 1e-3 : 1.54, random.one_in(4) ? 0.0 : random.real(0, 100),
                       random.one_in(10) ? 60.0 : random.real(0.001, 1)},
                      1);
    for (int64_t i = 0; i < intensity.size(); ++i)
        expect(intensity[i] >= 0.0f && intensity[i] <= 100.0f, "points lie in [0, 100]");
}

template <typename T>
void fill(const Block<T>& block, Random& random, double reach, bool hostile) {
    for (int64_t i = 0; i < block.size(); ++i)
        block[i] = static_cast<T>(hostile ? random.number(-reach, reach) : random.real(-reach, reach));
}

template <typename T>
void drive_attention(Random& random) {
    const int64_t n_patterns = random.integer(0, 3), n = random.integer(1, 90), width = 8 * random.integer(1, 8);
    const int64_t size = n_patterns * n * width;
    const bool hostile = random.one_in(3);
    const Block<T> query(size), key(size), value(size), grad(size), output(size), logsumexp(n_patterns * n);
    const Block<T> grad_query(size), grad_key(size), grad_value(size);
    const Block<bool> active(n_patterns * n);
    for (const Block<T>* x : {&query, &key, &value, &grad}) fill(*x, random, 3.0, hostile);
    const int one_in = static_cast<int>(random.integer(1, 5));
    for (int64_t i = 0; i < active.size(); ++i) active[i] = random.one_in(one_in);
    peak_attention_forward_cpu<T>({query.get(), key.get(), value.get(), active.get(), output.get(), logsumexp.get(),
                                   n_patterns, n, width},
                                  1);
    peak_attention_backward_cpu<T>({grad.get(), query.get(), key.get(), value.get(), active.get(), output.get(),
                                    logsumexp.get(), grad_query.get(), grad_key.get(), grad_value.get(), n_patterns, n,
                                    width},
                                   1);
    for (int64_t s = 0; s < n_patterns; ++s) {
        const bool any = std::count(active.get() + s * n, active.get() + (s + 1) * n, true) > 0;
        for (int64_t i = s * n * width; i < (s + 1) * n * width; ++i) {
            if (!hostile) expect(std::fabs(output[i]) <= T(3.0001), "an average lies between the values");
            if (any && !active[i / width])
                expect(grad_key[i] == 0 && grad_value[i] == 0, "a patch that is no key gets no gradient");
            if (!any && !hostile) expect(grad_query[i] == 0 && grad_key[i] == 0, "equal scores have no gradient");
        }
    }
}

template <typename T>
void drive_patches(Random& random) {
    const int64_t n_patterns = random.integer(0, 3), n = random.integer(1, 90), points = random.integer(1, 12);
    const int64_t width = 8 * random.integer(1, 8), n_embedded = random.integer(1, width - 1);
    const int64_t hidden = random.integer(0, 150), n_layers = random.integer(0, 2);
    const int64_t a_layer = 4 * width * width + 9 * width + (2 * width + 1) * hidden;
    const bool hostile = random.one_in(3);
    const Block<T> intensity(n_patterns * n * points), weight(points * n_embedded), position(n * width);
    const Block<T> layers(n_layers * a_layer), features(n_patterns * width), alone(width);
    fill(intensity, random, 1.0, hostile);
    fill(weight, random, 1.0, hostile && random.one_in(3));
    fill(position, random, 1.0, false);
    fill(layers, random, 0.3, hostile && random.one_in(3));
    EncodePatchesParams<T> params{intensity.get(), weight.get(), position.get(), layers.get(), features.get(),
                                  n_patterns, n, points, n_embedded, width, hidden, n_layers,
                                  static_cast<T>(random.one_in(4) ? 2.0 : 0.5), T(1e-6), T(0.01)};
    encode_patches_cpu(params, 1);
    if (n_patterns == 0) return;
    params.intensity = intensity.get() + (n_patterns - 1) * n * points;
    params.features = alone.get();
    params.n_patterns = 1;
    encode_patches_cpu(params, 1);
    expect(std::memcmp(alone.get(), features.get() + (n_patterns - 1) * width, width * sizeof(T)) == 0,
           "a pattern's features don't depend on the batch");
    for (int64_t i = 0; i < width && !hostile; ++i) expect(std::isfinite(alone[i]), "features are finite");
}

template <typename T>
Block<T> random_block(Random& random, int64_t n) {
    Block<T> block(n);
    for (int64_t i = 0; i < n; ++i) block[i] = static_cast<T>(random.real(-2, 2));
    return block;
}

// Convolution and norm of one stage, with exact buffers. `take` is (n_take, n_rows_out), or nothing.
template <typename T>
void drive_stage(Random& random, int64_t n_rows, int64_t shift, int64_t n_touched, double total, const float* count,
                 const int32_t* halo, const int32_t* take, int n_take, int64_t n_rows_out) {
    const int64_t n_in = random.integer(1, 40), n = random.integer(1, 70);
    Block<T> x = random_block<T>(random, n_rows * n_in), weight = random_block<T>(random, 3 * n_in * n);
    if (n_rows > 0 && random.one_in(4)) x[random.integer(0, x.size() - 1)] = static_cast<T>(random.hostile());
    Block<T> h(n_rows * n), grad_weight(3 * n_in * n);
    peak_conv_cpu<T>({x.get(), weight.get(), h.get(), n_rows, n_in, n, random.one_in(2) ? shift : -shift}, 1);
    peak_conv_weight_cpu<T>({x.get(), h.get(), grad_weight.get(), n_rows, n_in, n, shift}, 1);
    if (shift > 0 && n_rows % shift == 0 && n_rows > 0) {
        const int64_t n_positions = n_rows / shift, size = shift * n_in, n_tiles = (n_positions + 1) / 2;
        const int64_t begin = random.integer(0, n_tiles - 1), end = random.integer(begin + 1, n_tiles);
        const Block<T> planes(4 * (end - begin) * size), weight_planes(4 * n_in * n);
        const WinogradParams<T> tiles{x.get(), planes.get(), n_positions, size, begin, end};
        winograd_input_cpu(tiles, 1);
        winograd_output_backward_cpu(tiles, 1);
        winograd_output_cpu(tiles, 1);
        winograd_weight_cpu(weight.get(), weight_planes.get(), n_in * n, random.one_in(2), 1);
        winograd_weight_backward_cpu(weight_planes.get(), grad_weight.get(), n_in * n, 1);
    }
    const Block<T> residual = random_block<T>(random, n_rows * n), gamma = random_block<T>(random, n);
    const Block<T> beta = random_block<T>(random, n), grad_out = random_block<T>(random, n_rows_out * n);
    const Block<T> mean(n), var = random_block<T>(random, n), out(n_rows_out * n);
    const Block<T> grad_h(n_rows * n), grad_residual(n_rows * n), grad_gamma(n), grad_beta(n);
    const PeakNormParams<T> norm{h.get(),    random.one_in(2) ? residual.get() : nullptr,
                                 gamma.get(), beta.get(), count, take, mean.get(), var.get(), n_rows, n_rows_out, n,
                                 n_touched,   n_take, random.one_in(2), random.one_in(2), 1e-5, total};
    peak_norm_cpu(norm, out.get(), 1);
    peak_norm_backward_cpu(norm, {grad_out.get(), grad_h.get(), grad_residual.get(), grad_gamma.get(),
                                  grad_beta.get()}, 1);
    if (n_take == 2 && shift > 0) {
        const bool widens = n_in != n || random.one_in(2);
        const Block<T> first = random_block<T>(random, 3 * n_in * n), second = random_block<T>(random, 3 * n * n);
        const Block<T> widen = random_block<T>(random, widens ? n_in * n : 0), y(n_rows * n);
        peak_stage_cpu<T>({x.get(), first.get(), second.get(), widens ? widen.get() : nullptr, beta.get(), gamma.get(),
                           halo, take, y.get(), out.get(), n_rows, n_rows_out, n_in, n, n_touched, shift,
                           random.one_in(2)},
                          1);
    }
    for (int64_t r = 0; halo && r < n_rows; ++r)
        for (int64_t c = 0; halo[r] != r && c < n; ++c)  // NaN: overflow or a hostile number elsewhere
            expect(!(std::fabs(grad_h[r * n + c]) > T(0)), "no gradient reaches a halo");
}

template <typename T>
void drive_peak_conv(Random& random) {
    const int64_t n_patterns = random.integer(0, 6), length = random.integer(8, 90), n_stages = random.integer(1, 3);
    const int64_t packed_stages = random.integer(0, n_stages), room = n_patterns * length;
    const Block<T> intensity(room);
    const int every = static_cast<int>(random.integer(2, 60));
    for (int64_t i = 0; i < room; ++i)
        if (random.one_in(every)) intensity[i] = static_cast<T>(random.number(0, 100));
    const Block<int64_t> paddings(n_stages), n_rows(packed_stages), point(room), position(room);
    for (int64_t i = 0; i < n_stages; ++i) paddings[i] = random.integer(0, 1);
    const Block<float> count(packed_stages * room);
    const Block<int32_t> halo(packed_stages * room), pairs(2 * packed_stages * room);
    peak_plan_cpu<T>({intensity.get(), paddings.get(), n_patterns, length, n_stages, packed_stages, 2,
                      random.integer(0, 3), random.real(0.3, 1.0), n_rows.get(), point.get(), position.get(),
                      count.get(), halo.get(), pairs.get()});
    int64_t here = length;
    for (int64_t stage = 0; stage < n_stages; ++stage) {
        const int64_t next = (here + 2 * paddings[stage]) / 2;
        const bool packed = stage < packed_stages && n_rows[stage] > 0;
        if (!packed) {
            drive_stage<T>(random, n_patterns * here, n_patterns, n_patterns * here,
                           static_cast<double>(n_patterns * here), nullptr, nullptr, nullptr, 1, n_patterns * here);
            return;
        }
        const bool packed_next = stage + 1 < packed_stages && n_rows[stage + 1] > 0;
        const int64_t rows = n_rows[stage], taken = packed_next ? n_rows[stage + 1] : n_patterns * next;
        // Copies of the exact size.
        const Block<float> samples(rows);
        const Block<int32_t> holder(rows), joined(2 * taken);
        std::copy_n(count.get() + stage * room, rows, samples.get());
        std::copy_n(halo.get() + stage * room, rows, holder.get());
        std::copy_n(pairs.get() + 2 * stage * room, 2 * taken, joined.get());
        double total = 0.0;
        for (int64_t r = 0; r < rows; ++r) {
            total += samples[r];
            expect(holder[r] >= -1 && holder[r] < rows, "a halo's value is that of a row, or zero");
            expect((samples[r] == 0.0f) == (holder[r] != r) || r >= rows - here - 2, "halos stand for no sample");
        }
        expect(total == static_cast<double>(n_patterns * here), "every sample is some row's");
        for (int64_t j = 0; j < 2 * taken; ++j) expect(joined[j] >= -1 && joined[j] < rows, "a pool joins rows");
        const int64_t n_touched = rows - here - 2;
        drive_stage<T>(random, rows, 1, n_touched, total, samples.get(), holder.get(), holder.get(), 1, rows);
        drive_stage<T>(random, rows, 1, n_touched, total, samples.get(), holder.get(), joined.get(), 2, taken);
        here = next;
    }
}

template <typename Element>
void drive_dsr_loss(Random& random) {
    using Real = typename DsrLossParams<Element>::Real;
    DsrLossParams<Element> p{};
    p.n_patterns = random.integer(0, 20);
    p.n_heads = static_cast<int32_t>(random.integer(1, kMaxHeads));
    for (int head = 0; head < p.n_heads; ++head)
        p.class_offset[head + 1] =
            p.class_offset[head] + static_cast<int32_t>(random.integer(1, random.one_in(30) ? kMaxHeadClasses : 40));
    p.n_classes = p.class_offset[p.n_heads];
    p.temperature = static_cast<Real>(random.real(0.1, 8));
    p.logits_stride = random.one_in(4) ? 0 : p.n_classes + random.integer(0, 3);
    p.previous_stride = random.one_in(4) ? 0 : p.n_classes + random.integer(0, 3);
    const auto rows = [&](int64_t stride) { return p.n_patterns ? (p.n_patterns - 1) * stride + p.n_classes : 0; };
    const Block<Element> logits(rows(p.logits_stride)), previous(rows(p.previous_stride));
    const Block<Element> ranked(p.n_patterns * p.n_classes), grad_logits(ranked.size());
    const Block<Real> slope(ranked.size()), loss(p.n_patterns * p.n_heads), grad_loss(1);
    const bool hostile = random.one_in(3);
    const auto logit = [&] {
        const double value = hostile ? random.number(-20, 20) : std::round(random.real(-40, 40)) / 2;
        return static_cast<Element>(static_cast<Real>(std::fabs(value) > 1e38 ? std::copysign(kInf, value) : value));
    };
    for (int64_t i = 0; i < logits.size(); ++i) logits[i] = logit();
    for (int64_t i = 0; i < previous.size(); ++i) previous[i] = logit();
    p.logits = logits.get(), p.ranked = ranked.get(), p.slope = slope.get(), p.loss = loss.get();
    const bool first_batch = random.one_in(6);
    p.previous_ranked = first_batch ? nullptr : previous.get();
    dsr_loss_forward_cpu(p, 1);
    for (int64_t i = 0; i < loss.size() && !hostile; ++i)
        expect(loss[i] > Real(-1e-3) && std::isfinite(loss[i]) && (!first_batch || loss[i] == 0),
               "a divergence is finite and not negative, and 0 from itself");

    grad_loss[0] = 1;  // of a sum: both strides 0
    p.grad_loss = grad_loss.get(), p.grad_logits = grad_logits.get();
    dsr_loss_backward_cpu(p, 1);
    for (int64_t pattern = 0; pattern < p.n_patterns; ++pattern)
        for (int head = 0; head < p.n_heads; ++head) {
            const int64_t begin = pattern * p.n_classes + p.class_offset[head];
            const int64_t end = pattern * p.n_classes + p.class_offset[head + 1];
            double sum = 0.0;
            for (int64_t i = begin; i < end; ++i) {
                sum += static_cast<Real>(grad_logits[i]);
                const bool first = i == begin;
                const Real here = static_cast<Real>(ranked[i]), before = first ? here : static_cast<Real>(ranked[i - 1]);
                expect(here >= before || std::isnan(here), "ranks rise and NaN is last");
            }
            expect(hostile || std::fabs(sum) < 0.1, "the gradient of a head sums to 0");
        }
}

ProfileRow random_profile(Random& random) {
    ProfileRow row{};
    row.caglioti_w = random.one_in(10) ? 1e-300 : random.real(1e-4, 0.1);
    row.crystallite_size = random.one_in(4) ? kInf : random.real(1, 1000);
    row.microstrain = random.one_in(10) ? 1e200 : random.real(0, 0.01);
    row.eta = random.one_in(4) ? static_cast<double>(random.integer(0, 1)) : random.real(0, 1);
    row.asymmetry = random.one_in(10) ? 1e300 : random.real(-0.2, 0.2);
    row.second_wavelength = random.one_in(10) ? 1e9 : 1.544;
    row.second_ratio = random.one_in(3) ? 0.0 : random.real(0, 1);
    row.zero_shift = random.real(-10, 10);
    row.sample_displacement = random.one_in(10) ? 1e300 : random.real(-1, 1);
    row.goniometer_radius = random.one_in(10) ? 1e-300 : 200.0;
    row.march_r = random.one_in(3) ? 1.0 : random.one_in(10) ? 1e-200 : random.real(0.3, 2);
    for (double& x : row.march_axis) x = static_cast<double>(random.integer(-2, 2));
    row.march_axis[1] = 1.0;
    row.polarisation = random.real(0, 1);
    row.counts = random.one_in(4) ? 0.0 : std::pow(10.0, random.real(-3, 6));
    for (double& x : row.background) x = random.one_in(20) ? 100.0 : random.real(-0.1, 0.3);
    row.hump_height = random.real(0, 0.2);
    row.hump_center = random.real(0, 180);
    row.hump_fwhm = random.one_in(20) ? 1e-300 : random.real(1, 20);
    row.two_theta_first = random.one_in(4) ? -1e300 : random.real(0, 60);
    row.two_theta_last = random.one_in(4) ? 1e300 : random.real(30, 180);
    row.impurity_count = random.real(0, kMaxImpurities);
    row.impurity_strength = random.real(0, 0.1);
    return row;
}

void drive_patterns(Random& random) {
    const int64_t n_patterns = random.integer(0, 4), n_points = random.integer(1, 400);
    const Block<int64_t> offset = random_offsets(random, n_patterns, 60), turns = random_offsets(random, n_patterns, 48);
    const int64_t n = offset[n_patterns], n_patches = (n_points + kPatchPoints - 1) / kPatchPoints;
    const Block<int16_t> hkl(3 * n), multiplicity(n), patch(n_patterns * n_patches);
    const Block<float> f_squared(n), intensity(n_patterns * n_points);
    const Block<double> metric(6 * n_patterns), b_overall(n_patterns);
    const Block<int8_t> rotations(9 * turns[n_patterns]);
    const Block<ProfileRow> profile(n_patterns);
    const Block<int64_t> id(n_patterns);
    const Block<int32_t> active(n_patterns);
    for (int64_t i = 0; i < hkl.size(); ++i) hkl[i] = static_cast<int16_t>(random.integer(-6, 6));
    for (int64_t i = 0; i < n; ++i) multiplicity[i] = static_cast<int16_t>(random.integer(-1, 48));
    for (int64_t i = 0; i < n; ++i) f_squared[i] = static_cast<float>(random.number(0, 1000));
    for (int64_t i = 0; i < metric.size(); ++i) metric[i] = random.number(i % 6 < 3 ? 0.01 : -0.01, 0.05);
    for (int64_t i = 0; i < rotations.size(); ++i) rotations[i] = static_cast<int8_t>(random.integer(-1, 1));
    for (int64_t i = 0; i < n_patterns; ++i) {
        b_overall[i] = random.number(0, 2);
        profile[i] = random_profile(random);
        id[i] = random.integer(INT64_MIN, INT64_MAX);
    }
    render_patterns_cpu({offset.get(), hkl.get(), multiplicity.get(), f_squared.get(), metric.get(), b_overall.get(),
                         turns.get(), rotations.get(), profile.get(), id.get(), intensity.get(), active.get(),
                         patch.get(), 3, 1, n_patterns, n_points, random.integer(INT64_MIN, INT64_MAX),
                         random.real(0, 4), 1.54, random.one_in(4) ? 0.0 : random.real(0, 60), random.real(0.001, 0.3)},
                        1);
    for (int64_t i = 0; i < intensity.size(); ++i)
        expect(intensity[i] >= 0.0f && intensity[i] <= 100.0f, "measured points lie in [0, 100]");
    for (int64_t i = 0; i < n_patterns; ++i) {
        const float* own = intensity.get() + i * n_points;
        const int16_t* listed = patch.get() + i * n_patches;
        for (int64_t j = 0, next = 0; j < n_patches; ++j) {
            const int64_t end = std::min((j + 1) * kPatchPoints, n_points);
            const bool lit = *std::max_element(own + j * kPatchPoints, own + end) >= kActiveIntensity;
            if (lit) expect(next < active[i] && listed[next] == j, "active patches are listed in order");
            next += lit;
            if (j + 1 == n_patches) expect(next == active[i], "no other patch is listed");
        }
        expect(active[i] == n_patches || listed[active[i]] == -1, "the list ends in -1");
    }
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) return 2;
    const unsigned first = static_cast<unsigned>(std::atoi(argv[1])), count = static_cast<unsigned>(std::atoi(argv[2]));
    for (seed = first; seed < first + count; ++seed) {
        Random random(seed);
        drive_simulation(random);
        drive_rendering(random);
        drive_attention<float>(random);
        drive_attention<double>(random);
        drive_patches<float>(random);
        drive_patches<double>(random);
        drive_peak_conv<float>(random);
        drive_peak_conv<double>(random);
        drive_dsr_loss<float>(random);
        drive_dsr_loss<double>(random);
        drive_dsr_loss<BFloat16>(random);
        drive_patterns(random);
        for (int i = 0; i < 50; ++i) drive_columns(random);
        drive_retrieval(random);
        drive_scans(random);
    }
    std::printf("%d passed, %d failed\n", n_passed, n_failed);
    return n_failed != 0;
}
