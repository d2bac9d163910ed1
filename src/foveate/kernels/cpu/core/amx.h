// The matrix products on AMX tiles: C[16][16] += A[16][32] * B[16 pairs][16], bf16 in, fp32 sums. The panels already have
// the shapes that tiles want; only the weights must be turned round for `blend`. Included by products.h inside its
// namespace's file; FV_AMX_EMULATED replaces the eight tiles by arrays, so that tests need no such CPU.
#pragma once
#include "simd.h"

namespace FV_NAMESPACE {

constexpr int TILE = 16, DEEP = 32;  // rows of a tile, and bf16 numbers of a row of A

#if defined(FV_AMX_EMULATED)
static thread_local uint32_t tiles_[8][16][16];

static inline float high_half(uint32_t x) {
    float f;
    std::memcpy(&f, &x, 4);
    return f;
}
template <int T>
static inline void tile_zero() {
    std::memset(tiles_[T], 0, sizeof tiles_[T]);
}
template <int T>
static inline void tile_load(const void* from, int64_t stride) {
    for (int r = 0; r < TILE; ++r) std::memcpy(tiles_[T][r], (const char*)from + r * stride, 64);
}
template <int T>
static inline void tile_store(void* to, int64_t stride) {
    for (int r = 0; r < TILE; ++r) std::memcpy((char*)to + r * stride, tiles_[T][r], 64);
}
template <int C, int A, int B>
static inline void tile_dp() {
    for (int m = 0; m < TILE; ++m)
        for (int k = 0; k < TILE; ++k)
            for (int n = 0; n < TILE; ++n) {
                uint32_t a = tiles_[A][m][k], b = tiles_[B][k][n];
                float c = high_half(tiles_[C][m][n]);
                c += high_half(a << 16) * high_half(b << 16);
                c += high_half(a & 0xffff0000u) * high_half(b & 0xffff0000u);
                std::memcpy(&tiles_[C][m][n], &c, 4);
            }
}
struct Tiles {};
#else
// Assembly and not intrinsics: those of GCC paste the tile's number into a string, so that no template can choose it.
template <int T>
static inline void tile_zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(T));
}
template <int T>
static inline void tile_load(const void* from, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
static inline void tile_store(void* to, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
static inline void tile_dp() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
// Tiles belong to a thread: configured while it runs a task, given back after, so that nothing is left behind.
struct Tiles {
    Tiles() {
        alignas(64) uint8_t config[64] = {1};  // palette 1; the rest: rows and bytes of a row of each tile
        for (int t = 0; t < 8; ++t) {
            config[16 + 2 * t] = 64;
            config[48 + t] = TILE;
        }
        __asm__ volatile("ldtilecfg %0" : : "m"(config));
    }
    ~Tiles() { __asm__ volatile("tilerelease"); }
};
#endif

// R x N tiles of C (0..3), with A in 4 and 5 and B in 6 and 7. Strides are in elements of each panel's own kind; `n` is
// the summed length, a multiple of DEEP, and B has pairs of neighbours along it.
template <int R, int N>
static inline void tile_block(const uint16_t* a, int64_t ld_a, const uint16_t* b, int64_t ld_b, int n, float* c, int64_t ld_c,
                              bool add) {
    if (add) {
        tile_load<0>(c, 4 * ld_c);
        if constexpr (N > 1) tile_load<1>(c + TILE, 4 * ld_c);
        if constexpr (R > 1) tile_load<2>(c + TILE * ld_c, 4 * ld_c);
        if constexpr (R > 1 && N > 1) tile_load<3>(c + TILE * ld_c + TILE, 4 * ld_c);
    } else {
        tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    }
    for (int i = 0; i < n; i += DEEP) {
        tile_load<4>(a + i, 2 * ld_a);
        if constexpr (R > 1) tile_load<5>(a + TILE * ld_a + i, 2 * ld_a);
        tile_load<6>(b + i / 2 * ld_b, 2 * ld_b);
        if constexpr (N > 1) tile_load<7>(b + i / 2 * ld_b + 2 * TILE, 2 * ld_b);
        tile_dp<0, 4, 6>();
        if constexpr (N > 1) tile_dp<1, 4, 7>();
        if constexpr (R > 1) tile_dp<2, 5, 6>();
        if constexpr (R > 1 && N > 1) tile_dp<3, 5, 7>();
    }
    tile_store<0>(c, 4 * ld_c);
    if constexpr (N > 1) tile_store<1>(c + TILE, 4 * ld_c);
    if constexpr (R > 1) tile_store<2>(c + TILE * ld_c, 4 * ld_c);
    if constexpr (R > 1 && N > 1) tile_store<3>(c + TILE * ld_c + TILE, 4 * ld_c);
}

// c[rows][columns] (+)= a . b; rows and columns are multiples of TILE.
static inline void tile_product(const uint16_t* a, int64_t ld_a, int rows, const uint16_t* b, int64_t ld_b, int columns, int n,
                                float* c, int64_t ld_c, bool add) {
    for (int r = 0; r < rows; r += 2 * TILE)
        for (int j = 0; j < columns; j += 2 * TILE) {
            const uint16_t *at = a + r * ld_a, *bt = b + 2 * j;
            float* ct = c + r * ld_c + j;
            const bool tall = r + TILE < rows, wide = j + TILE < columns;
            if (tall && wide) tile_block<2, 2>(at, ld_a, bt, ld_b, n, ct, ld_c, add);
            else if (tall) tile_block<2, 1>(at, ld_a, bt, ld_b, n, ct, ld_c, add);
            else if (wide) tile_block<1, 2>(at, ld_a, bt, ld_b, n, ct, ld_c, add);
            else tile_block<1, 1>(at, ld_a, bt, ld_b, n, ct, ld_c, add);
        }
}

// 16 x 16 floats from `from` (rows `ld` apart; those from `n` on count as zeros) turned round: out[i] has column i.
static inline void turn(const float* from, int64_t ld, int n, __m512 out[16]) {
    __m512 a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = i < n ? _mm512_loadu_ps(from + i * ld) : _mm512_setzero_ps();
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int half = 0; half < 2; ++half) {
            __m512d lo = _mm512_castps_pd(b[i + half]), hi = _mm512_castps_pd(b[i + 2 + half]);
            a[i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(lo, hi));
            a[i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(lo, hi));
        }
    // a[4 g + c] has, in each of its four lanes l, rows 4 g .. 4 g + 3 of column 4 l + c.
    for (int c = 0; c < 4; ++c) {
        __m512 p = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x88), q = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xdd);
        __m512 r = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x88), s = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xdd);
        out[c] = _mm512_shuffle_f32x4(p, r, 0x88);
        out[8 + c] = _mm512_shuffle_f32x4(p, r, 0xdd);
        out[4 + c] = _mm512_shuffle_f32x4(q, s, 0x88);
        out[12 + c] = _mm512_shuffle_f32x4(q, s, 0xdd);
    }
}

// fp32 st[row][lane] -> bf16 to[lane][row], `ld` apart; rows from n to a multiple of DEEP are zeros.
static inline void turn_rows(const float* st, int n_lanes, int used, int n, uint16_t* to, int ld) {
    __m512 lo[16], hi[16];
    for (int l = 0; l < used; l += 16)
        for (int r = 0; r < n; r += DEEP) {
            turn(st + (int64_t)r * n_lanes + l, n_lanes, n - r, lo);
            turn(st + (int64_t)(r + 16) * n_lanes + l, n_lanes, n - r - 16, hi);
            for (int i = 0; i < 16; ++i)
                _mm512_storeu_si512(to + (int64_t)(l + i) * ld + r, (__m512i)_mm512_cvtne2ps_pbh(hi[i], lo[i]));
        }
}

}  // namespace FV_NAMESPACE
