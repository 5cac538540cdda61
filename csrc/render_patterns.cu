// render_patterns.cu: CUDA rendering of reflection families as measured and preprocessed patterns: a block a pattern for
// its lines and for its counts, between them a warp for every tile of it.
//
// Every point is summed by one thread over the lines in the order the CPU adds them, with the same functions
// (portable_math.h), and nothing is left to atomics: the pattern is the CPU's. A warp takes a tile of 128 points and
// skips the lines that don't reach it, so that lines need no sorting; tiles of a pattern are shared by several blocks,
// since a pattern of 20,000 families has a hundred times the lines of most. Between the phases a pattern lies in device
// memory (34 kB, so in cache), which leaves shared memory free and the number of points open.
#include "xrd_cuda.h"

#include <cmath>

#include "block_reduce.cuh"
#include "active_patches.cuh"
#include "render_patterns.h"
#include "significance.cuh"

namespace xrdfast {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kPointsALane = 4;
constexpr int kTile = 32 * kPointsALane;
static_assert(kTile % kLineBlock == 0 && 32 % kLineBlock == 0, "a tile is whole blocks of a line's window");
static_assert(kMaxRotations <= kThreads, "one thread makes one image of the axis");

struct Reciprocal {
    double aa, bb, cc, bc, ac, ab;

