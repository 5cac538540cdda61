// render.cu: CUDA rendering of reflection families as sticks, one block a pattern.
//
// Coincident families must add up before the strongest line of a bin is taken, which asks for a sort. A counting sort
// by 4096 ranges of the line key brings families that may coincide together; a range then holds a few, and one thread
// orders and sums them. The order inside a range is by key and index, so the result doesn't depend on the atomics.
#include "xrd_cuda.h"

#include <cmath>

#include "block_reduce.cuh"
#include "render.h"

namespace xrdfast {
namespace {

constexpr int kThreads = 256;
constexpr int kRanges = 4096;  // 16 kB of counters, whatever the grid
constexpr int kRangesAThread = kRanges / kThreads;
static_assert(kRanges % kThreads == 0, "each thread scans as many counters");

constexpr double kDegrees = 180.0 / 3.14159265358979323846;
constexpr double kMergeStep = 1e-5;            // degrees; these two as in reflection_math.h, which is not device code
constexpr double kMinScaledIntensity = 1e-3;   // of 100
constexpr double kOutside = -1.0;              // the angle of a family that is not on the grid

__device__ __forceinline__ int merge_key(double two_theta) {
    return static_cast<int>(two_theta * (1.0 / kMergeStep) + 0.5);
}

struct Ranges {
    int first;     // smallest key on the grid
    double scale;  // ranges a key

    __device__ __forceinline__ int of(double two_theta) const {
        return min(static_cast<int>((merge_key(two_theta) - first) * scale), kRanges - 1);
    }
};

// Insertion sort of a few families by (key, index).
__device__ __forceinline__ void sort_families(const double* two_theta, int32_t* order, int begin, int end) {
    for (int i = begin + 1; i < end; ++i) {
        const int32_t family = order[i];
        const int key = merge_key(two_theta[family]);
        int at = i;
        for (; at > begin; --at) {
            const int32_t before = order[at - 1];
            const int key_before = merge_key(two_theta[before]);
            if (key_before < key || (key_before == key && before < family)) break;
            order[at] = before;
        }
        order[at] = family;
    }
}

__global__ void __launch_bounds__(kThreads, 3)  // 80 registers; left alone, ptxas spills to keep within 64
    render_pattern(RenderSticksParams p, RenderSticksScratch scratch) {
    XRD_SHARED(int, range, kRanges);  // counts, then where the next family of a range goes, then where it ends
    XRD_SHARED(int, partial_count, kThreads / 32);
    XRD_SHARED(double, partial_max, kThreads / 32);
    const int64_t pattern = blockIdx.x, begin = p.offset[pattern];
    const int n = static_cast<int>(p.offset[pattern + 1] - begin);
    int* out = reinterpret_cast<int*>(p.intensity + pattern * p.n_points);  // non-negative floats order as integers
    double *two_theta = scratch.two_theta + begin, *strength = scratch.strength + begin;
    int32_t* order = scratch.order + begin;
    for (int64_t i = threadIdx.x; i < p.n_points; i += kThreads) out[i] = 0;
    for (int i = threadIdx.x; i < kRanges; i += kThreads) range[i] = 0;
    __syncthreads();

    const double two_theta_max = p.two_theta_min + p.two_theta_step * static_cast<double>(p.n_points);
    const int first_key = merge_key(p.two_theta_min);
    const Ranges ranges = {first_key, kRanges / (merge_key(two_theta_max) - first_key + 1.0)};
    const double* metric = p.reciprocal_metric + 6 * pattern;
    for (int i = threadIdx.x; i < n; i += kThreads) {
        const int16_t* hkl = p.hkl + (begin + i) * p.hkl_stride;
        const double h = hkl[0], k = hkl[1], l = hkl[2];
        const double g2 = h * h * metric[0] + k * k * metric[1] + l * l * metric[2] +
                          2.0 * (k * l * metric[3] + h * l * metric[4] + h * k * metric[5]);
        const double sin2 = 0.25 * p.wavelength * p.wavelength * g2;
        double angle = kOutside;
        if (sin2 > 0.0 && sin2 < 1.0) {
            const double reached = 2.0 * kDegrees * asin(sqrt(sin2));
            if (reached >= p.two_theta_min && reached < two_theta_max) angle = reached;
        }
        two_theta[i] = angle;
        if (angle == kOutside) continue;
        const double weight = static_cast<double>(p.multiplicity[(begin + i) * p.multiplicity_stride]) *
                              static_cast<double>(p.f_squared[begin + i]);
        const double cos_two_theta = 1.0 - 2.0 * sin2;
        strength[i] = weight * (1.0 + cos_two_theta * cos_two_theta) / (sin2 * sqrt(1.0 - sin2)) *
                      exp(-0.5 * p.b_overall[pattern] * g2);
        atomicAdd(&range[ranges.of(angle)], 1);
    }
    __syncthreads();

    int* mine = range + threadIdx.x * kRangesAThread;
    int count = 0, n_inside;
    for (int i = 0; i < kRangesAThread; ++i) count += mine[i];
    int start = block_exclusive_sum<kThreads>(count, partial_count, &n_inside);
    for (int i = 0; i < kRangesAThread; ++i) {
        const int here = mine[i];
        mine[i] = start;
        start += here;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += kThreads)
        if (two_theta[i] != kOutside) order[atomicAdd(&range[ranges.of(two_theta[i])], 1)] = i;
    __syncthreads();

    // The first family of a line takes its sum and smallest angle, the others nothing.
    double strongest = 0.0;
    for (int i = threadIdx.x; i < kRanges; i += kThreads) {
        const int range_begin = i == 0 ? 0 : range[i - 1], range_end = range[i];
        sort_families(two_theta, order, range_begin, range_end);
        for (int j = range_begin; j < range_end;) {
            const int32_t first = order[j];
            const int key = merge_key(two_theta[first]);
            double sum = strength[first], angle = two_theta[first];
            for (++j; j < range_end && merge_key(two_theta[order[j]]) == key; ++j) {
                sum += strength[order[j]];
                angle = fmin(angle, two_theta[order[j]]);
                strength[order[j]] = 0.0;
            }
            strength[first] = sum;
            two_theta[first] = angle;
            strongest = strongest >= sum || strongest != strongest ? strongest : sum;  // NaN stays
        }
    }
    strongest = block_max<kThreads>(strongest, partial_max);
    if (!(strongest > 0.0 && isfinite(strongest))) return;
    const double points_a_degree = 1.0 / p.two_theta_step;
    for (int i = threadIdx.x; i < n_inside; i += kThreads) {
        const double scaled = strength[order[i]] / strongest * 100.0;
        if (!(scaled > kMinScaledIntensity)) continue;
        const int64_t point = static_cast<int64_t>((two_theta[order[i]] - p.two_theta_min) * points_a_degree);
        if (point < p.n_points) atomicMax(out + point, __float_as_int(static_cast<float>(scaled)));
    }
}

}  // namespace

int render_sticks_cuda(const RenderSticksParams& params, const RenderSticksScratch& scratch, void* stream) {
    if (params.n_patterns == 0) return 0;
    XRD_LAUNCH(render_pattern, dim3(static_cast<unsigned>(params.n_patterns)), dim3(kThreads), 0, stream, params,
               scratch);
    return XRD_LAST_ERROR();
}

}  // namespace xrdfast
