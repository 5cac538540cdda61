// simulate.cu: CUDA structure factors. Kernels list the reflections of every structure, sum their structure factors
// and name their families; the merging into lines or families is sorting, which xrdfast/ops/reflections.py leaves to
// torch on the same device.
//
// Structure factors need a sine only for the tables: exp(2 pi i h.r) is a product of three per-axis powers, kept in
// shared memory for a few atoms at a time. A block of 256 threads takes 512 reflections of one structure, two a
// thread, so that a table is read 512 times for each entry that is made.
#include "xrd_cuda.h"

#include <cmath>

#include "block_reduce.cuh"
#include "simulate.h"

namespace xrdfast {
namespace {

constexpr int kThreads = 256;     // of the sums
constexpr int kScanThreads = 128;  // of the rest; more would leave too few registers
constexpr int kReflectionsAThread = 2;  // four would spill
constexpr int kTile = kThreads * kReflectionsAThread;
constexpr int kTableEntries = 2048;  // 32 kB of complex double: seven blocks share an SM of 228 kB
static_assert(3 * (kMaxMillerIndex + 1) <= kTableEntries, "the largest cell needs room for one atom");
static_assert(kTableEntries * sizeof(double2) <= 48 * 1024, "shared memory that needs no opt-in");

constexpr double kShellTolerance = 1e-8;  // 1 / Angstrom, pymatgen's; the same in reciprocal_cell.h
constexpr double kSearchSlack = 1e-9;     // rows are searched a hair beyond the limit, then tested point by point
constexpr double kMottBethe = 41.78214;   // Angstrom^2, De Graef & McHenry, eq. 11.42

struct Vector {
    double x, y, z;
};

__device__ __forceinline__ Vector row_of(const double* matrix, int i) {
    return {matrix[3 * i], matrix[3 * i + 1], matrix[3 * i + 2]};
}
__device__ __forceinline__ double dot(Vector a, Vector b) { return a.x * b.x + a.y * b.y + a.z * b.z; }
__device__ __forceinline__ Vector cross(Vector a, Vector b, double scale) {
    return {(a.y * b.z - a.z * b.y) * scale, (a.z * b.x - a.x * b.z) * scale, (a.x * b.y - a.y * b.x) * scale};
}

// Largest Miller indices inside the shell: |h_i| <= g |a_i|.
struct Reach {
    int h, k, l;
};

__device__ __forceinline__ Reach reach_of(const double* lattice, double g_max) {
    const double g = g_max + kShellTolerance;
    const Vector a = row_of(lattice, 0), b = row_of(lattice, 1), c = row_of(lattice, 2);
    return {static_cast<int>(sqrt(dot(a, a)) * g), static_cast<int>(sqrt(dot(b, b)) * g),
            static_cast<int>(sqrt(dot(c, c)) * g)};
}

struct ReciprocalCell {
    Vector a, b, c;  // 1 / Angstrom
    int32_t status;

