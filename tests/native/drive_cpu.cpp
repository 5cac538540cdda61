// drive_cpu.cpp: calls the CPU kernels with random sizes and hostile values, so that sanitizers see all of them, and
// checks what must hold of any answer. Buffers are heap blocks of the exact size. That the numbers are right is tested
// from Python, against the references. Usage: drive_cpu FIRST_SEED N_SEEDS; exit 1 where a rule is broken.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "render.h"
#include "render_patterns.h"
#include "simulate.h"

using namespace xrdfast;

namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();
unsigned seed;
int n_passed = 0, n_failed = 0;

void expect(bool condition, const char* what) {
    ++(condition ? n_passed : n_failed);
    if (!condition && n_failed < 20) std::printf("seed %u: BROKEN: %s\n", seed, what);
}

// A heap block of exactly n elements: one past the end is an error that AddressSanitizer sees.
template <typename T>
class Block {
   public:
    explicit Block(int64_t n) : n_(n), data_(new T[n]()) {}
    T* get() const { return data_.get(); }
    T& operator[](int64_t i) const { return data_[i]; }
    int64_t size() const { return n_; }
    bool operator==(const Block& other) const {
        return n_ == other.n_ && (n_ == 0 || std::memcmp(get(), other.get(), n_ * sizeof(T)) == 0);
    }

   private:
    int64_t n_;
    std::unique_ptr<T[]> data_;
};

class Random {
   public:
    explicit Random(unsigned s) : engine_(s) {}
    int64_t integer(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine_); }
    double real(double low, double high) { return std::uniform_real_distribution<double>(low, high)(engine_); }
    bool one_in(int n) { return integer(1, n) == 1; }
    double hostile() {
        static const double values[] = {kNaN, kInf, -kInf, 0.0, -0.0, -1.0, 1e300, -1e300, 1e-310, 0.5, 1e9};
        return values[integer(0, static_cast<int64_t>(std::size(values)) - 1)];
    }
    // Mostly harmless.
    double number(double low, double high) { return one_in(60) ? hostile() : real(low, high); }

   private:
    std::mt19937_64 engine_;
};

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

void check_offsets(const Block<int64_t>& offset, const int64_t* capacity, const Block<int32_t>& status, int64_t found) {
    const int64_t n = offset.size() - 1;
    expect(offset[0] == 0 && offset[n] == found, "offsets run from 0 to the number of rows");
    for (int64_t i = 0; i < n; ++i) {
        const int64_t rows = offset[i + 1] - offset[i];
        expect(rows >= 0 && rows <= capacity[i + 1] - capacity[i], "rows fit into the room of their structure");
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
    int64_t found = 0;

    Lines(const StructureBatch& batch, const int64_t* capacity)
        : offset(batch.n_structures + 1),
          two_theta(capacity[batch.n_structures] - capacity[0]),
          intensity(two_theta.size()),
          d_spacing(two_theta.size()),
          hkl(3 * two_theta.size()),
          status(batch.n_structures) {
        found = simulate_lines_cpu(batch,
                                   {capacity, offset.get(), two_theta.get(), intensity.get(), d_spacing.get(),
                                    hkl.get(), status.get()},
                                   1);
    }
};

struct FamilyRows {
    Block<int64_t> offset;
    Block<int16_t> hkl, multiplicity;
    Block<float> f_squared;
    Block<int32_t> status;
    int64_t found = 0;

    FamilyRows(const Structures& s, const int64_t* capacity, double cutoff)
        : offset(s.batch.n_structures + 1),
          hkl(3 * capacity[s.batch.n_structures]),
          multiplicity(capacity[s.batch.n_structures]),
          f_squared(multiplicity.size()),
          status(s.batch.n_structures) {
        found = simulate_families_cpu(s.batch,
                                      {capacity, s.rotation_offset.get(), s.rotations.get(), cutoff, offset.get(),
                                       hkl.get(), multiplicity.get(), f_squared.get(), status.get()},
                                      1);
    }
};

void drive_simulation(Random& random) {
    const Structures s = random_structures(random);
    const StructureBatch& batch = s.batch;
    const int64_t n = batch.n_structures;
    Block<int64_t> capacity(n + 1);
    const int64_t room = reflection_capacity_cpu(batch.lattice, n, batch.g_max, capacity.get());
    expect(room == capacity[n], "the capacity is the last of its running sum");

    const Lines lines(batch, capacity.get());
    check_offsets(lines.offset, capacity.get(), lines.status, lines.found);
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
        const Lines tail(window(batch, begin), capacity.get() + begin);
        const int64_t first = lines.offset[begin];
        expect(tail.found == lines.found - first, "a window has the rows of its structures");
        expect(std::equal(tail.intensity.get(), tail.intensity.get() + tail.found, lines.intensity.get() + first),
               "a window gives the same lines");
    }

    const FamilyRows families(s, capacity.get(), random.one_in(2) ? 0.0 : 1e-6);
    check_offsets(families.offset, capacity.get(), families.status, families.found);
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
        drive_patterns(random);
    }
    std::printf("%d passed, %d failed\n", n_passed, n_failed);
    return n_failed != 0;
}
