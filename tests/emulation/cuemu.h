// cuemu.h: runs CUDA kernels on the CPU, so that the shipped device code is tested without a GPU, under ASan, UBSan and
// TSan. Not for speed, and not a model of the GPU's memory: blocks run one after another, loads and stores are
// sequentially consistent (a missing __threadfence is not seen).
//
// Every CUDA thread of a block is a fiber on the one OS thread. The scheduler runs each ready fiber until it meets a
// barrier or a warp operation. So these are found, with a table of who waits where, and end the process:
//   a __syncthreads that some threads miss; a shuffle that reads a lane outside its mask or that a lane of its mask
//   never reaches; lanes of one mask that meet at different operations.
// Shared memory is a fresh heap block of the exact size for every block, filled with 0xff (a NaN): ASan sees one
// element past the end, and a read of unset memory shows in the result. Under TSan a switch of fibers orders nothing;
// only __syncthreads, __syncwarp and the launch do, so that a missing barrier is a reported race in any order.
//
// CUEMU_ORDER  0 (default): threads run forward between barriers; 1: backward; n > 1: shuffled with seed n.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>
#if !defined(__x86_64__)
#define CUEMU_UCONTEXT  // portable switch, ten times slower: it makes a system call
#endif
#if defined(CUEMU_UCONTEXT)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sys/mman.h>
extern "C" {
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void* __tsan_get_current_fiber();
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
}
// The emulator's own bookkeeping is not what TSan is to look at.
#define CUEMU_HIDDEN __attribute__((no_sanitize("thread")))
#define CUEMU_TSAN(statement) statement
#else
#define CUEMU_HIDDEN
#define CUEMU_TSAN(statement)
#endif

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) double2 { double x, y; };
inline double2 make_double2(double x, double y) { return {x, y}; }

namespace cuemu {

constexpr int kWarp = 32, kMaxThreads = 1024, kMaxShared = 32, kMaxMasks = 8, kMaxShuffled = 16;
constexpr size_t kStack = 64 * 1024;

enum class State : uint8_t { kReady, kAtBlockBarrier, kAtWarpOperation, kDone };

struct Fiber {
#if defined(CUEMU_UCONTEXT)
    ucontext_t context;
#else
    void* stack_pointer;
#endif
    char* stack;
    State state;
    dim3 thread;
    int lane, warp;
    unsigned mask;              // of the warp operation it waits at
    unsigned n_warp_operations;  // parity chooses the exchange slot
    const char* where;
    void* asan_stack;
    void* tsan_fiber;
};

// Lanes of one mask gathering at one operation.
struct Meeting {
    unsigned mask, arrived;
    const char* where;
};

struct Warp {
    Meeting meeting[kMaxMasks];
    int n_meetings;
    alignas(16) unsigned char slot[2][kWarp][kMaxShuffled];  // two: a fast lane must not overwrite
};

struct alignas(8) SyncObject { char address; };  // TSan knows one by its address
struct Machine {
    Fiber fiber[kMaxThreads];
    Warp warp[kMaxThreads / kWarp];
    Fiber* current;
    dim3 grid, block, block_index;
    int n_threads, n_alive, n_at_barrier;
    unsigned phase;
    void* dynamic_shared;
    void* shared[kMaxShared];
    const void* shared_key[kMaxShared];
    int n_shared;
    void (*entry)(void*);
    void* argument;
    int order;
    uint64_t random;
    SyncObject launch_sync, end_sync, block_sync[2], warp_sync[2][kMaxThreads / kWarp];
    char* arena;  // TSan builds only
    size_t arena_used;
#if defined(CUEMU_UCONTEXT)
    ucontext_t main_context;
#else
    void* main_stack_pointer;
#endif
    void* main_asan_stack;
    const void* main_bottom;
    size_t main_size;
    void* main_tsan_fiber;
};

// One a process: kernels run on one OS thread at a time.
inline Machine& machine() {
    static Machine* only = static_cast<Machine*>(std::calloc(1, sizeof(Machine)));
    return *only;
}

#if !defined(CUEMU_UCONTEXT)
// Saves the callee-saved registers and the stack pointer, and takes up those of `to`: 5 ns.
extern "C" void cuemu_switch(void** save, void* to);
__asm__(R"(.text
.weak cuemu_switch
.type cuemu_switch,@function
cuemu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size cuemu_switch,.-cuemu_switch
)");
#endif

CUEMU_HIDDEN inline void leave_fiber(bool finished) {
    Machine& m = machine();
    Fiber* me = m.current;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(finished ? nullptr : &me->asan_stack, m.main_bottom, m.main_size);
#endif
    (void)finished;
    CUEMU_TSAN(__tsan_switch_to_fiber(m.main_tsan_fiber, 1));
#if defined(CUEMU_UCONTEXT)
    swapcontext(&me->context, &m.main_context);
#else
    cuemu_switch(&me->stack_pointer, m.main_stack_pointer);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(me->asan_stack, &m.main_bottom, &m.main_size);
#endif
}

CUEMU_HIDDEN inline void enter_fiber(Fiber* fiber) {
    Machine& m = machine();
    m.current = fiber;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&m.main_asan_stack, fiber->stack, kStack);
#endif
    CUEMU_TSAN(__tsan_switch_to_fiber(fiber->tsan_fiber, 1));
#if defined(CUEMU_UCONTEXT)
    swapcontext(&m.main_context, &fiber->context);
#else
    cuemu_switch(&m.main_stack_pointer, fiber->stack_pointer);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(m.main_asan_stack, nullptr, nullptr);
#endif
    m.current = nullptr;
}

