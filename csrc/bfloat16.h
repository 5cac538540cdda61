// bfloat16.h: the upper half of a float32, as storage; arithmetic is in float. For host and device code.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define XRDFAST_HOST_DEVICE __host__ __device__
#else
#define XRDFAST_HOST_DEVICE
#endif

namespace xrdfast {

struct BFloat16 {
    uint16_t bits;

    BFloat16() = default;
    // To nearest, ties to even, as torch rounds; a NaN stays one.
    XRDFAST_HOST_DEVICE explicit BFloat16(float value) {
        uint32_t wide;
        std::memcpy(&wide, &value, sizeof wide);
        const uint32_t rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
        bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
    }
    XRDFAST_HOST_DEVICE operator float() const {
        const uint32_t wide = static_cast<uint32_t>(bits) << 16;
        float value;
        std::memcpy(&value, &wide, sizeof value);
        return value;
    }
};
static_assert(sizeof(BFloat16) == 2, "as torch.bfloat16 lies in memory");

}  // namespace xrdfast