    __device__ __forceinline__ double dot(double h, double k, double l, double x, double y, double z) const {
        return h * x * aa + k * y * bb + l * z * cc + (k * z + l * y) * bc + (h * z + l * x) * ac +
               (h * y + k * x) * ab;
    }
};

// One family at one wavelength: observed angle, and area 0 where there is no line.
struct Diffracted {
    double sin2, two_theta, area;
};
__device__ __forceinline__ Diffracted diffract(const ProfileRow& row, double g2, double weight, double wavelength,
                                               double ratio) {
    const double sin2 = 0.25 * wavelength * wavelength * g2;
    if (!(sin2 > 0.0 && sin2 < 1.0)) return {0.5, 0.0, 0.0};
    const double area = ratio * weight * lorentz_polarisation_of(row, sin2);
    if (!(area > 0.0 && area <= 1e300)) return {0.5, 0.0, 0.0};
    const double two_theta = 2.0 * kDegreesARadian * asin(sqrt(sin2));
    return {sin2, observed_two_theta(row, two_theta, sqrt(1.0 - sin2)), area};
}

// 1 / d^2 and weight of every family into the scratch.
__device__ __forceinline__ void weigh_families(const RenderPatternsParams& p, const RenderPatternsScratch& scratch,
                                               int64_t pattern, const double (*images)[3], int n_images) {
    const int64_t begin = p.offset[pattern];
    const int n = static_cast<int>(p.offset[pattern + 1] - begin);
    const double* m = p.reciprocal_metric + 6 * pattern;
    const Reciprocal metric = {m[0], m[1], m[2], m[3], m[4], m[5]};
    const double r = p.profile[pattern].march_r, across = 1.0 / r, along = r * r - across;
    for (int i = threadIdx.x; i < n; i += kThreads) {
        const int16_t* hkl = p.hkl + (begin + i) * p.hkl_stride;
        const double h = hkl[0], k = hkl[1], l = hkl[2], g2 = metric.dot(h, k, l, h, k, l);
        double weight = static_cast<double>(p.multiplicity[(begin + i) * p.multiplicity_stride]) *
                        static_cast<double>(p.f_squared[begin + i]) * exp(-0.5 * p.b_overall[pattern] * g2);
        double mean = 0.0;
        for (int j = 0; j < n_images; ++j) {
            const double dot = h * images[j][0] + k * images[j][1] + l * images[j][2];
            const double cos2 = fmin(dot * dot / g2, 1.0), base = along * cos2 + across;
            mean += 1.0 / (base * sqrt(base));
        }
        if (n_images) weight *= mean / n_images;
        scratch.g2[begin + i] = g2;
        scratch.weight[begin + i] = weight;
    }
}

// Image j of the textured axis: G* times it, over its length.
__device__ __forceinline__ void make_image(const double* axis, const int8_t* w, const double* m, double* image) {
    double v[3];
    for (int i = 0; i < 3; ++i) v[i] = w ? axis[0] * w[i] + axis[1] * w[3 + i] + axis[2] * w[6 + i] : axis[i];
    const double g[3] = {m[0] * v[0] + m[5] * v[1] + m[4] * v[2], m[5] * v[0] + m[1] * v[1] + m[3] * v[2],
                         m[4] * v[0] + m[3] * v[1] + m[2] * v[2]};
    const double scale = 1.0 / sqrt(g[0] * v[0] + g[1] * v[1] + g[2] * v[2]);
    for (int i = 0; i < 3; ++i) image[i] = g[i] * scale;
}

// Sum of the lines at the points of a tile that the lane has: tile + lane, tile + lane + 32, ... Each lane looks at one
// line in 32, and the warp then takes those that reach the tile, in their order.
__device__ __forceinline__ void sum_lines(const Line* lines, int n_lines, int tile, float* sum) {
    const int lane = threadIdx.x & 31, first_block = tile / kLineBlock, end_block = first_block + kTile / kLineBlock;
#pragma unroll
    for (int q = 0; q < kPointsALane; ++q) sum[q] = 0.0f;
    for (int group = 0; group < n_lines; group += 32) {
        const int own = group + lane;
        const bool reaches = own < n_lines && lines[own].begin < end_block && lines[own].end > first_block;
        for (unsigned left = __ballot_sync(kFullMask, reaches); left; left &= left - 1) {
            const Line line = lines[group + __ffs(static_cast<int>(left)) - 1];  // the same for the whole warp
            const bool core = line.core_begin < end_block && line.core_end > first_block;
#pragma unroll
            for (int q = 0; q < kPointsALane; ++q) {
                const int point = tile + 32 * q + lane, block = point / kLineBlock;
                if (block < line.begin || block >= line.end) continue;
                const bool low = point <= line.middle;
                const float slope = low ? line.low_slope : line.high_slope;
                const float start = low ? line.low_start : line.high_start;
                const float u = line_distance(slope, start, point, line.middle);
                sum[q] = fmaf(line.lorentzian, lorentzian(u), sum[q]);
                if (core && block >= line.core_begin && block < line.core_end)
                    sum[q] = fmaf(line.gaussian, gaussian(u), sum[q]);
            }
        }
    }
}

// Draws the counts of a pattern from its peaks, less `removed` times the background, into `signal`.
__device__ __forceinline__ void count(const RenderPatternsParams& p, int64_t pattern, MeasuredRange measured,
                                      const float* peaks, float strongest, float removed, float* signal) {
    const ProfileRow& row = p.profile[pattern];
    const Background background = background_of(row, p.two_theta_min, p.two_theta_step, p.n_points);
    const float scale = static_cast<float>(row.counts) / strongest;
    const int begin = static_cast<int>(measured.first / kNoiseBlock) * kNoiseLanes;
    const int end = static_cast<int>((measured.last + kNoiseBlock - 1) / kNoiseBlock) * kNoiseLanes;
    for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += kThreads) {
        const Philox random = philox(static_cast<uint32_t>(i), kNoiseStream, static_cast<uint64_t>(p.seed),
                                     static_cast<uint64_t>(p.pattern_id[pattern]));
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            const int point = i / kNoiseLanes * kNoiseBlock + w * kNoiseLanes + i % kNoiseLanes;
            if (point < measured.first || point >= measured.last) continue;
            const float level = background_counts(background, point);
            signal[point] = poisson(fmaf(peaks[point], scale, level), random.word[w]) - removed * level;
        }
    }
}

// Points of `signal` below k times the noise become 0. `noise` has room for that of the blocks.
__device__ __forceinline__ void clip(float* signal, int n, float k, float* noise) {
    const int n_blocks = static_cast<int>(significance_blocks(n));
    for (int b = static_cast<int>(threadIdx.x >> 5); b < n_blocks; b += kWarps) {
        const float level = block_noise_of(signal, n, b);
        if ((threadIdx.x & 31) == 0) noise[b] = level;
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < n; i += kThreads)
        signal[i] = significant(signal[i], k * noise_at(noise, n_blocks, i));
    __syncthreads();
}

