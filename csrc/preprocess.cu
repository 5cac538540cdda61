// preprocess.cu: CUDA preprocessing of measured scans, one block a scan.
//
// The functions of a point are the CPU's (preprocess_math.h). Every point of the grid is gathered by one thread over the
// pieces of the scan in the order the CPU adds them, so nothing is left to atomics and results repeat bit for bit; sums
// for the straight lines that continue a background are made in another order than the CPU's, in double. The clipping
// windows run over shared memory, each thread's own points in registers throughout; a scan too long for that runs over
// two arrays of device memory in turn. Four blocks run on a multiprocessor, so that one's barriers and its waiting for
// memory are filled by the others: hence 64 registers a thread.
#include "xrd_cuda.h"

#include <algorithm>
#include <cmath>

#include "block_reduce.cuh"
#include "active_patches.cuh"
#include "preprocess.h"
#include "preprocess_math.h"
#include "significance.cuh"

namespace xrdfast {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksAMultiprocessor = 4;
constexpr int kWarps = kThreads / 32;
constexpr int kPointsAThread = 44;  // of the shared levels: the scan and what continues it
constexpr int kBatch = 4;           // points of a thread between two looks whether there are more
constexpr int kSharedLevels = kThreads * kPointsAThread;
static_assert(kSharedLevels >= kSharedScanPoints + 2 * kMaxHalfWindow, "room for the longest windows");
static_assert(kPointsAThread % kBatch == 0, "whole batches");
static_assert(kSharedLevels * sizeof(float) + 2048 <= 48 * 1024, "what every device has without asking");

// One scan and where its part of the scratch lies.
struct Scan {
    const double* two_theta;
    const float* intensity;
    int n;
    float *signal, *spare, *noise;
    double* axis;
};

// The scan of this block. Looked up anew after the windows, whose levels leave no registers to keep it in.
__device__ __forceinline__ Scan scan_of(const PreprocessScansParams& p, const PreprocessScansScratch& scratch) {
    const int64_t scan = blockIdx.x;
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

// The signal of a scan before its background comes off: the scan itself, or what was made of it.
__device__ __forceinline__ const float* prepared_of(const Scan& scan, const PreprocessScansParams& p) {
    return p.smooth_points > 1 || p.second_wavelength[blockIdx.x] > 0.0 ? scan.signal : scan.intensity;
}

__device__ __forceinline__ float* pattern_of(const PreprocessScansParams& p) {
    return p.pattern + blockIdx.x * p.n_points;
}

__device__ __forceinline__ float largest_of_block(float value, double* partial) {
    return static_cast<float>(block_max<kThreads>(static_cast<double>(value), partial));
}

// Whether every intensity is a number within the limits; lowest and highest of `value`.
struct Range {
    float lowest, highest;
    bool usable;
};
__device__ __forceinline__ Range range_of(const float* value, int n, double* partial) {
    float low = -INFINITY, high = -INFINITY, bad = 0.0f;  // low is the largest negative
    for (int i = static_cast<int>(threadIdx.x); i < n; i += kThreads) {
        const float x = value[i];
        low = fmaxf(low, -x);
        high = fmaxf(high, x);
        if (!(fabsf(x) <= kLargestIntensity)) bad = 1.0f;
    }
    low = largest_of_block(low, partial);
    high = largest_of_block(high, partial);
    bad = largest_of_block(bad, partial);
    return {-low, high, bad == 0.0f};
}

__device__ __forceinline__ void estimate_scan_noise(const Scan& scan) {
    const int n_blocks = static_cast<int>(significance_blocks(scan.n));
    for (int b = static_cast<int>(threadIdx.x >> 5); b < n_blocks; b += kWarps) {
        const float level = block_noise_of(scan.intensity, scan.n, b);
        if ((threadIdx.x & 31) == 0) scan.noise[b] = level;
    }
}

// Parabolas over 2 half + 1 points; beyond its ends a scan goes on as it ends.
__device__ __forceinline__ void smooth(const Scan& scan, int half, float* out) {
    for (int i = static_cast<int>(threadIdx.x); i < scan.n; i += kThreads) {
        float sum = 0.0f;
        for (int at = -half; at <= half; ++at)
            sum += smoothing_weight(half, at) * scan.intensity[min(max(i + at, 0), scan.n - 1)];
        out[i] = sum;
    }
    __syncthreads();
}

// First of rising numbers 1..n-1 that exceeds `value`, or n-1; two or three looks where it is next to `guess`, 1..n-1.
__device__ __forceinline__ int first_above(const double* rising, int n, double value, int guess) {
    int low = 1, high = n - 1, step = 1;  // it is one of low..high
    if (rising[guess] > value) {
        for (high = guess; high - step >= 1 && rising[high - step] > value; step *= 2) high -= step;
        low = max(high - step + 1, 1);
    } else {
        for (low = guess; low + step < n - 1 && !(rising[low + step] > value); step *= 2) low += step;
        high = min(low + step, n - 1);
        low = min(low + 1, n - 1);
    }
    while (low < high) {
        const int middle = (low + high) / 2;
        if (rising[middle] > value)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

// 1 / (1 + r S) = (1 - r S) (1 + r^2 S^2) (1 + r^4 S^4) ..., S the shift by K-alpha 2. From `in`, which is not the signal,
// into the signal.
__device__ __forceinline__ void strip_second(const Scan& scan, double ratio, const float* in) {
    static_assert(kStripFactors % 2 == 1, "signal and spare in turns");
    double shrink = ratio, factor = -kSecondRatio;
    float *out = scan.signal, *next = scan.spare;
    for (int turn = 0; turn < kStripFactors; ++turn) {
        int shift = 0;  // hardly changes from point to point
        for (int i = static_cast<int>(threadIdx.x); i < scan.n; i += kThreads) {
            const double wanted = shrink * scan.axis[i];
            const int after = first_above(scan.axis, scan.n, wanted, min(max(i - shift, 1), scan.n - 1));
            shift = i - after;
            const double share = (wanted - scan.axis[after - 1]) / (scan.axis[after] - scan.axis[after - 1]);
            const float low = in[after - 1], high = in[after];
            const float shifted = share > 0.0 ? low + static_cast<float>(share) * (high - low) : low;
            out[i] = in[i] + static_cast<float>(factor) * shifted;
        }
        __syncthreads();
        in = out;
        float* swapped = out;
        out = next;
        next = swapped;
        shrink *= shrink;
        factor *= factor;
    }
}

// Continues levels beyond an end, by the straight line through the last `half` of them.
__device__ __forceinline__ void extrapolate(float* end, int half, int stride, double* partial) {
    const double middle = 0.5 * (half - 1);
    double sum = 0.0, moment = 0.0;
#pragma unroll 1  // a thread has one or two of them
    for (int i = static_cast<int>(threadIdx.x); i < half; i += kThreads) {
        const double value = static_cast<double>(end[-stride * i]);
        sum += value;
        moment += (middle - i) * value;
    }
    sum = block_sum<kThreads>(sum, partial);
    moment = block_sum<kThreads>(moment, partial);
#pragma unroll 1
    for (int i = 1 + static_cast<int>(threadIdx.x); i <= half; i += kThreads)
        end[stride * i] = on_line(sum, moment, half, middle + i);
}

// Clips peaks of m levels in windows from `half` down to one point. In place, in shared memory, from which a thread
// reads its points' neighbours alone.
__device__ __forceinline__ void clip_peaks(float* level, int m, int half) {
    const int thread = static_cast<int>(threadIdx.x);
    float own[kPointsAThread];
#pragma unroll
    for (int j = 0; j < kPointsAThread; ++j) own[j] = j * kThreads < m - thread ? level[thread + j * kThreads] : 0.0f;
    for (int window = half, end = m - half; window > 0; --window, ++end) {
        const int low = thread - window, high = thread + window, own_end = end - thread;
#pragma unroll
        for (int begin = 0; begin < kPointsAThread; begin += kBatch) {
            if (begin * kThreads >= end) break;
#pragma unroll
            for (int j = begin; j < begin + kBatch; ++j) {
                const int at = j * kThreads;
                if ((at >= kMaxHalfWindow || low + at >= 0) && at < own_end)
                    own[j] = fminf(own[j], 0.5f * (level[low + at] + level[high + at]));
            }
        }
        __syncthreads();
#pragma unroll
        for (int begin = 0; begin < kPointsAThread; begin += kBatch) {
            if (begin * kThreads >= end) break;
#pragma unroll
            for (int j = begin; j < begin + kBatch; ++j)
                if (j * kThreads < own_end) level[thread + j * kThreads] = own[j];
        }
        __syncthreads();
    }
}

// The same from one array into the other and back; after an odd number of windows the result is in the other.
__device__ __forceinline__ void clip_peaks_between(float* level, float* other, int m, int half) {
    for (int window = half; window > 0; --window) {
        for (int begin = static_cast<int>(threadIdx.x); begin < m; begin += kBatch * kThreads) {
            float clipped[kBatch];
#pragma unroll
            for (int j = 0; j < kBatch; ++j) {
                const int at = min(begin + j * kThreads, m - 1);
                clipped[j] = level[at];
                if (at >= window && at < m - window)
                    clipped[j] = fminf(clipped[j], 0.5f * (level[at - window] + level[at + window]));
            }
#pragma unroll
            for (int j = 0; j < kBatch; ++j)
                if (begin + j * kThreads < m) other[begin + j * kThreads] = clipped[j];
        }
        __syncthreads();
        float* swapped = level;
        level = other;
        other = swapped;
    }
}

// What rises above it is `above_background`. Lies in shared memory: the windows leave no registers for it.
struct Background {
    const float* level;  // null where none is taken off
    float lowest, least;
    int half;
};

// The scan's levels into `spare`, and its background. The windows run over shared memory, or over two arrays of device
// memory, each with room for the scan and its continuations.
__device__ __forceinline__ void take_background(const Scan& scan, const float* value, Range range, int half,
                                                float* shared_levels, float* levels, float* other, double* partial,
                                                Background* background) {
    const float lowest = range.lowest < 0.0f ? range.lowest : 0.0f;
    float* own = (levels ? levels : shared_levels) + half;
    if (threadIdx.x == 0)
        *background = {half % 2 && levels ? other + half : own, lowest, kRounding * (range.highest - lowest), half};
    for (int i = static_cast<int>(threadIdx.x); i < scan.n; i += kThreads)
        own[i] = scan.spare[i] = log_log_sqrt(value[i] - lowest);
    __syncthreads();
    extrapolate(own, half, -1, partial);
    extrapolate(own + scan.n - 1, half, 1, partial);
    __syncthreads();
    if (levels)
        clip_peaks_between(levels, other, scan.n + 2 * half, half);
    else
        clip_peaks(shared_levels, scan.n + 2 * half, half);
}

// A threshold of `k` times the noise over a background that lies `raised` times the noise higher than it seems.
struct Significance {
    float k, raised;
};

// Background and noise off, positions on the grid into the axis, and intensities as they are there into the signal; how
// many of the points can be reached.
__device__ __forceinline__ int place(const PreprocessScansParams& p, const Scan& scan, const Background& background,
                                     Significance bound, int* partial) {
    const float* value = prepared_of(scan, p);
    const double wavelength = p.wavelength[blockIdx.x];
    const double ratio = p.model_wavelength / wavelength;
    const bool converts = wavelength != p.model_wavelength;
    const int n_blocks = static_cast<int>(significance_blocks(scan.n));
    int reached = 0;
    for (int i = static_cast<int>(threadIdx.x); i < scan.n; i += kThreads) {
        double angle = scan.two_theta[i];
        float y = value[i];
        if (background.level)
            y = above_background(y - background.lowest, scan.spare[i], background.level[i], background.least);
        const float noise = noise_at(scan.noise, n_blocks, i);
        y = significant(fmaf(-bound.raised, noise, y), bound.k * noise);
        if (converts) {
            const double sine = sine_of(angle), wanted = ratio * sine;
            if (!(wanted < 1.0)) {
                scan.axis[i] = INFINITY;
                continue;
            }
            angle = 2.0 * kDegreesARadian * asin(wanted);
            y = static_cast<float>(y * converted_intensity(sine, wanted, ratio, p.conserve_area));
        }
        scan.signal[i] = y;
        scan.axis[i] = grid_position(angle, p.two_theta_min, p.two_theta_step);
        ++reached;
    }
    int total;
    block_exclusive_sum<kThreads>(reached, partial, &total);
    return total;
}

// Positions and intensities of a scan on the grid, between them straight pieces.
struct Pieces {
    const double* position;
    const float* signal;
    int n;
    double points_a_step;
};

// The piece that ends beyond a position, or the last.
__device__ __forceinline__ int piece_at(const Pieces& s, double position) {
    const double guess = 1.0 + (position - s.position[0]) * s.points_a_step, last = static_cast<double>(s.n - 1);
    const int near = guess > 1.0 ? static_cast<int>(guess < last ? guess : last) : 1;  // 1 if all lies at one position
    return first_above(s.position, s.n, position, near) - 1;
}

__device__ __forceinline__ bool blank(const Pieces& s, int piece) {
    return s.signal[piece] == 0.0f && s.signal[piece + 1] == 0.0f;
}
__device__ __forceinline__ double slope_at(const Pieces& s, int piece) {
    return slope_of(s.position[piece], s.position[piece + 1], s.signal[piece], s.signal[piece + 1]);
}

// Mean of the straight pieces over the cell of a point, as far as they reach.
__device__ __forceinline__ float mean_of_cell(const Pieces& s, int point) {
    const double begin = static_cast<double>(point) - 0.5, end = static_cast<double>(point) + 0.5;
    float sum = 0.0f;
    for (int i = piece_at(s, begin); i < s.n - 1 && s.position[i] < end; ++i) {
        if (blank(s, i) || !(s.position[i] < s.position[i + 1])) continue;
        const double piece = piece_in_cell(s.position[i], s.position[i + 1], s.signal[i], slope_at(s, i), point);
        sum += static_cast<float>(piece);
    }
    return sum;
}

// Value of the straight pieces at a point.
__device__ __forceinline__ float value_at(const Pieces& s, int point) {
    const double at = static_cast<double>(point);
    if (at == s.position[s.n - 1]) return s.signal[s.n - 1];
    const int i = piece_at(s, at);
    return blank(s, i) ? 0.0f : static_cast<float>(s.signal[i] + slope_at(s, i) * (at - s.position[i]));
}

// Returns the largest value of this thread's.
__device__ __forceinline__ float resample(const PreprocessScansParams& p, const Pieces& s, MeasuredPoints measured) {
    float* out = pattern_of(p);
    const int first = static_cast<int>(measured.first), last = static_cast<int>(measured.last);
    float largest = 0.0f;
    for (int k = first + static_cast<int>(threadIdx.x); k < last; k += kThreads) {
        float value = p.conserve_area ? mean_of_cell(s, k) : value_at(s, k);
        if (p.conserve_area && (k == first || k == last - 1)) {
            const double covered = covered_part(s.position[0], s.position[s.n - 1], k);
            if (covered > 0.0 && covered < 1.0) value = static_cast<float>(value / covered);
        }
        out[k] = value;
        largest = fmaxf(largest, value);
    }
    return largest;
}

// Of a scan whose intensities have that range: smoothing, K-alpha 2, background.
__device__ __forceinline__ void prepare(const PreprocessScansParams& p, const PreprocessScansScratch& scratch,
                                        const Scan& scan, Range range, float* shared_levels, double* partial,
                                        Background* background) {
    const double wavelength = p.wavelength[blockIdx.x], second = p.second_wavelength[blockIdx.x];
    const float* value = scan.intensity;
    if (p.smooth_points > 1) {
        float* smoothed = second > 0.0 ? scan.spare : scan.signal;
        smooth(scan, static_cast<int>(p.smooth_points / 2), smoothed);
        value = smoothed;
    }
    if (second > 0.0) {
        for (int i = static_cast<int>(threadIdx.x); i < scan.n; i += kThreads)
            scan.axis[i] = sine_of(scan.two_theta[i]);
        __syncthreads();
        strip_second(scan, wavelength / second, value);
    }
    if (p.background_width > 0.0) {
        value = prepared_of(scan, p);
        if (value != scan.intensity) range = range_of(value, scan.n, partial);
        const int half = half_window_of(scan.two_theta, scan.n, p.background_width);
        const int64_t begin = scan.two_theta - p.two_theta + static_cast<int64_t>(2 * kMaxHalfWindow) * blockIdx.x;
        const int64_t room = scratch.n_total + 2 * kMaxHalfWindow * p.n_scans;
        float* levels = scratch.level ? scratch.level + begin : nullptr;
        take_background(scan, value, range, half, shared_levels, levels, levels ? levels + room : nullptr, partial,
                        background);
    } else if (threadIdx.x == 0) {
        *background = {nullptr, 0.0f, 0.0f, 0};
    }
    __syncthreads();
}

// The rest: background and noise off, and onto the grid. Returns the largest value of this thread's points.
__device__ __forceinline__ float finish(const PreprocessScansParams& p, const Scan& scan, const Background& background,
                                        int* partial, MeasuredPoints* measured) {
    const float gain = noise_gain(p.smooth_points, p.second_wavelength[blockIdx.x] > 0.0);
    const float k = static_cast<float>(p.clip_sigma) * gain;
    const Significance bound{k, k > 0.0f ? noise_above_background(background.half) * gain : 0.0f};
    const int n = place(p, scan, background, bound, partial);  // its sum is a barrier
    if (n >= 2) *measured = measured_points(scan.axis[0], scan.axis[n - 1], p.n_points);
    if (measured->first == measured->last) return 0.0f;
    return resample(p, {scan.axis, scan.signal, n, (n - 1) / (scan.axis[n - 1] - scan.axis[0])}, *measured);
}

__global__ void __launch_bounds__(kThreads, kBlocksAMultiprocessor)
    preprocess(PreprocessScansParams p, PreprocessScansScratch scratch) {
    XRD_SHARED(double, partial, kWarps);
    XRD_SHARED(int, partial_count, kWarps);
    XRD_SHARED(Background, background, 1);
    XRD_DYNAMIC_SHARED(float, shared_levels);  // of the longest scan, unless that is longer than they may be
    const int n_points = static_cast<int>(p.n_points);
    for (int i = static_cast<int>(threadIdx.x); i < n_points; i += kThreads) pattern_of(p)[i] = 0.0f;
    MeasuredPoints measured{0, 0};
    float largest = 0.0f;
    if (const Scan scan = scan_of(p, scratch); scan.n >= 2) {
        estimate_scan_noise(scan);
        if (const Range range = range_of(scan.intensity, scan.n, partial); range.usable) {
            prepare(p, scratch, scan, range, shared_levels, partial, background);
            largest = finish(p, scan_of(p, scratch), *background, partial_count, &measured);
        }
    }
    const float strongest = largest_of_block(largest, partial);
    const int last = strongest > 0.0f ? static_cast<int>(measured.last) : 0;
    float* out = pattern_of(p);
    for (int i = static_cast<int>(measured.first + threadIdx.x); i < last; i += kThreads)
        if (out[i] != 0.0f) out[i] = out[i] / strongest * 100.0f;
    __syncthreads();
    if (threadIdx.x == 0) {
        p.measured[2 * blockIdx.x] = static_cast<int32_t>(measured.first);
        p.measured[2 * blockIdx.x + 1] = static_cast<int32_t>(measured.last);
    }
    const int64_t n_patches = (p.n_points + kPatchPoints - 1) / kPatchPoints;
    list_active_patches<kThreads>(out, n_points, p.active_patch + blockIdx.x * n_patches, p.active_count + blockIdx.x,
                                  partial_count);
}

}  // namespace

int preprocess_scans_cuda(const PreprocessScansParams& params, const PreprocessScansScratch& scratch, void* stream) {
    if (params.n_scans == 0) return 0;
    const dim3 grid(static_cast<unsigned>(params.n_scans));
    const int64_t most_half = std::min<int64_t>(scratch.longest / 2, kMaxHalfWindow);
    const size_t shared = scratch.level ? 0 : (scratch.longest + 2 * most_half) * sizeof(float);
    XRD_LAUNCH(preprocess, grid, dim3(kThreads), shared, stream, params, scratch);
    return XRD_LAST_ERROR();
}

}  // namespace xrdfast
