// The two matrix products everything is made of. Panels are fp32 and aligned.
//   dots:  st[row][lane]  = sum_i rows[row][i] * lanes[i][lane]      (logits, and d_out . v)
//   blend: out[lane][j]  += sum_row st[row][lane] * rows[row][j]     (outputs and gradients)
// `rows` is read as it streams in, never transposed: its elements are broadcast in the first, vectors in the second.
#pragma once
#include "simd.h"
#if defined(FV_AMX)
#include "amx.h"
#endif

namespace FV_NAMESPACE {

constexpr int CHUNK = 96;  // rows that stream past at a time: st, two panels and the outputs stay in L1/L2
constexpr int REGISTERS = W == 16 ? 32 : 16;

template <int R, int NV, int LD>
static void dots_block(const float* rows, const float* lanes, int ld_lanes, int n, float* st, int ld_st) {
    vfa acc[R][NV];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < NV; ++v) acc[r][v] = vfa{};
    for (int i = 0; i < n; ++i) {
        vfa b[NV];
        for (int v = 0; v < NV; ++v) b[v] = load(lanes + (int64_t)i * ld_lanes + v * W);
#pragma GCC unroll 32
        for (int r = 0; r < R; ++r) {
            vfa a = splat(rows[r * LD + i]);
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) acc[r][v] += a * b[v];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < NV; ++v) store(st + (int64_t)r * ld_st + v * W, acc[r][v]);
}

template <int R, int NV>
static void blend_block(const float* st, int ld_st, const float* rows, int ld, int n, float* out) {
    vfa acc[R][NV];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < NV; ++v) acc[r][v] = load(out + (int64_t)r * ld + v * W);
    for (int k = 0; k < n; ++k) {
        vfa b[NV];
        for (int v = 0; v < NV; ++v) b[v] = load(rows + (int64_t)k * ld + v * W);
#pragma GCC unroll 32
        for (int r = 0; r < R; ++r) {
            vfa a = splat(st[(int64_t)k * ld_st + r]);
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) acc[r][v] += a * b[v];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < NV; ++v) store(out + (int64_t)r * ld + v * W, acc[r][v]);
}

// Rows are padded to a multiple of this (panel rows beyond n hold anything finite), so that no tail kernel exists.
static inline int row_step(int n_lanes) {
    if (W < 16) return 6;
    return n_lanes >= 64 ? 6 : n_lanes == 32 ? 12 : 24;
}

template <int LD>
static void dots_ld(const float* rows, int n_rows, const float* lanes, int n_lanes, int n, float* st) {
    if constexpr (W == 16) {
        if (n_lanes == 64) {
            for (int r = 0; r < n_rows; r += 6)
                dots_block<6, 4, LD>(rows + r * LD, lanes, 64, n, st + r * 64, 64);
        } else if (n_lanes == 32) {
            for (int r = 0; r < n_rows; r += 12)
                dots_block<12, 2, LD>(rows + r * LD, lanes, 32, n, st + r * 32, 32);
        } else {
            for (int r = 0; r < n_rows; r += 24)
                dots_block<24, 1, LD>(rows + r * LD, lanes, 16, n, st + r * 16, 16);
        }
    } else {
        for (int r = 0; r < n_rows; r += 6)
            for (int l = 0; l < n_lanes; l += 2 * W)
                dots_block<6, 2, LD>(rows + r * LD, lanes + l, n_lanes, n, st + (int64_t)r * n_lanes + l, n_lanes);
    }
}

static inline void dots(const float* rows, int ld, int n_rows, const float* lanes, int n_lanes, int n, float* st) {
    if (ld == 32) dots_ld<32>(rows, n_rows, lanes, n_lanes, n, st);
    else if (ld == 64) dots_ld<64>(rows, n_rows, lanes, n_lanes, n, st);
    else if (ld == 128) dots_ld<128>(rows, n_rows, lanes, n_lanes, n, st);
    else dots_ld<256>(rows, n_rows, lanes, n_lanes, n, st);
}

// `width` (a multiple of 2W) of the ld columns are computed; n_lanes is a multiple of 8.
static inline void blend(const float* st, int n_lanes, int used, const float* rows, int ld, int n, int width, float* out) {
    int j = 0;
    if constexpr (W == 16)
        for (; j + 4 * W <= width; j += 4 * W)
            for (int l = 0; l < used; l += 4)
                blend_block<4, 4>(st + l, n_lanes, rows + j, ld, n, out + (int64_t)l * ld + j);
    for (; j < width; j += 2 * W)
        for (int l = 0; l < used; l += (W == 16 ? 8 : 4))
            blend_block<(W == 16 ? 8 : 4), 2>(st + l, n_lanes, rows + j, ld, n, out + (int64_t)l * ld + j);
}

#if defined(__AVX512BF16__)
// The same two products on bf16 panels with fp32 sums. Pairs of neighbours along the summed axis are interleaved:
//   dots:  lanes[i / 2][lane][2] against rows[row][i];   blend: st[row / 2][lane][2] against rows[row / 2][j][2]
static inline __m512 dp(__m512 acc, const void* a, __m512i b) {
    int32_t pair;
    std::memcpy(&pair, a, 4);
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)b);
}