[[noreturn]] inline void fail(const char* what) {
    const Machine& m = machine();
    std::fprintf(stderr, "cuemu: %s in block (%u,%u,%u)\n", what, m.block_index.x, m.block_index.y, m.block_index.z);
    for (int i = 0, shown = 0; i < m.n_threads && shown < 40; ++i) {
        const Fiber& f = m.fiber[i];
        if (f.state == State::kDone) continue;
        const char* where = f.state == State::kAtBlockBarrier    ? "at __syncthreads"
                            : f.state == State::kAtWarpOperation ? f.where
                                                                 : "running";
        std::fprintf(stderr, "  thread %d: %s mask %08x\n", i, where, f.mask);
        ++shown;
    }
    std::abort();
}

CUEMU_HIDDEN inline void run_fiber() {
    Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &m.main_bottom, &m.main_size);
#endif
    Fiber* me = m.current;
    CUEMU_TSAN(__tsan_acquire(&m.launch_sync));
    m.entry(m.argument);
    CUEMU_TSAN(__tsan_release(&m.end_sync));
    me->state = State::kDone;
    --m.n_alive;
    leave_fiber(true);
    std::abort();  // a finished fiber is never entered again
}

// __syncthreads: strict, every thread of the block must arrive. Always yields, so that the order can be shuffled.
CUEMU_HIDDEN inline void block_barrier() {
    Machine& m = machine();
    CUEMU_TSAN(SyncObject* sync = &m.block_sync[m.phase & 1]; __tsan_release(sync));
    m.current->state = State::kAtBlockBarrier;
    if (++m.n_at_barrier == m.n_threads) {
        m.n_at_barrier = 0;
        ++m.phase;
        for (int i = 0; i < m.n_threads; ++i) m.fiber[i].state = State::kReady;
    }
    leave_fiber(false);
    CUEMU_TSAN(__tsan_acquire(sync));
}

// memcpy would be intercepted by TSan.
CUEMU_HIDDEN inline void copy_bytes(void* to, const void* from, size_t n) {
    for (size_t i = 0; i < n; ++i)
        static_cast<volatile char*>(to)[i] = static_cast<const volatile char*>(from)[i];
}

