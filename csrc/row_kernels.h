// row_kernels.h: what the CPU kernels over lists of rows share: blocks of rows, LeakyReLU. Not for device code.
//
// All sums run over fixed blocks of rows, and the blocks in order, so results do not depend on the number of threads.
#pragma once
#include <cstdint>

#include "peak_norm.h"
#include "reflection_math.h"

namespace xrdfast {

template <typename T>
XRDFAST_INLINE T leaky(T z) {
    return z > T(0) ? z : static_cast<T>(kNegativeSlope) * z;
}

constexpr int64_t kSumRows = 256;  // rows whose float sums are added up in double

inline int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

}  // namespace xrdfast