    __device__ __forceinline__ double g2(int h, int k, int l) const {
        const Vector g = {h * a.x + k * b.x + l * c.x, h * a.y + k * b.y + l * c.y, h * a.z + k * b.z + l * c.z};
        return dot(g, g);
    }
};

// The rules of cell_status in reciprocal_cell.h.
__device__ __forceinline__ ReciprocalCell reciprocal_cell(const double* lattice, double g_max) {
    const Vector a = row_of(lattice, 0), b = row_of(lattice, 1), c = row_of(lattice, 2);
    const double length_a = sqrt(dot(a, a)), length_b = sqrt(dot(b, b)), length_c = sqrt(dot(c, c));
    const double volume = dot(a, cross(b, c, 1.0)), cube = length_a * length_b * length_c;
    ReciprocalCell cell{};
    if (!(isfinite(volume) && isfinite(cube) && fabs(volume) > 1e-6 * cube && cube > 0.0)) {
        cell.status = kBadLattice;
        return cell;
    }
    cell.a = cross(b, c, 1.0 / volume);
    cell.b = cross(c, a, 1.0 / volume);
    cell.c = cross(a, b, 1.0 / volume);
    const double g = g_max + 0.5 * sqrt(dot(cell.a, cell.a) + dot(cell.b, cell.b) + dot(cell.c, cell.c));
    const double longest = fmax(length_a, fmax(length_b, length_c));
    constexpr double kHalfSphere = 2.0 / 3.0 * 3.14159265358979323846;
    const bool large = longest * g_max >= kMaxMillerIndex ||
                       kHalfSphere * g * g * g * fabs(volume) > static_cast<double>(kMaxReflections);
    cell.status = large ? kCellTooLarge : kSimulated;
    return cell;
}

// Calls visit(l, g2) for the points of a row (h, k) of the half-space that lie in the shell.
template <typename Visit>
__device__ __forceinline__ void for_each_in_row(const ReciprocalCell& cell, int h, int k, double g2_min, double g2_max,
                                                Visit visit) {
    if (h == 0 && k < 0) return;
    // |p + l c*|^2 <= g2_max with p = h a* + k b*
    const double inverse = 1.0 / dot(cell.c, cell.c);
    const Vector p = {h * cell.a.x + k * cell.b.x, h * cell.a.y + k * cell.b.y, h * cell.a.z + k * cell.b.z};
    const double middle = -dot(p, cell.c) * inverse;
    const double room = (g2_max * (1.0 + kSearchSlack) - dot(p, p)) * inverse + middle * middle + kSearchSlack;
    if (room < 0.0) return;
    const double half = sqrt(room);
    int l = static_cast<int>(ceil(middle - half));
    const int l_last = static_cast<int>(floor(middle + half));
    if (h == 0 && k == 0) l = max(l, 1);
    for (; l <= l_last; ++l) {
        const double g2 = cell.g2(h, k, l);
        if (g2 >= g2_min && g2 <= g2_max) visit(l, g2);
    }
}

// One block a structure, one thread a row (h, k). Without kWrite it counts, with it fills the room that was counted.
template <bool kWrite>
__global__ void __launch_bounds__(kScanThreads, 6)  // 80 registers; left alone, ptxas spills to keep within 64
    scan_half_spaces(const double* lattice, double g_min, double g_max, int64_t* count, int32_t* status,
                     const int64_t* offset, int16_t* hkl, double* g2) {
    XRD_SHARED(int, partial, kScanThreads / 32);
    const int64_t structure = blockIdx.x;
    if (kWrite && offset[structure] == offset[structure + 1]) return;
    lattice += 9 * structure;
    const ReciprocalCell cell = reciprocal_cell(lattice, g_max);
    const double low = fmax(g_min, 0.0), high = g_max + kShellTolerance;
    int n_rows = 0, width = 1;
    Reach reach = {0, 0, 0};
    if (cell.status == kSimulated) {
        reach = reach_of(lattice, g_max);
        width = 2 * reach.k + 1;
        n_rows = (reach.h + 1) * width;
    }
    int64_t at = kWrite ? offset[structure] : 0;
    for (int first = 0; first < n_rows; first += kScanThreads) {
        const int row = first + static_cast<int>(threadIdx.x);
        const int h = row / width, k = row % width - reach.k;
        int n = 0, total;
        if (row < n_rows) for_each_in_row(cell, h, k, low * low, high * high, [&](int, double) { ++n; });
        const int before = block_exclusive_sum<kScanThreads>(n, partial, &total);
        if (kWrite && n > 0) {
            int64_t i = at + before;
            for_each_in_row(cell, h, k, low * low, high * high, [&](int l, double value) {
                hkl[3 * i] = static_cast<int16_t>(h);
                hkl[3 * i + 1] = static_cast<int16_t>(k);
                hkl[3 * i + 2] = static_cast<int16_t>(l);
                g2[i++] = value;
            });
        }
        at += total;
    }
    if (!kWrite && threadIdx.x == 0) {
        count[structure] = at;
        status[structure] = cell.status == kSimulated && at == 0 ? kNoReflection : cell.status;
    }
}

// exp(2 pi i n t); t is reduced before and after the product, so that a large n loses no more than n ulp.
__device__ __forceinline__ double2 power(double t, int n, double scale) {
    t -= rint(t);
    double turns = n * t, sine, cosine;
    turns -= rint(turns);
    sincospi(2.0 * turns, &sine, &cosine);
    return make_double2(scale * cosine, scale * sine);
}

__device__ __forceinline__ double2 product(double2 a, double2 b) {
    return make_double2(a.x * b.x - a.y * b.y, a.x * b.y + a.y * b.x);
}
__device__ __forceinline__ double2 conjugate_if(bool condition, double2 a) {
    return make_double2(a.x, condition ? -a.y : a.y);
}

// f(s) at s^2 = g^2 / 4.
__device__ __forceinline__ double form_factor_at(const double* coefficients, bool mott_bethe, double s2) {
    double sum = 0.0;
#pragma unroll
    for (int i = 0; i < kGaussians; ++i) sum += coefficients[i] * exp(-coefficients[kGaussians + i] * s2);
    return coefficients[2 * kGaussians] + (mott_bethe ? -kMottBethe * s2 * sum : sum);
}

// F = sum over species f(s) exp(-B s^2) S; S, the sum over the atoms of one species, is multiplied by f only where the
// species ends, so atoms sorted by element and B cost one form factor a species. Any order of atoms is right.
template <bool kDispersion>
__global__ void __launch_bounds__(kThreads)
    sum_structure_factors(StructureBatch batch, const int64_t* offset, const int16_t* hkl, const double* g2,
                          double* f_squared) {
    XRD_DYNAMIC_SHARED(double2, table);  // (n_chunk, n_entries): powers along a (times occupancy), b, c of each atom
    // Structure s begins at tile offset[s] / kTile + s: at most one block a structure has nothing to do.
    int64_t structure = 0, beyond = batch.n_structures;
    while (beyond - structure > 1) {
        const int64_t middle = (structure + beyond) / 2;
        if (offset[middle] / kTile + middle <= static_cast<int64_t>(blockIdx.x)) structure = middle;
        else beyond = middle;
    }
    const int64_t tile = blockIdx.x - (offset[structure] / kTile + structure);
    const int64_t begin = offset[structure] + tile * kTile, end = offset[structure + 1];
    if (begin >= end) return;

    int h[kReflectionsAThread], k[kReflectionsAThread], l[kReflectionsAThread];
    double s2[kReflectionsAThread];
    double2 sum[kReflectionsAThread], with_f_prime[kReflectionsAThread], with_f_double_prime[kReflectionsAThread];
#pragma unroll
    for (int i = 0; i < kReflectionsAThread; ++i) {
        const int64_t at = begin + i * kThreads + threadIdx.x;
        const bool inside = at < end;
        h[i] = inside ? hkl[3 * at] : 0;
        k[i] = inside ? hkl[3 * at + 1] : 0;
        l[i] = inside ? hkl[3 * at + 2] : 0;
        s2[i] = inside ? 0.25 * g2[at] : 0.0;
        sum[i] = with_f_prime[i] = with_f_double_prime[i] = make_double2(0.0, 0.0);
    }
    const Reach reach = reach_of(batch.lattice + 9 * structure, batch.g_max);
    const int k_entry = reach.h + 1, l_entry = k_entry + reach.k + 1, n_entries = l_entry + reach.l + 1;
    const int n_chunk = kTableEntries / n_entries;
    const int64_t last_atom = batch.atom_offset[structure + 1];
    for (int64_t chunk = batch.atom_offset[structure]; chunk < last_atom; chunk += n_chunk) {
        const int n_atoms = static_cast<int>(min(static_cast<int64_t>(n_chunk), last_atom - chunk));
        __syncthreads();
        for (int i = threadIdx.x; i < n_atoms * n_entries; i += kThreads) {
            const int64_t atom = chunk + i / n_entries;
            const int entry = i % n_entries;
            const double* r = batch.fractional + 3 * atom;
            table[i] = entry < k_entry   ? power(r[0], entry, batch.occupancy[atom])
                       : entry < l_entry ? power(r[1], entry - k_entry, 1.0)
                                         : power(r[2], entry - l_entry, 1.0);
        }
        __syncthreads();
        for (int j = 0; j < n_atoms; ++j) {
            const double2 *x = table + j * n_entries, *y = x + k_entry, *z = x + l_entry;
#pragma unroll
            for (int i = 0; i < kReflectionsAThread; ++i) {
                const double2 wave = product(product(x[h[i]], conjugate_if(k[i] < 0, y[abs(k[i])])),
                                             conjugate_if(l[i] < 0, z[abs(l[i])]));
                sum[i].x += wave.x;
                sum[i].y += wave.y;
            }
            const int64_t atom = chunk + j;
            const int element = batch.atomic_number[atom];
            const double b_iso = batch.b_iso[atom];
            const bool ends = atom + 1 == last_atom || batch.atomic_number[atom + 1] != element ||
                              batch.b_iso[atom + 1] != b_iso;
            if (!ends) continue;
            const double* coefficients = batch.form_factor + element * kFormFactorColumns;
#pragma unroll
            for (int i = 0; i < kReflectionsAThread; ++i) {
                double f = form_factor_at(coefficients, batch.mott_bethe, s2[i]);
                if (kDispersion) f += batch.dispersion[2 * element];
                const double damping = exp(-b_iso * s2[i]);
                with_f_prime[i].x += f * damping * sum[i].x;
                with_f_prime[i].y += f * damping * sum[i].y;
                if (kDispersion) {
                    const double f_double_prime = batch.dispersion[2 * element + 1] * damping;
                    with_f_double_prime[i].x += f_double_prime * sum[i].x;
                    with_f_double_prime[i].y += f_double_prime * sum[i].y;
                }
                sum[i] = make_double2(0.0, 0.0);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < kReflectionsAThread; ++i) {
        const int64_t at = begin + i * kThreads + threadIdx.x;
        const double2 u = with_f_prime[i], v = with_f_double_prime[i];
        // |F(h)|^2 and |F(-h)|^2 differ; their mean is |U|^2 + |V|^2, U with f' and V with f''
        if (at < end) f_squared[at] = u.x * u.x + u.y * u.y + (kDispersion ? v.x * v.x + v.y * v.y : 0.0);
    }
}

// code = largest image of hkl under the group and inversion; multiplicity = number of distinct images.
__global__ void __launch_bounds__(kScanThreads)
    name_families(int64_t n_reflections, const int64_t* structure, const int16_t* hkl, const int64_t* rotation_offset,
                  const int8_t* rotations, int32_t* code, int16_t* multiplicity) {
    constexpr int kShift = kMaxMillerIndex + 1;
    const int64_t at = static_cast<int64_t>(blockIdx.x) * kScanThreads + threadIdx.x;
    if (at >= n_reflections) return;
    const int h = hkl[3 * at], k = hkl[3 * at + 1], l = hkl[3 * at + 2];
    const int64_t begin = rotation_offset[structure[at]], end = rotation_offset[structure[at] + 1];
    const auto pack = [](int a, int b, int c) { return ((a + kShift) << 20) + ((b + kShift) << 10) + (c + kShift); };
    int largest = begin == end ? max(pack(h, k, l), pack(-h, -k, -l)) : 0, hits = 1;
    for (int64_t r = begin; r < end; ++r) {
        const int8_t* w = rotations + 9 * r;
        const int a = h * w[0] + k * w[3] + l * w[6];
        const int b = h * w[1] + k * w[4] + l * w[7];
        const int c = h * w[2] + k * w[5] + l * w[8];
        const int image = max(pack(a, b, c), pack(-a, -b, -c));
        hits = image > largest ? 1 : hits + (image == largest);
        largest = max(image, largest);
    }
    code[at] = largest;
    multiplicity[at] = static_cast<int16_t>(2 * max(end - begin, int64_t{1}) / hits);
}

}  // namespace

int count_reflections_cuda(const StructureBatch& batch, int64_t* count, int32_t* status, void* stream) {
    if (batch.n_structures == 0) return 0;
    const dim3 grid(static_cast<unsigned>(batch.n_structures));
    XRD_LAUNCH((scan_half_spaces<false>), grid, dim3(kScanThreads), 0, stream, batch.lattice, batch.g_min,
               batch.g_max, count, status, nullptr, nullptr, nullptr);
    return XRD_LAST_ERROR();
}

int list_reflections_cuda(const StructureBatch& batch, const ReflectionList& list, void* stream) {
    if (batch.n_structures == 0) return 0;
    const dim3 grid(static_cast<unsigned>(batch.n_structures));
    XRD_LAUNCH((scan_half_spaces<true>), grid, dim3(kScanThreads), 0, stream, batch.lattice, batch.g_min,
               batch.g_max, nullptr, nullptr, list.offset, list.hkl, list.g2);
    return XRD_LAST_ERROR();
}

int structure_factors_cuda(const StructureBatch& batch, const ReflectionList& list, void* stream) {
    if (list.n_reflections == 0) return 0;
    const dim3 grid(static_cast<unsigned>(list.n_reflections / kTile + batch.n_structures));
    constexpr size_t kShared = kTableEntries * sizeof(double2);
    if (batch.dispersion)
        XRD_LAUNCH((sum_structure_factors<true>), grid, dim3(kThreads), kShared, stream, batch, list.offset, list.hkl,
                   list.g2, list.f_squared);
    else
        XRD_LAUNCH((sum_structure_factors<false>), grid, dim3(kThreads), kShared, stream, batch, list.offset, list.hkl,
                   list.g2, list.f_squared);
    return XRD_LAST_ERROR();
}

int name_families_cuda(const FamilyNames& names, void* stream) {
    if (names.n_reflections == 0) return 0;
    const dim3 grid(static_cast<unsigned>((names.n_reflections + kScanThreads - 1) / kScanThreads));
    XRD_LAUNCH(name_families, grid, dim3(kScanThreads), 0, stream, names.n_reflections, names.structure, names.hkl,
               names.rotation_offset, names.rotations, names.code, names.multiplicity);
    return XRD_LAST_ERROR();
}

}  // namespace xrdfast