// Waits for every lane of the mask; leaves `value` where the others find it, and returns in which slot.
CUEMU_HIDDEN inline unsigned meet(unsigned mask, const char* where, const void* value, size_t bytes,
                                  bool orders_memory) {
    Machine& m = machine();
    Fiber* me = m.current;
    Warp& warp = m.warp[me->warp];
    const int n_live = std::min(kWarp, m.n_threads - me->warp * kWarp);
    if (n_live < kWarp) mask &= (1u << n_live) - 1;  // the last warp of a block may be short
    me->where = where;
    me->mask = mask;
    if (!(mask >> me->lane & 1)) fail("lane not in its own mask");
    const unsigned parity = me->n_warp_operations++ & 1;
    CUEMU_TSAN(if (orders_memory) __tsan_release(&m.warp_sync[parity][me->warp]));
    (void)orders_memory;
    copy_bytes(warp.slot[parity][me->lane], value, bytes);
    int k = 0;
    while (k < warp.n_meetings && warp.meeting[k].mask != mask) ++k;
    Meeting& meeting = warp.meeting[k];
    if (k == warp.n_meetings) {
        if (k == kMaxMasks) fail("too many warp masks in flight");
        ++warp.n_meetings;
        meeting = {mask, 0, where};
    }
    me->state = State::kAtWarpOperation;
    if (std::strcmp(meeting.where, where) != 0) fail("lanes of one mask meet at different operations");
    meeting.arrived |= 1u << me->lane;
    if (meeting.arrived == mask) {
        meeting = warp.meeting[--warp.n_meetings];
        for (int lane = 0; lane < kWarp; ++lane)
            if (mask >> lane & 1) m.fiber[me->warp * kWarp + lane].state = State::kReady;
    }
    leave_fiber(false);
    CUEMU_TSAN(if (orders_memory) __tsan_acquire(&m.warp_sync[parity][me->warp]));
    return parity;
}

template <typename T>
CUEMU_HIDDEN inline T shuffle(unsigned mask, T value, int source, const char* where) {
    static_assert(sizeof(T) <= kMaxShuffled && std::is_trivially_copyable<T>::value, "cannot be shuffled");
    Machine& m = machine();
    const unsigned parity = meet(mask, where, &value, sizeof(T), false);
    const Fiber* me = m.current;
    const int n_live = std::min(kWarp, m.n_threads - me->warp * kWarp);
    if (source < 0 || source >= n_live || !(mask >> source & 1)) fail("shuffle reads an inactive lane");
    copy_bytes(&value, m.warp[me->warp].slot[parity][source], sizeof(T));
    return value;
}

CUEMU_HIDDEN inline unsigned ballot(unsigned mask, int predicate) {
    Machine& m = machine();
    const unsigned parity = meet(mask, "at __ballot_sync", &predicate, sizeof predicate, false);
    const Fiber* me = m.current;
    unsigned votes = 0;
    for (int lane = 0; lane < kWarp && me->warp * kWarp + lane < m.n_threads; ++lane) {
        int vote = 0;
        if (mask >> lane & 1) copy_bytes(&vote, m.warp[me->warp].slot[parity][lane], sizeof vote);
        if (vote) votes |= 1u << lane;
    }
    return votes;
}

#if defined(__SANITIZE_THREAD__)
// Mapped before the launch, where that is no race; never used twice in one, so that races between blocks show.
constexpr size_t kArena = size_t{1} << 26;
inline char* map_memory(char* at, size_t bytes) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (at ? MAP_FIXED : 0);
    return static_cast<char*>(mmap(at, bytes, PROT_READ | PROT_WRITE, flags, -1, 0));
}
CUEMU_HIDDEN inline void clear_arena() {
    machine().arena = map_memory(machine().arena, kArena);
    machine().arena_used = 0;
}
#endif

