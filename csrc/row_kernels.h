// row_kernels.h: what the CPU kernels over lists of rows share: vectors, blocks of rows, LeakyReLU. Not for device code.
//
// All sums run over fixed blocks of rows, and the blocks in order, so results do not depend on the number of threads.
#pragma once
#include <cstdint>
#include <cstring>

#include "peak_norm.h"
#include "reflection_math.h"

namespace xrdfast {

constexpr int kVectorBytes = 64;  // one AVX-512 register; narrower machines take it in pieces
template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
    typedef float type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
    typedef double type __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;
template <typename T>
constexpr int kLanes = kVectorBytes / sizeof(T);

template <typename T>
XRDFAST_INLINE Vector<T> load(const T* from) {
    Vector<T> v;
    std::memcpy(&v, from, sizeof v);
    return v;
}
template <typename T>
XRDFAST_INLINE void store(T* to, Vector<T> v) {
    std::memcpy(to, &v, sizeof v);
}

template <typename T>
XRDFAST_INLINE T leaky(T z) {
    return z > T(0) ? z : static_cast<T>(kNegativeSlope) * z;
}

constexpr int64_t kSumRows = 256;  // rows whose float sums are added up in double

inline int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

}  // namespace xrdfast
