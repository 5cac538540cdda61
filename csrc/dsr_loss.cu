// dsr_loss.cu: ranked-output self-distillation loss on CUDA devices, one block per pattern and head.
//
// A head of 1,024 classes and their places are 6 kB (10 in double), so a block keeps them in shared memory and
// a bitonic sort ranks them there; with the place as the second key no two are equal, and the ranking is stable. Sums
// run in a fixed order: results are the same bits in every run.
#include "xrd_cuda.h"

#include <cmath>

#include "block_reduce.cuh"
#include "dsr_loss.h"

namespace xrdfast {
namespace {

constexpr int kThreads = 128;  // one exchange each for 230 classes

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }

// Ascending, NaN last, else by place.
template <typename Real>
__device__ __forceinline__ bool ranks_after(Real a, int place_a, Real b, int place_b) {
    if (a < b) return false;
    if (a > b) return true;
    const bool nan_a = a != a, nan_b = b != b;
    return nan_a == nan_b ? place_a > place_b : nan_a;
}

// Sorts the first n of `value` and their places; both have room for the next power of two.
template <typename Real>
__device__ __forceinline__ void sort_block(Real* value, int16_t* place, int n) {
    int size = 1;
    while (size < n) size *= 2;
    for (int i = n + threadIdx.x; i < size; i += kThreads) {  // behind all of the head, NaNs too
        value[i] = static_cast<Real>(NAN);
        place[i] = static_cast<int16_t>(i);
    }
    __syncthreads();
    for (int run = 2; run <= size; run *= 2)
        for (int distance = run / 2; distance; distance /= 2) {
            for (int pair = threadIdx.x; pair < size / 2; pair += kThreads) {
                const int low = 2 * pair - (pair & (distance - 1)), high = low + distance;
                const Real a = value[low], b = value[high];
                const int16_t place_a = place[low], place_b = place[high];
                const bool ascending = (low & run) == 0;
                if (ranks_after(a, place_a, b, place_b) == ascending) {
                    value[low] = b;
                    value[high] = a;
                    place[low] = place_b;
                    place[high] = place_a;
                }
            }
            __syncthreads();
        }
}

// exp((x - largest) / T) over their sum is a softmax.
template <typename Real>
struct Softmax {
    Real largest, sum;
};

template <typename Real, typename Element>
__device__ __forceinline__ Softmax<Real> block_softmax(const Element* x, int n, Real rate, Real* partial) {
    Real largest = -static_cast<Real>(INFINITY), sum = 0;
    for (int j = threadIdx.x; j < n; j += kThreads) {
        const Real value = static_cast<Real>(x[j]);
        largest = largest >= value || largest != largest ? largest : value;
    }
    largest = block_max<kThreads>(largest, partial);
    for (int j = threadIdx.x; j < n; j += kThreads) sum += exponential((static_cast<Real>(x[j]) - largest) * rate);
    return {largest, block_sum<kThreads>(sum, partial)};
}

template <typename Element>
__global__ void __launch_bounds__(kThreads) dsr_loss_forward(DsrLossParams<Element> p) {
    using Real = typename DsrLossParams<Element>::Real;
    XRD_SHARED(Real, value, kMaxHeadClasses);
    XRD_SHARED(int16_t, place, kMaxHeadClasses);
    XRD_SHARED(Real, partial, kThreads / 32);
    const int64_t pattern = blockIdx.x;
    const int head = blockIdx.y;
    const int64_t first = p.class_offset[head], at = pattern * p.n_classes + first;
    const int n = static_cast<int>(p.class_offset[head + 1] - first);
    const Element* logits = p.logits + pattern * p.logits_stride + first;
    for (int j = threadIdx.x; j < n; j += kThreads) {
        value[j] = static_cast<Real>(logits[j]);
        place[j] = static_cast<int16_t>(j);
    }
    sort_block(value, place, n);
    for (int j = threadIdx.x; j < n; j += kThreads) p.ranked[at + j] = static_cast<Element>(value[j]);
    __syncthreads();  // the batch compared with itself reads what other threads wrote

    const Real rate = 1 / p.temperature;
    const Element* previous =
        p.previous_ranked ? p.previous_ranked + pattern * p.previous_stride + first : p.ranked + at;
    const Softmax<Real> soft = block_softmax(value, n, rate, partial);
    const Softmax<Real> soft_previous = block_softmax(previous, n, rate, partial);
    const Real log_sums = logarithm(soft.sum / soft_previous.sum);
    const Real scale = p.temperature / soft.sum, scale_previous = p.temperature / soft_previous.sum;
    Real weighted = 0;
    for (int j = threadIdx.x; j < n; j += kThreads) {
        const Real a = (value[j] - soft.largest) * rate;
        const Real b = (static_cast<Real>(previous[j]) - soft_previous.largest) * rate, q = exponential(b);
        weighted += q == 0 ? 0 : q * (b - a + log_sums);
        p.slope[at + place[j]] = exponential(a) * scale - q * scale_previous;
    }
    weighted = block_sum<kThreads>(weighted, partial);
    if (threadIdx.x == 0)
        p.loss[pattern * p.n_heads + head] = p.temperature * p.temperature * weighted / soft_previous.sum;
}

template <typename Element>
__global__ void __launch_bounds__(kThreads) dsr_loss_backward(DsrLossParams<Element> p) {
    const int64_t pattern = blockIdx.x;
    const int head = blockIdx.y;
    const int64_t begin = pattern * p.n_classes, end = begin + p.class_offset[head + 1];
    const auto grad = p.grad_loss[pattern * p.grad_pattern_stride + head * p.grad_head_stride];
    for (int64_t i = begin + p.class_offset[head] + threadIdx.x; i < end; i += kThreads)
        p.grad_logits[i] = static_cast<Element>(p.slope[i] * grad);
}

template <typename Element>
dim3 blocks(const DsrLossParams<Element>& p) {
    return dim3(static_cast<unsigned>(p.n_patterns), static_cast<unsigned>(p.n_heads));
}

}  // namespace

template <typename Element>
int dsr_loss_forward_cuda(const DsrLossParams<Element>& params, void* stream) {
    if (params.n_patterns == 0) return 0;
    XRD_LAUNCH(dsr_loss_forward<Element>, blocks(params), dim3(kThreads), 0, stream, params);
    return XRD_LAST_ERROR();
}

template <typename Element>
int dsr_loss_backward_cuda(const DsrLossParams<Element>& params, void* stream) {
    if (params.n_patterns == 0) return 0;
    XRD_LAUNCH(dsr_loss_backward<Element>, blocks(params), dim3(kThreads), 0, stream, params);
    return XRD_LAST_ERROR();
}

template int dsr_loss_forward_cuda(const DsrLossParams<float>&, void*);
template int dsr_loss_forward_cuda(const DsrLossParams<double>&, void*);
template int dsr_loss_forward_cuda(const DsrLossParams<BFloat16>&, void*);
template int dsr_loss_backward_cuda(const DsrLossParams<float>&, void*);
template int dsr_loss_backward_cuda(const DsrLossParams<double>&, void*);
template int dsr_loss_backward_cuda(const DsrLossParams<BFloat16>&, void*);

}  // namespace xrdfast
