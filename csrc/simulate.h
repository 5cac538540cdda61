// simulate.h: crystal structures -> reflections (families under the Laue group, or lines merged as pymatgen does).
// Plain C++; no torch, no CUDA headers. The Python side (xrdfast/ops/simulate.py) checks and allocates.
#pragma once
#include <cstdint>
#include <vector>

namespace xrdfast {

constexpr int kGaussians = 5;        // terms of a form-factor fit, zero-padded
constexpr int kFormFactorColumns = 2 * kGaussians + 1;

enum SimulateStatus : int32_t {
    kSimulated = 0,
    kNoReflection = 1,    // no reciprocal-lattice point between the limits
    kUnknownElement = 2,  // an element without a form factor in the chosen table
    kCellTooLarge = 3,    // a Miller index beyond kMaxMillerIndex, or more than kMaxReflections
    kBadLattice = 4,      // non-finite or singular lattice
    kNoIntensity = 5,     // every structure factor vanishes or is not finite
};
constexpr int kMaxMillerIndex = 511;              // three indices are packed into 30 bits
constexpr int64_t kMaxReflections = int64_t{1} << 26;  // a structure; about 5 GB of workspace

// Structures packed one after another, and how they scatter.
struct StructureBatch {
    const int64_t* atom_offset;    // (n_structures + 1)
    const double* lattice;         // (n_structures, 3, 3), rows a, b, c, Angstrom
    const uint8_t* atomic_number;  // (n_atoms), below n_elements
    const double* fractional;      // (n_atoms, 3)
    const double* occupancy;       // (n_atoms), 0..1
    const double* b_iso;           // (n_atoms), Angstrom^2
    // f(s) = c + g(s) sum_k a_k exp(-b_k s^2), s = sin(theta) / lambda; g = 1, or -41.78214 s^2 for a Mott-Bethe fit
    const double* form_factor;     // (n_elements, kFormFactorColumns): a_1..a_5, b_1..b_5 (Angstrom^2), c;
                                   // c is NaN where the table has no such element
    const double* dispersion;      // (n_elements, 2) f', f'' in electrons, or null
    int64_t n_structures;
    int64_t n_elements;
    bool mott_bethe;
    double wavelength;             // Angstrom
    double g_min, g_max;           // limits of 1 / d, 1 / Angstrom, inclusive
};

// A merged line; the strongest of a structure has intensity 100. Named by its largest member in lexical order.
struct MergedLine {
    double two_theta;  // degrees
    double intensity;
    double d_spacing;  // Angstrom
    int16_t hkl[3];
};

struct ReflectionFamily {
    int16_t hkl[3];        // largest member in lexical order
    int16_t multiplicity;  // Friedel mates counted
    float f_squared;       // |F|^2, electrons^2, mean over the members and Friedel mates; no LP
};

// What a simulation found, as its threads left it, until the caller has made room for exactly so many rows.
template <typename Row>
struct Simulated {
    struct Place {
        int thread;
        int64_t piece, begin, rows;
    };
    std::vector<std::vector<std::vector<Row>>> pieces;  // of each thread
    std::vector<Place> place;                           // (n_structures)
    std::vector<int32_t> status;                        // (n_structures), SimulateStatus
    int64_t n_rows = 0;
};
using SimulatedLines = Simulated<MergedLine>;
using SimulatedFamilies = Simulated<ReflectionFamily>;

struct FamilyRules {
    const int64_t* rotation_offset;  // (n_structures + 1)
    const int8_t* rotations;         // (n_rotations, 3, 3), hkl' = hkl W; none = identity only
    double relative_cutoff;          // families weaker than this share of the strongest line are left out
};

struct LinesOutput {
    int64_t* offset;    // (n_structures + 1)
    double* two_theta;  // (n_rows), as intensity and d_spacing
    double* intensity;
    double* d_spacing;
    int16_t* hkl;     // (n_rows, 3)
    int32_t* status;  // (n_structures)
};

struct FamiliesOutput {
    int64_t* offset;        // (n_structures + 1)
    int16_t* hkl;           // (n_rows, 3)
    int16_t* multiplicity;  // (n_rows), as f_squared
    float* f_squared;
    int32_t* status;        // (n_structures)
};

SimulatedLines simulate_lines_cpu(const StructureBatch& batch, int n_threads);
SimulatedFamilies simulate_families_cpu(const StructureBatch& batch, const FamilyRules& rules, int n_threads);
// Structure by structure, sorted by angle within one.
void write_rows(const SimulatedLines& found, const LinesOutput& out, int n_threads);
void write_rows(const SimulatedFamilies& found, const FamiliesOutput& out, int n_threads);

// Reflections on a CUDA device, one of each Friedel pair, structure by structure.
struct ReflectionList {
    const int64_t* offset;  // (n_structures + 1), running sum of the counts
    int64_t n_reflections;
    int16_t* hkl;           // (n_reflections, 3), first non-zero index positive
    double* g2;             // (n_reflections), 1 / d^2, 1 / Angstrom^2
    double* f_squared;      // (n_reflections), |F|^2, electrons^2, Friedel mean
};

// What family each reflection belongs to.
struct FamilyNames {
    int64_t n_reflections;
    const int64_t* structure;        // (n_reflections)
    const int16_t* hkl;              // (n_reflections, 3)
    const int64_t* rotation_offset;  // (n_structures + 1)
    const int8_t* rotations;         // (n_rotations, 3, 3)
    int32_t* code;                   // (n_reflections), the largest member packed into 30 bits
    int16_t* multiplicity;           // (n_reflections), Friedel mates counted
};

// The device's part of a simulation, in this order; the merging is left to torch. Pointers are the device's. All return
// a cudaError_t as int; `stream` is a cudaStream_t.
// count and status: (n_structures); status is kSimulated, kNoReflection, kCellTooLarge or kBadLattice.
int count_reflections_cuda(const StructureBatch& batch, int64_t* count, int32_t* status, void* stream);
// Writes hkl and g2. The offsets must come from the counts, or be level over a structure to skip it.
int list_reflections_cuda(const StructureBatch& batch, const ReflectionList& list, void* stream);
// Writes f_squared. Every element must be known; atoms sorted by element and B make it fast.
int structure_factors_cuda(const StructureBatch& batch, const ReflectionList& list, void* stream);
int name_families_cuda(const FamilyNames& names, void* stream);

}  // namespace xrdfast
