// planted_bugs.cu: one correct kernel and the bugs that the emulator and the sanitizers must find, by number.
#include "xrd_cuda.h"

namespace {

constexpr int kThreads = 64;

__global__ void correct(float* x) {
    XRD_SHARED(float, s, kThreads);
    XRD_SHARED(float, of_the_warp, kThreads);
    s[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    of_the_warp[threadIdx.x] = s[(threadIdx.x + 1) % kThreads];
    __syncwarp();
    x[threadIdx.x] = of_the_warp[threadIdx.x ^ 1] + __shfl_xor_sync(0xffffffffu, s[threadIdx.x], 1);
}
__global__ void barrier_in_a_branch(float* x) {
    if (threadIdx.x < 40) __syncthreads();
    x[threadIdx.x] = __shfl_sync(0xffffffffu, 1.0f, 0);
}
__global__ void exit_before_a_barrier(float* x) {
    if (threadIdx.x >= 40) return;
    __syncthreads();
    x[threadIdx.x] = 1.0f;
}
__global__ void shuffle_in_a_branch(float* x) {
    if (threadIdx.x < 16) x[threadIdx.x] = __shfl_xor_sync(0xffffffffu, x[threadIdx.x], 1);
}
__global__ void lanes_at_different_operations(float* x) {
    if (threadIdx.x % 2) x[threadIdx.x] = __shfl_sync(0xffffffffu, 1.0f, 0);
    else __syncwarp();
}
__global__ void shared_memory_never_written(float* x) {
    XRD_SHARED(float, s, kThreads);
    x[threadIdx.x] = s[threadIdx.x];
}
__global__ void missing_barrier(float* x) {
    XRD_SHARED(float, s, kThreads);
    s[threadIdx.x] = x[threadIdx.x];
    x[threadIdx.x] = s[(threadIdx.x + 1) % kThreads];
}
__global__ void blocks_without_atomics(float* x) {
    if (threadIdx.x == 0) x[0] += 1.0f;
}
__global__ void one_past_shared_memory(float* x) {
    XRD_DYNAMIC_SHARED(float, s);
    s[threadIdx.x + 1] = x[threadIdx.x];
}
__global__ void one_past_the_output(float* x) { x[threadIdx.x + 1] = 1.0f; }
__global__ void shuffle_from_outside_its_mask(float* x) {
    if (threadIdx.x % 32 < 16) x[threadIdx.x] = __shfl_sync(0x0000ffffu, x[threadIdx.x], 20);
}
__global__ void shuffle_in_place_of_a_warp_barrier(float* x) {  // it orders no memory
    XRD_SHARED(float, s, kThreads);
    s[threadIdx.x] = x[threadIdx.x];
    const float y = __shfl_sync(0xffffffffu, x[threadIdx.x], 0);
    x[threadIdx.x] = y + s[threadIdx.x ^ 1];
}

}  // namespace

#ifndef __CUDACC__
int main(int count, char** values) {
    using Kernel = void (*)(float*);
    const Kernel kernels[] = {correct,
                              barrier_in_a_branch,
                              exit_before_a_barrier,
                              shuffle_in_a_branch,
                              lanes_at_different_operations,
                              shared_memory_never_written,
                              missing_barrier,
                              blocks_without_atomics,
                              one_past_shared_memory,
                              one_past_the_output,
                              shuffle_from_outside_its_mask,
                              shuffle_in_place_of_a_warp_barrier};
    if (count != 2) return 2;
    float* x = static_cast<float*>(std::calloc(kThreads, sizeof(float)));
    const Kernel kernel = kernels[std::atoi(values[1])];
    const int n_blocks = kernel == blocks_without_atomics ? 4 : 1;
    XRD_LAUNCH(kernel, dim3(n_blocks), dim3(kThreads), kThreads * sizeof(float), nullptr, x);
    std::printf("%g\n", static_cast<double>(x[0]));
    std::free(x);
    return 0;
}
#endif
