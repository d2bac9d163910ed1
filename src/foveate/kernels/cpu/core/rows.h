// Rows in memory -> packed fp32 panels, and back. Half types are converted here and nowhere else.
#pragma once
#include "foveate_cpu.h"
#include "simd.h"

namespace FV_NAMESPACE {

static inline float from_bf16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
static inline uint16_t to_bf16(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}
static inline float from_f16(uint16_t x) {
    uint32_t sign = (uint32_t)(x & 0x8000) << 16, exponent = (x >> 10) & 31, mantissa = x & 1023, bits;
    if (exponent == 31) {
        bits = sign | 0x7f800000u | mantissa << 13;
    } else if (exponent) {
        bits = sign | (exponent + 112) << 23 | mantissa << 13;
    } else {
        float f = (float)mantissa * 5.9604644775390625e-8f;  // 2^-24
        return sign ? -f : f;
    }
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
static inline uint16_t to_f16(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00);
    if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00);  // rounds to 65536 or more
    if (magnitude < 0x38800000u) {                                   // subnormal: let the adder round
        float g, magic = 0.5f;
        std::memcpy(&g, &magnitude, 4);
        g += magic;
        uint32_t r;
        std::memcpy(&r, &g, 4);
        return (uint16_t)(sign | (r - 0x3f000000u));
    }
    return (uint16_t)(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13));
}

static inline int64_t size_of(int dtype) { return dtype == FV_F32 ? 4 : 2; }

// One row of n elements to fp32, times `factor`.
static inline void read_row(float* to, const void* from, int64_t at, int n, int dtype, float factor) {
    if (dtype == FV_F32) {
        const float* p = (const float*)from + at;
        for (int i = 0; i < n; ++i) to[i] = p[i] * factor;
    } else if (dtype == FV_BF16) {
        const uint16_t* p = (const uint16_t*)from + at;
        for (int i = 0; i < n; ++i) to[i] = from_bf16(p[i]) * factor;
    } else {
        const uint16_t* p = (const uint16_t*)from + at;
        for (int i = 0; i < n; ++i) to[i] = from_f16(p[i]) * factor;
    }
}
static inline void write_row(void* to, int64_t at, const float* from, int n, int dtype, float factor) {
    if (dtype == FV_F32) {
        float* p = (float*)to + at;
        for (int i = 0; i < n; ++i) p[i] = from[i] * factor;
    } else if (dtype == FV_BF16) {
        uint16_t* p = (uint16_t*)to + at;
        for (int i = 0; i < n; ++i) p[i] = to_bf16(from[i] * factor);
    } else {
        uint16_t* p = (uint16_t*)to + at;
        for (int i = 0; i < n; ++i) p[i] = to_f16(from[i] * factor);
    }
}

}  // namespace FV_NAMESPACE