__device__ __forceinline__ float strongest_of(const float* value, int n, double* partial) {
    float most = 0.0f;
    for (int i = static_cast<int>(threadIdx.x); i < n; i += kThreads) most = value[i] > most ? value[i] : most;
    return static_cast<float>(block_max<kThreads>(static_cast<double>(most), partial));
}

__global__ void __launch_bounds__(kThreads, 2) weigh_and_shape(RenderPatternsParams p, RenderPatternsScratch scratch) {
    XRD_SHARED(double, image, 3 * kMaxRotations);
    XRD_SHARED(double, partial, kWarps);
    const int64_t pattern = blockIdx.x, begin = p.offset[pattern];
    const int n = static_cast<int>(p.offset[pattern + 1] - begin);
    const ProfileRow& row = p.profile[pattern];
    double(*images)[3] = reinterpret_cast<double(*)[3]>(image);
    int n_images = 0;
    if (row.march_r != 1.0) {
        const int64_t first = p.rotation_offset[pattern];
        const int n_rotations = static_cast<int>(p.rotation_offset[pattern + 1] - first);
        n_images = n_rotations ? n_rotations : 1;
        if (static_cast<int>(threadIdx.x) < n_images)
            make_image(row.march_axis, n_rotations ? p.rotations + 9 * (first + threadIdx.x) : nullptr,
                       p.reciprocal_metric + 6 * pattern, images[threadIdx.x]);
        __syncthreads();
    }
    weigh_families(p, scratch, pattern, images, n_images);  // a thread reads back its own families only

    const LineShape shape = line_shape(row, p.two_theta_min, p.two_theta_step, p.n_points);
    const MeasuredRange measured = measured_range(row, shape, p.two_theta_step);
    double strongest = 0.0;
    for (int i = threadIdx.x; i < n; i += kThreads) {
        const Diffracted found = diffract(row, scratch.g2[begin + i], scratch.weight[begin + i], p.wavelength, 1.0);
        const double center = (found.two_theta - shape.two_theta_min) * shape.points_a_degree;
        if (center >= static_cast<double>(measured.first) && center < static_cast<double>(measured.last))
            strongest = fmax(strongest, found.area);
    }
    strongest = block_max<kThreads>(strongest, partial);

    Line* lines = scratch.line + 2 * begin + 2 * kMaxImpurities * pattern;
    const int n_foreign = strongest > 0.0 ? static_cast<int>(row.impurity_count) : 0;
    const auto seed = static_cast<uint64_t>(p.seed), id = static_cast<uint64_t>(p.pattern_id[pattern]);
    for (int w = 0; w < 2; ++w) {
        const double wavelength = w ? row.second_wavelength : p.wavelength, ratio = w ? row.second_ratio : 1.0;
        for (int i = threadIdx.x; i < n; i += kThreads) {
            const Diffracted found = diffract(row, scratch.g2[begin + i], scratch.weight[begin + i], wavelength, ratio);
            Line line = no_line();
            if (found.area > 0.0 && strongest > 0.0)
                line = make_line(row, shape, wavelength, found.sin2, found.two_theta, found.area / strongest);
            lines[w * n + i] = line;
        }
        for (int j = threadIdx.x; j < kMaxImpurities; j += kThreads) {
            Line line = no_line();
            if (j < n_foreign && ratio > 0.0) {
                const Impurity foreign = impurity(row, measured, p.two_theta_min, p.two_theta_step, j, seed, id);
                const double stretch = wavelength / p.wavelength, sin2 = foreign.sin2 * stretch * stretch;
                const double two_theta = 2.0 * kDegreesARadian * asin(sqrt(fmin(sin2, 1.0)));
                if (sin2 > 0.0 && sin2 < 1.0)
                    line = make_line(row, shape, wavelength, sin2,
                                     observed_two_theta(row, two_theta, sqrt(1.0 - sin2)), ratio * foreign.area);
            }
            lines[2 * n + w * kMaxImpurities + j] = line;
        }
    }
}