CUEMU_HIDDEN inline void* new_shared(size_t bytes) {
#if defined(__SANITIZE_THREAD__)
    Machine& m = machine();
    char* memory = m.arena + m.arena_used;
    m.arena_used += (bytes + 127) / 128 * 128;
    if (m.arena_used > kArena) fail("shared-memory arena full: launch fewer blocks under TSan");
    for (size_t i = 0; i < bytes; ++i) static_cast<volatile char*>(memory)[i] = static_cast<char>(0xff);
    return memory;
#else
    return std::memset(std::malloc(bytes), 0xff, bytes);
#endif
}

// The buffer of one XRD_SHARED of the running block.
CUEMU_HIDDEN inline void* shared(const void* key, size_t bytes) {
    Machine& m = machine();
    for (int i = 0; i < m.n_shared; ++i)
        if (m.shared_key[i] == key) return m.shared[i];
    if (m.n_shared == kMaxShared) fail("too many XRD_SHARED");
    m.shared_key[m.n_shared] = key;
    return m.shared[m.n_shared++] = new_shared(bytes);
}

CUEMU_HIDDEN inline void start_fiber(int i) {
    Machine& m = machine();
    Fiber& f = m.fiber[i];
    f.state = State::kReady;
    f.lane = i % kWarp;
    f.warp = i / kWarp;
    f.n_warp_operations = f.mask = 0;
    const unsigned n = static_cast<unsigned>(i);
    f.thread = dim3(n % m.block.x, n / m.block.x % m.block.y, n / (m.block.x * m.block.y));
#if defined(__SANITIZE_THREAD__)
    // Mapped anew for every block: TSan forgets what the fiber of an earlier block did to it.
    f.stack = map_memory(f.stack, kStack);
    f.tsan_fiber = __tsan_create_fiber(0);
#else
    if (!f.stack) f.stack = static_cast<char*>(std::aligned_alloc(64, kStack));
#endif
#if defined(CUEMU_UCONTEXT)
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack;
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, run_fiber, 0);
#else
    void** top = reinterpret_cast<void**>(f.stack + kStack - 64);
    *--top = nullptr;  // keeps the stack aligned as after a call
    *--top = reinterpret_cast<void*>(run_fiber);
    for (int k = 0; k < 6; ++k) *--top = nullptr;  // the registers that cuemu_switch takes up
    f.stack_pointer = top;
#endif
}

CUEMU_HIDDEN inline void run_block() {
    static int ready[kMaxThreads];
    Machine& m = machine();
    while (m.n_alive) {
        int n = 0;
        for (int i = 0; i < m.n_threads; ++i)
            if (m.fiber[i].state == State::kReady) ready[n++] = i;
        if (n == 0) {
            const bool exited = m.n_at_barrier && m.n_at_barrier == m.n_alive;
            fail(exited ? "__syncthreads not reached by exited threads" : "deadlock (divergent barrier or shuffle)");
        }
        if (m.order == 1) std::reverse(ready, ready + n);
        for (int i = n - 1; m.order > 1 && i > 0; --i) {  // xorshift64, Fisher-Yates
            m.random ^= m.random << 13;
            m.random ^= m.random >> 7;
            m.random ^= m.random << 17;
            std::swap(ready[i], ready[m.random % static_cast<uint64_t>(i + 1)]);
        }
        for (int i = 0; i < n; ++i) enter_fiber(&m.fiber[ready[i]]);
    }
}

