// preprocess.cu: CUDA preprocessing of measured scans, one block a scan.
//
// The functions of a point are the CPU's (preprocess_math.h). Every point of the grid is gathered by one thread over the
// pieces of the scan in the order the CPU adds them, so nothing is left to atomics and results repeat bit for bit; sums
// for the straight lines that continue a background are made in another order than the CPU's, in double. The clipping
// windows run over shared memory, each thread's points in registers between the barriers; a scan too long for that
// runs over two arrays of device memory in turn.
#include "xrd_cuda.h"

#include <cmath>

#include "block_reduce.cuh"
#include "active_patches.cuh"
#include "preprocess.h"
#include "preprocess_math.h"
#include "significance.cuh"

namespace xrdfast {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kPointsAThread = 22;  // of the shared levels: the scan and what continues it
constexpr int kSharedLevels = kThreads * kPointsAThread;
static_assert(kSharedLevels >= kSharedScanPoints + 2 * kMaxHalfWindow, "room for the longest windows");
static_assert(kSharedLevels * sizeof(float) + 2048 <= 48 * 1024, "what every device has without asking");

// One scan and where its part of the scratch lies.
struct Scan {
    const double* two_theta;
    const float* intensity;
    int n;
    float *signal, *spare, *noise;
    double* axis;
};

__device__ __forceinline__ Scan scan_of(const PreprocessScansParams& p, const PreprocessScansScratch& scratch,
                                        int64_t scan) {
    const int64_t begin = p.offset[scan];
    return {p.two_theta + begin,
            p.intensity + begin,
            static_cast<int>(p.offset[scan + 1] - begin),
            scratch.signal + begin,
            scratch.spare + begin,
            scratch.noise + begin / kSignificanceBlock + scan,  // blocks of all scans before: at most as many
            scratch.axis + begin};
}

// In turns: sin itself keeps a frame in local memory for huge angles.
__device__ __forceinline__ double sine_of(double two_theta) { return sinpi(two_theta / 360.0); }

// Whether every intensity is a number within the limits; lowest and highest of `value`.
struct Range {
    float lowest, highest;
    bool usable;
};
__device__ __forceinline__ Range range_of(const float* value, int n, double* partial) {
    double low = -INFINITY, high = -INFINITY, bad = 0.0;  // low is the largest negative
    for (int i = static_cast<int>(threadIdx.x); i < n; i += kThreads) {
        const double x = static_cast<double>(value[i]);
        low = fmax(low, -x);
        high = fmax(high, x);
        if (!(fabs(x) <= static_cast<double>(kLargestIntensity))) bad = 1.0;
    }
    low = block_max<kThreads>(low, partial);
    high = block_max<kThreads>(high, partial);
    bad = block_max<kThreads>(bad, partial);
    return {static_cast<float>(-low), static_cast<float>(high), bad == 0.0};
}

__device__ __forceinline__ void estimate_scan_noise(const Scan& scan) {
    const int n_blocks = static_cast<int>(significance_blocks(scan.n));
    for (int b = static_cast<int>(threadIdx.x >> 5); b < n_blocks; b += kWarps) {
        const float level = block_noise_of(scan.intensity, scan.n, b);
        if ((threadIdx.x & 31) == 0) scan.noise[b] = level;
    }
}

// Parabolas over 2 half + 1 points, or a copy; beyond its ends a scan goes on as it ends.
__device__ __forceinline__ void smooth(const Scan& scan, int half) {
    for (int i = static_cast<int>(threadIdx.x); i < scan.n; i += kThreads) {
        float sum = half ? 0.0f : scan.intensity[i];
        for (int at = -half; half && at <= half; ++at)
            sum += smoothing_weight(half, at) * scan.intensity[min(max(i + at, 0), scan.n - 1)];
        scan.signal[i] = sum;
    }
    __syncthreads();
}

// First of rising numbers 1..n-1 that exceeds `value`, or n-1.
__device__ __forceinline__ int first_above(const double* rising, int n, double value) {
    int low = 1, high = n - 1;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (rising[middle] > value)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

// 1 / (1 + r S) = (1 - r S) (1 + r^2 S^2) (1 + r^4 S^4) ..., S the shift by K-alpha 2. An odd number of factors: the
// result is copied back.
__device__ __forceinline__ void strip_second(const Scan& scan, double ratio) {
    double shrink = ratio, factor = -kSecondRatio;
    float *in = scan.signal, *out = scan.spare;
    for (int turn = 0; turn < kStripFactors; ++turn) {
        for (int i = static_cast<int>(threadIdx.x); i < scan.n; i += kThreads) {
            const double wanted = shrink * scan.axis[i];
            const int after = first_above(scan.axis, scan.n, wanted);
            const double share = (wanted - scan.axis[after - 1]) / (scan.axis[after] - scan.axis[after - 1]);
            const float low = in[after - 1], high = in[after];
            const float shifted = share > 0.0 ? low + static_cast<float>(share) * (high - low) : low;
            out[i] = in[i] + static_cast<float>(factor) * shifted;
        }
        __syncthreads();
        float* swapped = in;
        in = out;
        out = swapped;
        shrink *= shrink;
        factor *= factor;
    }
    for (int i = static_cast<int>(threadIdx.x); in != scan.signal && i < scan.n; i += kThreads) scan.signal[i] = in[i];
    __syncthreads();
}

// Continues levels beyond an end, by the straight line through the last `half` of them.
__device__ __forceinline__ void extrapolate(float* end, int half, int stride, double* partial) {
    const double middle = 0.5 * (half - 1);
    double sum = 0.0, moment = 0.0;
    for (int i = static_cast<int>(threadIdx.x); i < half; i += kThreads) {
        const double value = static_cast<double>(end[-stride * i]);
        sum += value;
        moment += (middle - i) * value;
    }
    sum = block_sum<kThreads>(sum, partial);
    moment = block_sum<kThreads>(moment, partial);
    for (int i = 1 + static_cast<int>(threadIdx.x); i <= half; i += kThreads)
        end[stride * i] = on_line(sum, moment, half, middle + i);
}

// Clips peaks of m levels in windows from `half` down to one point. In place, in shared memory.
__device__ __forceinline__ void clip_peaks(float* level, int m, int half) {
    for (int window = half; window > 0; --window) {
        float kept[kPointsAThread];
#pragma unroll
        for (int j = 0; j < kPointsAThread; ++j) {
            const int i = static_cast<int>(threadIdx.x) + j * kThreads;
            if (i < window || i >= m - window) continue;
            const float mean = 0.5f * (level[i - window] + level[i + window]);
            kept[j] = mean < level[i] ? mean : level[i];
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < kPointsAThread; ++j) {
            const int i = static_cast<int>(threadIdx.x) + j * kThreads;
            if (i >= window && i < m - window) level[i] = kept[j];
        }
        __syncthreads();
    }
}

// The same from one array into the other and back; returns the one with the result.
__device__ __forceinline__ float* clip_peaks_between(float* level, float* other, int m, int half) {
    for (int window = half; window > 0; --window) {
        for (int i = static_cast<int>(threadIdx.x); i < m; i += kThreads) {
            float clipped = level[i];
            if (i >= window && i < m - window) {
                const float mean = 0.5f * (level[i - window] + level[i + window]);
                clipped = mean < clipped ? mean : clipped;
            }
            other[i] = clipped;
        }
        __syncthreads();
        float* swapped = level;
        level = other;
        other = swapped;
    }
    return level;
}

// Background off; `levels` has room for the scan and its continuations, `other` for as many or is null.
__device__ __forceinline__ void remove_background(const Scan& scan, int half, float* levels, float* other,
                                                  double* partial) {
    const Range range = range_of(scan.signal, scan.n, partial);
    const float lowest = range.lowest < 0.0f ? range.lowest : 0.0f, least = kRounding * (range.highest - lowest);
    float* own = levels + half;
    for (int i = static_cast<int>(threadIdx.x); i < scan.n; i += kThreads)
        own[i] = scan.spare[i] = log_log_sqrt(scan.signal[i] - lowest);
    __syncthreads();
    extrapolate(own, half, -1, partial);
    extrapolate(own + scan.n - 1, half, 1, partial);
    __syncthreads();
    const int m = scan.n + 2 * half;
    const float* clipped = levels;
    if (other)
        clipped = clip_peaks_between(levels, other, m, half);
    else
        clip_peaks(levels, m, half);
    for (int i = static_cast<int>(threadIdx.x); i < scan.n; i += kThreads)
        scan.signal[i] = above_background(scan.signal[i] - lowest, scan.spare[i], clipped[half + i], least);
    __syncthreads();
}

// Positions on the grid into the axis, and intensities as they are there; how many of the points can be reached.
__device__ __forceinline__ int place(const PreprocessScansParams& p, const Scan& scan, double wavelength,
                                     int* partial) {
    const double ratio = p.model_wavelength / wavelength;
    const bool converts = wavelength != p.model_wavelength;
    int reached = 0;
    for (int i = static_cast<int>(threadIdx.x); i < scan.n; i += kThreads) {
        double angle = scan.two_theta[i];
        if (converts) {
            const double sine = sine_of(angle), wanted = ratio * sine;
            if (!(wanted < 1.0)) {
                scan.axis[i] = INFINITY;
                continue;
            }
            angle = 2.0 * kDegreesARadian * asin(wanted);
            scan.signal[i] = static_cast<float>(
                scan.signal[i] * converted_intensity(sine, wanted, ratio, p.conserve_area));
        }
        scan.axis[i] = grid_position(angle, p.two_theta_min, p.two_theta_step);
        ++reached;
    }
    int total;
    block_exclusive_sum<kThreads>(reached, partial, &total);
    return total;
}

// Mean of the straight pieces over the cell of a point, as far as they reach.
__device__ __forceinline__ float mean_of_cell(const double* position, const float* signal, int n, int point) {
    const double begin = static_cast<double>(point) - 0.5, end = static_cast<double>(point) + 0.5;
    float sum = 0.0f;
    for (int i = first_above(position, n, begin) - 1; i < n - 1 && position[i] < end; ++i) {
        if (!(position[i] < position[i + 1])) continue;
        const double slope = slope_of(position[i], position[i + 1], signal[i], signal[i + 1]);
        sum += static_cast<float>(piece_in_cell(position[i], position[i + 1], signal[i], slope, point));
    }
    return sum;
}

// Value of the straight pieces at a point.
__device__ __forceinline__ float value_at(const double* position, const float* signal, int n, int point) {
    const double at = static_cast<double>(point);
    if (at == position[n - 1]) return signal[n - 1];
    const int i = first_above(position, n, at) - 1;
    return static_cast<float>(signal[i] + slope_of(position[i], position[i + 1], signal[i], signal[i + 1]) *
                                              (at - position[i]));
}

__device__ __forceinline__ void resample(const PreprocessScansParams& p, const Scan& scan, int n_reached,
                                         MeasuredPoints measured, float* out) {
    const int first = static_cast<int>(measured.first), last = static_cast<int>(measured.last);
    for (int k = first + static_cast<int>(threadIdx.x); k < last; k += kThreads) {
        if (!p.conserve_area) {
            out[k] = value_at(scan.axis, scan.signal, n_reached, k);
            continue;
        }
        float mean = mean_of_cell(scan.axis, scan.signal, n_reached, k);
        if (k == first || k == last - 1) {
            const double covered = covered_part(scan.axis[0], scan.axis[n_reached - 1], k);
            if (covered > 0.0 && covered < 1.0) mean = static_cast<float>(mean / covered);
        }
        out[k] = mean;
    }
    __syncthreads();
}

__global__ void __launch_bounds__(kThreads) preprocess(PreprocessScansParams p, PreprocessScansScratch scratch) {
    XRD_SHARED(double, partial, kWarps);
    XRD_SHARED(int, partial_count, kWarps);
    XRD_DYNAMIC_SHARED(float, shared_levels);  // kSharedLevels, unless a scan is longer than they hold
    const int64_t index = blockIdx.x;
    const Scan scan = scan_of(p, scratch, index);
    const int n_points = static_cast<int>(p.n_points);
    const int64_t n_patches = (p.n_points + kPatchPoints - 1) / kPatchPoints;
    float* out = p.pattern + index * p.n_points;
    for (int i = static_cast<int>(threadIdx.x); i < n_points; i += kThreads) out[i] = 0.0f;
    MeasuredPoints measured{0, 0};
    int n_reached = 0;
    const double wavelength = p.wavelength[index], second = p.second_wavelength[index];
    if (scan.n >= 2 && range_of(scan.intensity, scan.n, partial).usable) {
        estimate_scan_noise(scan);
        smooth(scan, static_cast<int>(p.smooth_points / 2));
        if (second > 0.0) {
            for (int i = static_cast<int>(threadIdx.x); i < scan.n; i += kThreads)
                scan.axis[i] = sine_of(scan.two_theta[i]);
            __syncthreads();
            strip_second(scan, wavelength / second);
        }
        const int half = p.background_width > 0.0 ? half_window_of(scan.two_theta, scan.n, p.background_width) : 0;
        if (p.background_width > 0.0) {
            const int64_t room = scratch.n_total + 2 * kMaxHalfWindow * p.n_scans;
            float* levels = scratch.level ? scratch.level + p.offset[index] + 2 * kMaxHalfWindow * index : shared_levels;
            remove_background(scan, half, levels, scratch.level ? levels + room : nullptr, partial);
        }
        const float gain = noise_gain(p.smooth_points, second > 0.0), k = static_cast<float>(p.clip_sigma) * gain;
        const float raised = k > 0.0f ? noise_above_background(half) * gain : 0.0f;
        const int n_blocks = static_cast<int>(significance_blocks(scan.n));
        for (int i = static_cast<int>(threadIdx.x); i < scan.n; i += kThreads) {
            const float level = noise_at(scan.noise, n_blocks, i);
            scan.signal[i] = significant(fmaf(-raised, level, scan.signal[i]), k * level);
        }
        n_reached = place(p, scan, wavelength, partial_count);  // its sum is a barrier
        if (n_reached >= 2) measured = measured_points(scan.axis[0], scan.axis[n_reached - 1], p.n_points);
        if (measured.first < measured.last) resample(p, scan, n_reached, measured, out);
    }
    __syncthreads();
    const float strongest = range_of(out, n_points, partial).highest;
    if (strongest > 0.0f)
        for (int i = static_cast<int>(threadIdx.x); i < n_points; i += kThreads) out[i] = out[i] / strongest * 100.0f;
    __syncthreads();
    if (threadIdx.x == 0) {
        p.measured[2 * index] = static_cast<int32_t>(measured.first);
        p.measured[2 * index + 1] = static_cast<int32_t>(measured.last);
    }
    list_active_patches<kThreads>(out, n_points, p.active_patch + index * n_patches, p.active_count + index,
                                  partial_count);
}

}  // namespace

int preprocess_scans_cuda(const PreprocessScansParams& params, const PreprocessScansScratch& scratch, void* stream) {
    if (params.n_scans == 0) return 0;
    const dim3 grid(static_cast<unsigned>(params.n_scans));
    const size_t shared = scratch.level ? 0 : kSharedLevels * sizeof(float);
    XRD_LAUNCH(preprocess, grid, dim3(kThreads), shared, stream, params, scratch);
    return XRD_LAST_ERROR();
}

}  // namespace xrdfast