// Blocks that share a pattern, a tile for each of their warps.
__host__ __device__ __forceinline__ int64_t blocks_a_pattern(int64_t n_points) {
    return (n_points + kWarps * kTile - 1) / (kWarps * kTile);
}

__global__ void __launch_bounds__(kThreads, 4) add_lines(RenderPatternsParams p, RenderPatternsScratch scratch) {
    const int64_t n_blocks = blocks_a_pattern(p.n_points), pattern = blockIdx.x / n_blocks, begin = p.offset[pattern];
    const int n_points = static_cast<int>(p.n_points);
    const int n_lines = static_cast<int>(2 * (p.offset[pattern + 1] - begin)) + 2 * kMaxImpurities;
    const int warp = static_cast<int>(blockIdx.x % n_blocks) * kWarps + static_cast<int>(threadIdx.x >> 5);
    const int tile = warp * kTile;
    if (tile >= n_points) return;
    float sum[kPointsALane];
    sum_lines(scratch.line + 2 * begin + 2 * kMaxImpurities * pattern, n_lines, tile, sum);
#pragma unroll
    for (int q = 0; q < kPointsALane; ++q) {
        const int point = tile + 32 * q + static_cast<int>(threadIdx.x & 31);
        if (point < n_points) scratch.peaks[pattern * p.n_points + point] = sum[q];
    }
}

__global__ void __launch_bounds__(kThreads, 3) measure(RenderPatternsParams p, RenderPatternsScratch scratch) {
    XRD_SHARED(double, partial, kWarps);
    XRD_SHARED(int, partial_count, kWarps);
    const int64_t pattern = blockIdx.x;
    const int n_points = static_cast<int>(p.n_points);
    const ProfileRow& row = p.profile[pattern];
    const LineShape shape = line_shape(row, p.two_theta_min, p.two_theta_step, p.n_points);
    const MeasuredRange measured = measured_range(row, shape, p.two_theta_step);
    const int first = static_cast<int>(measured.first);
    const int n_measured = measured.last > measured.first ? static_cast<int>(measured.last - measured.first) : 0;
    float *peaks = scratch.peaks + pattern * p.n_points, *out = p.intensity + pattern * p.n_points;

    for (int i = static_cast<int>(threadIdx.x); i < n_points; i += kThreads)
        out[i] = i >= measured.first && i < measured.last ? peaks[i] : 0.0f;
    __syncthreads();
    float strongest = strongest_of(out + first, n_measured, partial), highest = 100.0f;
    const bool lit = strongest > 0.0f && isfinite(strongest);
    if (lit && row.counts > 0.0) {
        const bool whole = p.clip_sigma < 0.0;
        count(p, pattern, measured, peaks, strongest, whole ? 0.0f : 1.0f, out);
        __syncthreads();
        if (whole) {
            strongest = highest = 1.0f;
        } else {
            clip(out + first, n_measured, static_cast<float>(p.clip_sigma), peaks);
            strongest = strongest_of(out + first, n_measured, partial);
        }
    }
    for (int i = static_cast<int>(threadIdx.x); i < n_points; i += kThreads)
        out[i] = lit && strongest > 0.0f && isfinite(strongest) ? out[i] / strongest * highest : 0.0f;
    __syncthreads();
    const int64_t n_patches = (p.n_points + kPatchPoints - 1) / kPatchPoints;
    list_active_patches<kThreads>(out, n_points, p.active_patch + pattern * n_patches, p.active_count + pattern, partial_count);
}

}  // namespace

int render_patterns_cuda(const RenderPatternsParams& params, const RenderPatternsScratch& scratch, void* stream) {
    if (params.n_patterns == 0) return 0;
    const dim3 grid(static_cast<unsigned>(params.n_patterns));
    XRD_LAUNCH(weigh_and_shape, grid, dim3(kThreads), 0, stream, params, scratch);
    const dim3 tiles(static_cast<unsigned>(params.n_patterns * blocks_a_pattern(params.n_points)));
    XRD_LAUNCH(add_lines, tiles, dim3(kThreads), 0, stream, params, scratch);
    XRD_LAUNCH(measure, grid, dim3(kThreads), 0, stream, params, scratch);
    return XRD_LAST_ERROR();
}

}  // namespace xrdfast