CUEMU_HIDDEN inline void run(dim3 grid, dim3 block, size_t shared_bytes, void (*entry)(void*), void* argument) {
    Machine& m = machine();
    m.grid = grid;
    m.block = block;
    m.n_threads = static_cast<int>(block.x * block.y * block.z);
    m.entry = entry;
    m.argument = argument;
    if (m.n_threads < 1 || m.n_threads > kMaxThreads || !(grid.x && grid.y && grid.z)) {
        m.n_threads = 0;
        fail("empty grid, or block size outside 1..1024");
    }
    const char* order = std::getenv("CUEMU_ORDER");
    m.order = order ? std::atoi(order) : 0;
    m.random = 0x9E3779B97F4A7C15ull * static_cast<uint64_t>(m.order + 1);
    CUEMU_TSAN(clear_arena());
    CUEMU_TSAN(m.main_tsan_fiber = __tsan_get_current_fiber());
    CUEMU_TSAN(__tsan_release(&m.launch_sync));
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                m.block_index = dim3(x, y, z);
                m.n_alive = m.n_threads;
                m.n_at_barrier = m.n_shared = 0;
                m.phase = 0;
                m.dynamic_shared = shared_bytes ? new_shared(shared_bytes) : nullptr;
                for (Warp& warp : m.warp) warp.n_meetings = 0;
                for (int i = 0; i < m.n_threads; ++i) start_fiber(i);
                run_block();
#if defined(__SANITIZE_THREAD__)
                for (int i = 0; i < m.n_threads; ++i) __tsan_destroy_fiber(m.fiber[i].tsan_fiber);
#else
                std::free(m.dynamic_shared);
                for (int i = 0; i < m.n_shared; ++i) std::free(m.shared[i]);
#endif
            }
    CUEMU_TSAN(__tsan_acquire(&m.end_sync));
}

template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, dim3 grid, dim3 block, size_t shared_bytes, void*, Arguments... arguments) {
    auto call = [&] { kernel(arguments...); };
    run(grid, block, shared_bytes, [](void* p) { (*static_cast<decltype(call)*>(p))(); }, &call);
}

template <typename T, typename Combine>
T atomic_update(T* at, Combine combine) {
    T old, wanted;
    __atomic_load(at, &old, __ATOMIC_RELAXED);
    do wanted = combine(old);
    while (!__atomic_compare_exchange(at, &old, &wanted, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return old;
}

inline int own_lane() { return machine().current->lane; }

}  // namespace cuemu

#define XRD_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    cuemu::launch((kernel), (grid), (block), (shared_bytes), (stream), __VA_ARGS__)
#define XRD_SHARED(T, name, n)       \
    static const char name##_key = 0; \
    T* name = static_cast<T*>(cuemu::shared(&name##_key, sizeof(T) * (n)))
#define XRD_DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(cuemu::machine().dynamic_shared)
#define XRD_LAST_ERROR() 0
#define threadIdx (cuemu::machine().current->thread)
#define blockIdx (cuemu::machine().block_index)
#define blockDim (cuemu::machine().block)
#define gridDim (cuemu::machine().grid)

inline void __syncthreads() { cuemu::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { cuemu::meet(mask, "at __syncwarp", nullptr, 0, true); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
    return cuemu::shuffle(mask, value, source & 31, "at __shfl_sync");
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
    return cuemu::shuffle(mask, value, cuemu::own_lane() ^ bits, "at __shfl_xor_sync");
}
// Beyond the warp's end a lane gets its own value back, as on the GPU.
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int distance) {
    const int lane = cuemu::own_lane(), source = lane + distance;
    return cuemu::shuffle(mask, value, source > 31 ? lane : source, "at __shfl_down_sync");
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
    const int lane = cuemu::own_lane(), source = lane - distance;
    return cuemu::shuffle(mask, value, source < 0 ? lane : source, "at __shfl_up_sync");
}
inline unsigned __ballot_sync(unsigned mask, int predicate) { return cuemu::ballot(mask, predicate); }
inline int __ffs(int x) { return __builtin_ffs(x); }

template <typename T>
T atomicAdd(T* at, T value) {
    return cuemu::atomic_update(at, [=](T old) { return old + value; });
}
template <typename T>
T atomicMax(T* at, T value) {
    return cuemu::atomic_update(at, [=](T old) { return old < value ? value : old; });
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline void sincospi(double x, double* sine, double* cosine) {
    const double turn = 3.14159265358979323846 * (x - 2.0 * std::rint(0.5 * x));
    *sine = std::sin(turn);
    *cosine = std::cos(turn);
}
inline double sinpi(double x) {
    double sine, cosine;
    sincospi(x, &sine, &cosine);
    return sine;
}
using std::isfinite;
using std::max;
using std::min;