template <int R, int NV, int LD>
static void dots_block(const uint16_t* rows, const uint16_t* lanes, int ld_lanes, int n, float* st, int ld_st) {
    __m512 acc[R][NV];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < NV; ++v) acc[r][v] = _mm512_setzero_ps();
    for (int i = 0; i < n; i += 2) {
        __m512i b[NV];
        for (int v = 0; v < NV; ++v) b[v] = _mm512_loadu_si512(lanes + (int64_t)i * ld_lanes + v * 2 * W);
#pragma GCC unroll 32
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) acc[r][v] = dp(acc[r][v], rows + r * LD + i, b[v]);
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < NV; ++v) _mm512_storeu_ps(st + (int64_t)r * ld_st + v * W, acc[r][v]);
}

template <int R, int NV>
static void blend_block(const uint16_t* st, int ld_st, const uint16_t* rows, int ld, int n, float* out, int ld_out) {
    __m512 acc[R][NV];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < NV; ++v) acc[r][v] = _mm512_loadu_ps(out + (int64_t)r * ld_out + v * W);
    for (int k = 0; k < n; k += 2) {
        __m512i b[NV];
        for (int v = 0; v < NV; ++v) b[v] = _mm512_loadu_si512(rows + (int64_t)k * ld + v * 2 * W);
#pragma GCC unroll 32
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) acc[r][v] = dp(acc[r][v], st + (int64_t)k * ld_st + 2 * r, b[v]);
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < NV; ++v) _mm512_storeu_ps(out + (int64_t)r * ld_out + v * W, acc[r][v]);
}

template <int LD>
static void dots_ld(const uint16_t* rows, int n_rows, const uint16_t* lanes, int n_lanes, int n, float* st) {
    if (n_lanes == 64) {
        for (int r = 0; r < n_rows; r += 6) dots_block<6, 4, LD>(rows + r * LD, lanes, 64, n, st + r * 64, 64);
    } else if (n_lanes == 32) {
        for (int r = 0; r < n_rows; r += 12) dots_block<12, 2, LD>(rows + r * LD, lanes, 32, n, st + r * 32, 32);
    } else {
        for (int r = 0; r < n_rows; r += 24) dots_block<24, 1, LD>(rows + r * LD, lanes, 16, n, st + r * 16, 16);
    }
}

static inline void dots(const uint16_t* rows, int ld, int n_rows, const uint16_t* lanes, int n_lanes, int n, float* st) {
    if (ld == 32) dots_ld<32>(rows, n_rows, lanes, n_lanes, n, st);
    else if (ld == 64) dots_ld<64>(rows, n_rows, lanes, n_lanes, n, st);
    else if (ld == 128) dots_ld<128>(rows, n_rows, lanes, n_lanes, n, st);
    else dots_ld<256>(rows, n_rows, lanes, n_lanes, n, st);
}

static inline __m512i weave(int half) {
    alignas(64) uint16_t at[32];
    for (int i = 0; i < 16; ++i) at[2 * i] = (uint16_t)(16 * half + i), at[2 * i + 1] = (uint16_t)(32 + 16 * half + i);
    return _mm512_load_si512(at);
}

// fp32 st[row][lane] -> bf16 pairs of rows; an odd last row is paired with zeros.
static inline void pair_rows(const float* st, int n_lanes, int n, uint16_t* to) {
    alignas(64) uint16_t at[32];
    for (int i = 0; i < 16; ++i) at[2 * i] = (uint16_t)i, at[2 * i + 1] = (uint16_t)(16 + i);
    const __m512i order = _mm512_load_si512(at);
    for (int r = 0; r < n; r += 2)
        for (int l = 0; l < n_lanes; l += 16) {
            __m512 lo = _mm512_loadu_ps(st + (int64_t)r * n_lanes + l);
            __m512 hi = r + 1 < n ? _mm512_loadu_ps(st + (int64_t)(r + 1) * n_lanes + l) : _mm512_setzero_ps();
            __m512i both = (__m512i)_mm512_cvtne2ps_pbh(hi, lo);
            _mm512_storeu_si512(to + (int64_t)r * n_lanes + 2 * l, _mm512_permutexvar_epi16(order, both));
        }
}

// bf16 rows[row][j] -> pairs of rows; an odd last row is paired with zeros. `width` is a multiple of 32.
static inline void pair_panel(const uint16_t* rows, int ld, int n, int width, uint16_t* to) {
    const __m512i first = weave(0), second = weave(1);
    for (int r = 0; r < n; r += 2)
        for (int j = 0; j < width; j += 32) {
            __m512i lo = _mm512_loadu_si512(rows + (int64_t)r * ld + j);
            __m512i hi = r + 1 < n ? _mm512_loadu_si512(rows + (int64_t)(r + 1) * ld + j) : _mm512_setzero_si512();
            _mm512_storeu_si512(to + (int64_t)r * ld + 2 * j, _mm512_permutex2var_epi16(lo, first, hi));
            _mm512_storeu_si512(to + (int64_t)r * ld + 2 * j + 32, _mm512_permutex2var_epi16(lo, second, hi));
        }
}

static inline void blend(const uint16_t* st, int n_lanes, int used, const uint16_t* rows, int ld, int n, int width,
                         float* out, int ld_out) {
    int j = 0;
    for (; j + 64 <= width; j += 64)
        for (int l = 0; l < used; l += 4)
            blend_block<4, 4>(st + 2 * l, n_lanes, rows + 2 * j, ld, n, out + (int64_t)l * ld_out + j, ld_out);
    for (; j < width; j += 32)
        for (int l = 0; l < used; l += 8)
            blend_block<8, 2>(st + 2 * l, n_lanes, rows + 2 * j, ld, n, out + (int64_t)l * ld_out + j, ld_out);
}
#endif

}  // namespace FV_NAMESPACE
