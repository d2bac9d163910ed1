// Vectors of W floats, one source for every instruction set: the translation unit fixes FV_W and the compiler flags.
// GCC's and Clang's vector extensions do the rest; other compilers get W = 1.
#pragma once
#include <cstdint>
#include <cstring>
#include <limits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace FV_NAMESPACE {

constexpr int W = FV_W;
typedef float vf __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef float vfa __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));

static inline vfa load(const float* p) { return (vfa) * reinterpret_cast<const vf*>(p); }
static inline void store(float* p, vfa x) { *reinterpret_cast<vf*>(p) = (vf)x; }
static inline vfa splat(float x) { return x - vfa{}; }
static inline vfa maxv(vfa a, vfa b) { return a > b ? a : b; }

// exp(x) for x <= 0 to about one unit in the last place; exactly 0 below -87 (and for -inf).
static inline vfa exp_neg(vfa x) {
    const vfa log2e = splat(1.44269504088896341f);
    const vfa low = splat(-87.0f);
    vfa c = maxv(x, low);
    const vfa magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    vfa r = (c * log2e + magic);
    vi n = (vi)r - (vi)magic;
    r = r - magic;
    vfa f = c - r * splat(0.693145751953125f);
    f = f - r * splat(1.428606765330187e-6f);
    vfa p = splat(1.9875691500e-4f);
    p = p * f + splat(1.3981999507e-3f);
    p = p * f + splat(8.3334519073e-3f);
    p = p * f + splat(4.1665795894e-2f);
    p = p * f + splat(1.6666665459e-1f);
    p = p * f + splat(5.0000001201e-1f);
    p = p * (f * f) + f + splat(1.0f);
    vfa scaled = (vfa)((vi)p + (n << 23));
    return x < low ? vfa{} : scaled;
}

// table[index] for every lane.
static inline vfa gather(const float* table, vi index) {
#if defined(__AVX512F__)
    return (vfa)_mm512_i32gather_ps((__m512i)index, table, 4);
#elif defined(__AVX2__)
    return (vfa)_mm256_i32gather_ps(table, (__m256i)index, 4);
#else
    vfa found;
    for (int i = 0; i < W; ++i) found[i] = table[index[i]];
    return found;
#endif
}

// Keep the lanes whose bit is set, `other` elsewhere. `bits` holds one bit a lane, lowest first.
static inline vfa select_bits(uint32_t bits, vfa x, vfa other) {
#if defined(__AVX512F__)
    return (vfa)_mm512_mask_mov_ps((__m512)other, (__mmask16)bits, (__m512)x);
#else
    vi lane;
    for (int i = 0; i < W; ++i) lane[i] = 1 << i;
    vi on = (lane & (vi)((int32_t)bits - vi{})) != 0;
    return on ? x : other;
#endif
}

}  // namespace FV_NAMESPACE
