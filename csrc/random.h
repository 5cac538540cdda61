// random.h: counter-based random numbers, the same bits on CPU and GPU in any order of evaluation. Their counterpart in
// PyTorch, against which they are tested, is xrdfast/ops/random.py. Header of both .cpp and .cu files.
#pragma once
#include "portable_math.h"

namespace xrdfast {

// What a counter's random numbers are for.
constexpr uint32_t kNoiseStream = 0, kImpurityStream = 1;

struct Philox {
    uint32_t word[4];
};

// Philox4x32-10 (Salmon, Moraes, Dror & Shaw, SC11, 2011) of the counter (index, stream, high halves) with the key (low
// halves of seed and pattern).
XRD_PORTABLE Philox philox(uint32_t index, uint32_t stream, uint64_t seed, uint64_t pattern) {
    uint32_t c0 = index, c1 = stream, c2 = static_cast<uint32_t>(seed >> 32), c3 = static_cast<uint32_t>(pattern >> 32);
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(pattern);
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
    for (int round = 0; round < 10; ++round) {
        const uint64_t product0 = static_cast<uint64_t>(c0) * 0xd2511f53u;
        const uint64_t product1 = static_cast<uint64_t>(c2) * 0xcd9e8d57u;
        c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
        c1 = static_cast<uint32_t>(product1);
        c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
        c3 = static_cast<uint32_t>(product0);
        key0 += 0x9e3779b9u;
        key1 += 0xbb67ae85u;
    }
    return {{c0, c1, c2, c3}};
}

// Points get their words in blocks of 64, so that a CPU writes whole vectors: point 64 b + 16 w + c has word w of
// counter 16 b + c.
constexpr int kNoiseBlock = 64, kNoiseLanes = 16;

// Uniform in (0, 1).
XRD_PORTABLE double unit(uint32_t word) { return (word + 0.5) * (1.0 / 4294967296.0); }

// Standard normal quantile of (word + 1/2) / 2^32, error 1e-6: Giles, "Approximating the erfinv function", GPU
// Computing Gems Jade (2011), single precision. From the distance to the nearer end, so that both tails are as good.
XRD_PORTABLE float normal_quantile(uint32_t word) {
    const bool low = word < 0x80000000u;
    const uint32_t tail = low ? word : ~word;
    const float p = (static_cast<float>(static_cast<int32_t>(tail)) + 0.5f) * 2.3283064365386963e-10f;
    const float w = -natural_log(4.0f * p * (1.0f - p));
    const bool central = w < 5.0f;
    const float t = central ? w - 2.5f : sqrtf(w) - 3.0f;
    float q = central ? 2.81022636e-08f : -0.000200214257f;
    q = fmaf(q, t, central ? 3.43273939e-07f : 0.000100950558f);
    q = fmaf(q, t, central ? -3.5233877e-06f : 0.00134934322f);
    q = fmaf(q, t, central ? -4.39150654e-06f : -0.00367342844f);
    q = fmaf(q, t, central ? 0.00021858087f : 0.00573950773f);
    q = fmaf(q, t, central ? -0.00125372503f : -0.0076224613f);
    q = fmaf(q, t, central ? -0.00417768164f : 0.00943887047f);
    q = fmaf(q, t, central ? 0.246640727f : 1.00167406f);
    q = fmaf(q, t, central ? 1.50140941f : 2.83297682f);
    const float magnitude = 1.41421356f * q * (1.0f - 2.0f * p);  // 2 p is exact: contracted or not, the same
    return low ? -magnitude : magnitude;
}

// Poisson counts of a mean: by inversion below kCrossover, through the normal quantile above. At the crossover the
// expansion is off by 0.3 % of a count's probability at most, and 32 terms reach beyond 1 - 1e-8.
constexpr float kCrossover = 10.0f;
constexpr int kMaxSmallCount = 32;
constexpr float kFaintTerm = 3e-8f;  // ends the sum: single precision can't add less to a sum near 1

// One draw by inversion: start, then step for k = 1, 2, ... until it returns false; `count` is the answer.
struct SmallPoisson {
    float u, mean, probability, below, count;
};
XRD_PORTABLE SmallPoisson small_poisson(float mean, uint32_t word) {
    const float u = (static_cast<float>(static_cast<int32_t>(word >> 9)) + 0.5f) * 1.1920928955078125e-7f;
    const float probability = exp2_nonpositive(mean * -1.44269504f);
    return {u, mean, probability, probability, 0.0f};
}
XRD_PORTABLE bool step(SmallPoisson& draw, float inverse_k) {
    const bool more = (draw.u > draw.below) & (draw.probability > kFaintTerm);
    draw.count += more ? 1.0f : 0.0f;
    const float next = draw.probability * draw.mean;
    draw.below = fmaf(next, inverse_k, draw.below);
    draw.probability = next * inverse_k;
    return more;
}

// Cornish-Fisher expansion of the inverse distribution function with continuity correction: Giles, ACM Trans. Math.
// Softw. 42, 7 (2016), Algorithm 955.
XRD_PORTABLE float large_poisson(float mean, uint32_t word) {
    const float z = normal_quantile(word), z2 = z * z;
    const float root = sqrtf(mean), inverse = 1.0f / root;
    const float a = fmaf(z2, 1.66666667e-1f, 3.33333333e-1f);
    const float b = fmaf(z2, -1.38888889e-2f, -2.77777778e-2f) * z;
    const float c = fmaf(z2, fmaf(z2, 3.7037037e-3f, 8.64197531e-3f), -1.97530864e-2f);
    const float shift = fmaf(root, z, fmaf(inverse, fmaf(inverse, c, b), a));
    const float count = floorf(mean + shift);
    return count > 0.0f ? count : 0.0f;
}

XRD_PORTABLE float poisson(float mean, uint32_t word) {
    if (mean >= kCrossover) return large_poisson(mean, word);
    SmallPoisson draw = small_poisson(mean, word);
    for (int k = 1; k <= kMaxSmallCount && step(draw, 1.0f / static_cast<float>(k)); ++k) {
    }
    return draw.count;
}

}  // namespace xrdfast
