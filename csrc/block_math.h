// block_math.h: products and elementary functions on blocks of columns, for CPU kernels whose lanes are positions (patches)
// and whose rows are features. A block row is two SIMD vectors, so that a tile of rows by one block row stays in
// registers and every multiply-add but two loads a step reads a broadcast. Not for device code.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "compiler.h"

namespace xrdfast {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T>
struct IntegerOf;
template <>
struct IntegerOf<float> {
    using Type = uint32_t;  // unsigned: exponent arithmetic on the bits of a NaN may wrap
};
template <>
struct IntegerOf<int32_t> {
    using Type = uint32_t;
};
template <>
struct IntegerOf<double> {
    using Type = uint64_t;
};

// A SIMD type of kBytes bytes, and the sizes that follow from it.
template <typename T, int kBytes>
struct Simd {
    typedef T Vector __attribute__((vector_size(kBytes)));
    using Integer = typename IntegerOf<T>::Type;
    typedef Integer IntegerVector __attribute__((vector_size(kBytes)));
    static constexpr int kLanes = kBytes / sizeof(T);
    static constexpr int kBlock = 2 * kLanes;
    static constexpr int kRegisters = kBytes == 64 ? 32 : 16;
    static constexpr int kRows = kRegisters / 4;  // two sums each: half of the registers
};

constexpr int kRowStep = 8;  // row counts of products are multiples of this
static_assert(kRowStep % 8 == 0, "whole tiles at every instruction-set level");

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Memory of a thread, on 64-byte borders, which only grows.
template <typename T>
class AlignedBuffer {
   public:
    T* reserve(int64_t n) {
        if (n > capacity_) {
            const size_t bytes = static_cast<size_t>(round_up(n * static_cast<int64_t>(sizeof(T)), 64));
            data_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
            capacity_ = data_ ? n : 0;
            if (!data_) throw std::bad_alloc();
        }
        return data_.get();
    }

   private:
    struct Free {
        void operator()(T* p) const { std::free(p); }
    };
    std::unique_ptr<T[], Free> data_;
    int64_t capacity_ = 0;
};

template <class V, typename T>
XRDFAST_INLINE V load(const T* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

template <class V, typename T>
XRDFAST_INLINE void store(T* to, V v) {
    std::memcpy(to, &v, sizeof v);
}

// What `multiply` makes of a finished sum and the old content of c.
struct Replace {
    template <class V, typename T>
    XRDFAST_INLINE V operator()(const T*, int, V sum) const {
        return sum;
    }
};
struct Accumulate {
    template <class V, typename T>
    XRDFAST_INLINE V operator()(const T* old, int, V sum) const {
        return load<V>(old) + sum;
    }
};
template <class V>
struct RescaleAndAccumulate {
    V factor[2];
    template <typename T>
    XRDFAST_INLINE V operator()(const T* old, int side, V sum) const {
        return load<V>(old) * factor[side] + sum;
    }
};

// c(r, :) = finish(c(r, :), sum over k of a(r, k) b(k, :)), r < rows: a(r, k) = a[r * a_row + k * a_column]; a row of b
// and of c is one block row. `rows` is a multiple of kRowStep. A sum starts from zero, and so long sums taken in pieces
// round less than in one go.
template <class S, typename T, class Finish>
XRDFAST_INLINE void multiply(const T* __restrict a, int64_t a_row, int64_t a_column, const T* __restrict b,
                                    int64_t b_row, T* __restrict c, int64_t c_row, int64_t rows, int64_t depth,
                                    const Finish& finish) {
    using V = typename S::Vector;
    for (int64_t first = 0; first < rows; first += S::kRows) {
        const T* tile = a + first * a_row;
        T* out = c + first * c_row;
        V sum[S::kRows][2] = {};
        for (int64_t k = 0; k < depth; ++k) {
            const V left = load<V>(b + k * b_row), right = load<V>(b + k * b_row + S::kLanes);
#pragma GCC unroll 8
            for (int r = 0; r < S::kRows; ++r) {
                const T factor = tile[r * a_row + k * a_column];
                sum[r][0] += factor * left;
                sum[r][1] += factor * right;
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < S::kRows; ++r) {
            for (int side = 0; side < 2; ++side) {
                T* at = out + r * c_row + side * S::kLanes;
                store(at, finish(at, side, sum[r][side]));
            }
        }
    }
}

// exp(x) for x <= 0; below -87 it returns about exp(-87), which no sum of this library notices. NaN gives NaN.
// 2^n 2^r with n + r = x / ln 2, |r| <= 1/2; minimax polynomial of degree 5 of 2^r, relative error 7.5e-8 (fitted by
// reweighted least squares); n goes into the exponent bits through the integer that adding 1.5 * 2^23 leaves in the
// mantissa.
template <class S>
XRDFAST_INLINE typename S::Vector exp_nonpositive(typename S::Vector x, float) {
    using V = typename S::Vector;
    using I = typename S::IntegerVector;
    constexpr float kMagic = 12582912.0f, kLowest = -87.0f, kLog2e = 1.44269504f;
    x = x < kLowest ? V{} + kLowest : x;
    const V shifted = x * kLog2e + kMagic;
    const V r = x * kLog2e - (shifted - kMagic);
    V p = V{} + 1.32764715188084e-3f;
    p = p * r + 9.67554133067e-3f;
    p = p * r + 5.55071327496e-2f;
    p = p * r + 2.40221197239e-1f;
    p = p * r + 6.93146967064e-1f;
    p = p * r + 1.0000000716547f;
    I bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127) << 23;
    V scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

// In double, which is for tests, the library's.
template <class S>
XRDFAST_INLINE typename S::Vector exp_nonpositive(typename S::Vector x, double) {
    for (int i = 0; i < S::kLanes; ++i) x[i] = std::exp(x[i]);
    return x;
}

// work.template run<kBytes>() of the best level, whose vectors have best_vector_bytes() bytes.
#if defined(XRDFAST_MULTIVERSION)
// GCC inlines what is always_inline into the function with the target.
template <class Work>
__attribute__((target("arch=x86-64-v4"))) void run_v4(const Work& work) {
    work.template run<64>();
}
template <class Work>
__attribute__((target("arch=x86-64-v3"))) void run_v3(const Work& work) {
    work.template run<32>();
}
inline int best_vector_bytes() {
    return __builtin_cpu_supports("x86-64-v4") ? 64 : __builtin_cpu_supports("x86-64-v3") ? 32 : 16;
}
template <class Work>
void run_best(const Work& work) {
    const int bytes = best_vector_bytes();
    if (bytes == 64) run_v4(work);
    else if (bytes == 32) run_v3(work);
    else work.template run<16>();
}
#else
inline int best_vector_bytes() { return kVectorBytes; }
template <class Work>
void run_best(const Work& work) {
    work.template run<kVectorBytes>();
}
#endif

}  // namespace xrdfast
