// portable_math.h: elementary functions in single precision that give the same bits on every CPU and GPU, so that a
// pattern with counting noise comes out the same wherever it is rendered. Header of both .cpp and .cu files.
//
// The rules that make it so: every product that is added to something is written as fmaf, so that no compiler is left
// a choice of contracting it; only +, -, *, /, sqrt, floor and fmaf, which IEEE 754 defines to the last bit; no
// function of libm. Branch-free, so that a plain loop becomes SIMD code (fmaf needs a target that has it, as all x86-64
// since 2013; elsewhere it's a slow call with the same result).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define XRD_PORTABLE __host__ __device__ __forceinline__
#else
#define XRD_PORTABLE inline __attribute__((always_inline))
#endif

namespace xrdfast {

constexpr double kDegreesARadian = 180.0 / 3.14159265358979323846;

XRD_PORTABLE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
XRD_PORTABLE float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// 1 / x for normal x > 0, error below 1 ulp. Mirroring the exponent and mantissa gives 5 % at worst; a step of third
// order leaves 1.3e-4, one of second order 2e-8. Half the time of a vector division, which CPUs don't pipeline.
XRD_PORTABLE float reciprocal(float x) {
    float r = float_of(0x7ef311c0u - bits_of(x));
    float e = fmaf(-x, r, 1.0f);
    r = fmaf(r, fmaf(e, e, e), r);
    e = fmaf(-x, r, 1.0f);
    return fmaf(r, e, r);
}

// 2^x on [-120, 0]: 2^round(x) through the exponent bits, a Taylor series of degree 7 in the rest (remainder 5e-9).
// Below -120 it returns 2^-120.
XRD_PORTABLE float exp2_nonpositive(float x) {
    constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the integer in the last bits
    x = x < -120.0f ? -120.0f : x;
    const float shifted = x + kMagic;
    const float r = x - (shifted - kMagic);
    float p = 1.52527338e-5f;
    p = fmaf(p, r, 1.54035304e-4f);
    p = fmaf(p, r, 1.33335581e-3f);
    p = fmaf(p, r, 9.61812911e-3f);
    p = fmaf(p, r, 5.55041087e-2f);
    p = fmaf(p, r, 2.40226507e-1f);
    p = fmaf(p, r, 6.93147181e-1f);
    p = fmaf(p, r, 1.0f);
    return float_of(bits_of(p) + (bits_of(shifted) << 23));
}

// ln(x) for normal x > 0, error 1e-7 of the larger of |ln x| and 1. Cephes' logf (Moshier, 1984-2000).
XRD_PORTABLE float natural_log(float x) {
    const uint32_t shifted = bits_of(x) - 0x3f3504f3u;  // mantissa in [sqrt(1/2), sqrt(2))
    const float exponent = static_cast<float>(static_cast<int32_t>(shifted) >> 23);
    const float f = float_of((shifted & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
    float p = 7.0376836292e-2f;
    p = fmaf(p, f, -1.1514610310e-1f);
    p = fmaf(p, f, 1.1676998740e-1f);
    p = fmaf(p, f, -1.2420140846e-1f);
    p = fmaf(p, f, 1.4249322787e-1f);
    p = fmaf(p, f, -1.6668057665e-1f);
    p = fmaf(p, f, 2.0000714765e-1f);
    p = fmaf(p, f, -2.4999993993e-1f);
    p = fmaf(p, f, 3.3333331174e-1f);
    const float square = f * f;
    float tail = fmaf(p * f, square, exponent * -2.12194440e-4f);
    tail = fmaf(-0.5f, square, tail);
    return fmaf(exponent, 0.693359375f, tail + f);
}

}  // namespace xrdfast
